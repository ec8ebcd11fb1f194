"""The simulator and ``fssa plan``: arithmetic by hand, the clock, fairness, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fssa_runtime.cli import main
from fssa_runtime.engine.page_pool import PagePool
from fssa_runtime.engine.scheduler import Scheduler
from fssa_runtime.engine.stream import Stream
from fssa_runtime.errors import InputError
from fssa_runtime.planning.capacity import PRECISION, Service, find_rate, holds
from fssa_runtime.planning.machine import MACHINES, Machine, Roofline, Step
from fssa_runtime.planning.measured import read_measured
from fssa_runtime.planning.memory import MemoryPlan, plan_memory
from fssa_runtime.planning.result import Objectives, Result
from fssa_runtime.planning.shapes import model_size
from fssa_runtime.planning.simulator import Simulator
from fssa_runtime.planning.sketch import Sketch
from fssa_runtime.planning.slots import SlotTable
from fssa_runtime.planning.trace import Arrival, Lengths, Trace

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"
SMOLLM = "smollm2-135m"


class SimpleTime:
    """10 ms a step, 1 ms a token of a prompt, 5 ms a refilled row."""

    basis = "made up"
    notes = ()

    def terms(self, step: Step) -> dict[str, float]:
        return {
            "step": 0.010,
            "prompts": 0.001 * step.prompt_tokens,
            "refills": 0.005 * step.refills,
        }


def simulator(
    *,
    max_streams: int = 8,
    max_tokens: int = 100,
    pages: int = 1000,
    slots: int = 1000,
    users: int = 1000,
    busy: int = 0,
    refills: bool = False,
) -> Simulator:
    scheduler = Scheduler(
        PagePool(pages, 16), max_streams=max_streams, max_tokens=max_tokens, max_length=10_000
    )
    made = Simulator(
        scheduler,
        SimpleTime(),
        Objectives(1.0, 0.1),
        num_slots=slots,
        num_users=users,
        num_busy=busy,
    )
    if not refills:
        made._slots.acquire = lambda user: True  # type: ignore[method-assign]
        made._slots.release = lambda user: None  # type: ignore[method-assign]
    return made


def trace(**changes: Any) -> Trace:
    options: dict[str, Any] = {
        "rate": 20.0,
        "num_requests": 500,
        "num_users": 200,
        "prompt": Lengths(60, 200),
        "output": Lengths(10, 40),
        "max_prompt": 500,
    }
    return Trace(**{**options, **changes})


def test_memory_by_hand() -> None:
    model = model_size("llama-8b", 16)
    assert model.parameters == 8_030_261_248  # of Llama 3.1 8B
    assert model.kv_token_bytes == 2 * 32 * 8 * 128 * 2
    assert model.row_bytes == 32 * 7 * 16 * 4
    # A and B of q k v, o, gate up, down; then 16 + 1 numbers for each of a row's.
    outputs, inputs = 4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096, 6 * 4096 + 14336
    assert model.factor_bytes == 32 * 16 * (outputs + inputs) * 2 + 32 * 7 * 16 * 17 * 4
    memory = plan_memory(
        model, 80e9, num_users=10**6, max_streams=256, max_tokens=1024, page_size=16
    )
    buffers = 2 * 1024 * (6 * 4096 + 2 * 14336) + 4 * 256 * 128256
    assert memory.slots == 10**6
    assert memory.table == (10**6 + 1) * 14336
    left = 80 * 10**9 - 2 * 8_030_261_248 - model.factor_bytes - buffers
    assert memory.max_slots == left // 2 // 14336 - 1
    assert memory.num_pages == (left - memory.table) // (16 * 131072)
    assert memory.weights + memory.factors + memory.buffers + memory.table + memory.kv <= 80e9


def test_more_users_than_fit_and_slots_that_are_given() -> None:
    model = model_size(SMOLLM, 16)
    sizes: dict[str, Any] = {"max_streams": 8, "max_tokens": 64, "page_size": 16}
    many = plan_memory(model, 1e9, num_users=10**9, **sizes)
    assert many.slots == many.max_slots < 10**9
    assert many.table <= 0.5 * (1e9 - many.weights - many.factors - many.buffers)
    assert plan_memory(model, 1e9, num_users=10**9, slots=123, **sizes).slots == 123
    with pytest.raises(InputError, match="fewer than the 8 streams"):
        plan_memory(model, 1e9, num_users=10, slots=7, **sizes)
    with pytest.raises(InputError, match="no memory is left for keys"):
        plan_memory(model, 1e9, num_users=10**9, slots=many.max_slots * 2 + 1, **sizes)
    with pytest.raises(InputError, match="does not fit"):
        plan_memory(model, 0.2e9, num_users=1, **sizes)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_within_the_accuracy(share: float) -> None:
    values = np.random.default_rng(0).lognormal(-3, 2, 5000)
    sketch = Sketch(accuracy=0.01)
    for value in values.tolist():
        sketch.add(value)
    exact = np.quantile(values, share, method="inverted_cdf")
    assert sketch.quantile(share) == pytest.approx(exact, rel=0.0101)
    assert sketch.quantile(1) == values.max()
    assert sketch.mean == pytest.approx(values.mean())
    assert len(sketch._bins) < 1400


def test_weights_of_a_sketch_and_zero() -> None:
    sketch = Sketch()
    assert np.isnan(sketch.quantile(0.5))
    sketch.add(0.0, 3)
    sketch.add(2.0, 1)
    assert (sketch.quantile(0.75), sketch.quantile(0.76), sketch.mean) == (0.0, 2.0, 0.5)


def test_a_request_alone() -> None:
    result = simulator(max_tokens=100).run(iter([Arrival(2.0, 0, 0, 250, 5)]))
    # Pieces of 100, 100 and 50 tokens, then four more tokens.
    prefill = 3 * 0.010 + 0.250
    assert result.ttft.quantile(0.5) == pytest.approx(prefill)
    assert result.itl.count == 4
    assert result.itl.quantile(0.99) == pytest.approx(0.010)
    assert result.seconds == pytest.approx(2.0 + prefill + 4 * 0.010)
    assert (result.steps, result.output_tokens, result.requests) == (7, 5, 1)
    assert result.queue.max == 0
    assert result.fairness == pytest.approx(1.0)


def test_a_request_that_comes_within_a_step_waits_for_the_next() -> None:
    run = simulator().run(iter([Arrival(0.0, 0, 0, 50, 3), Arrival(0.030, 1, 1, 20, 1)]))
    # First: 0 to 60 ms, its second token at 90 together with the newcomer's prompt, its third at
    # 100. The newcomer has its one token at 90, 60 ms after it came.
    assert run.seconds == pytest.approx(0.100)
    assert run.ttft.min == pytest.approx(0.060)
    assert run.ttft.max == pytest.approx(0.060)
    assert run.itl.max == pytest.approx(0.030)
    assert run.itl.min == pytest.approx(0.010)


def test_what_a_step_computes() -> None:
    steps: list[Step] = []

    class Recorded(SimpleTime):
        def terms(self, step: Step) -> dict[str, float]:
            steps.append(step)
            return super().terms(step)

    machine = simulator(max_tokens=100)
    machine._step_time = Recorded()
    machine.run(iter([Arrival(0.0, 0, 0, 150, 2)]))
    # Every query attends to the keys up to its own.
    assert steps == [
        Step(0, 100, 100, sum(range(1, 101))),
        Step(0, 50, 150, sum(range(101, 151))),
        Step(1, 0, 151, 151),
    ]


def test_objectives() -> None:
    machine = simulator(max_tokens=2000)
    arrivals = [
        Arrival(0.0, 0, 0, 900, 2),  # 0.91 s
        Arrival(10.0, 1, 1, 1000, 1),  # 1.01 s: late
        Arrival(20.0, 2, 2, 10, 3),  # its next tokens come with a long prompt: late
        Arrival(20.001, 3, 3, 300, 1),
    ]
    result = machine.run(iter(arrivals))
    assert (result.within, result.late) == (2, 2)
    assert result.longest_wait_user == 1


def test_rows_of_the_table() -> None:
    table = SlotTable(2)
    assert not table.acquire(1)
    assert table.acquire(1)
    table.release(1)
    table.release(1)
    assert not table.acquire(2)
    table.release(2)
    assert table.acquire(1)  # its row was kept
    assert not table.acquire(3)  # 2's is taken, for 1 is in flight
    table.release(1)
    assert not table.acquire(2)  # 1 has gone


def test_refills_cost_time() -> None:
    arrivals = [Arrival(float(n), n % 3, n, 10, 1) for n in range(9)]
    for slots, misses in ((2, 9), (3, 3)):
        machine = simulator(max_streams=1, slots=slots, refills=True)
        result = machine.run(iter(arrivals))
        assert (result.slot_lookups, result.slot_misses) == (9, misses)
        assert result.ttft.sum == pytest.approx(9 * 0.020 + misses * 0.005)
    with pytest.raises(ValueError, match="a slot for every stream"):
        simulator(max_streams=3, slots=2)


def test_a_conversation_is_found_in_the_pages_and_nobody_else_is() -> None:
    first = Arrival(0.0, 0, 0, 64, 32)
    again = Arrival(10.0, 0, 0, 64 + 32 + 20, 1)
    other = Arrival(10.0, 1, 0, 64 + 32 + 20, 1)  # the same text
    # The last written token was not computed: 95 tokens are, 5 full pages.
    assert simulator().run(iter([first, again])).reused_tokens == 80
    assert simulator().run(iter([first, other])).reused_tokens == 0


def test_preemption_loses_nothing() -> None:
    machine = simulator(pages=40, slots=8, refills=True)
    result = machine.run(iter([Arrival(0.0, n, n, 30, 300) for n in range(8)]))
    assert result.preemptions > 0
    assert (result.requests, result.output_tokens, result.itl.count) == (8, 2400, 8 * 299)
    machine.scheduler.check()
    assert machine.scheduler.pool.num_free == 40
    assert not machine._slots._held


def test_the_trace_is_lazy_seeded_and_scales_with_the_rate() -> None:
    endless = trace(num_requests=10**15)
    start = list(islice(endless.arrivals(), 5000))
    assert start == list(islice(endless.arrivals(), 5000))
    assert start != list(islice(trace(num_requests=10**15, seed=1).arrivals(), 5000))
    twice = list(islice(trace(num_requests=10**15, rate=40.0).arrivals(), 5000))
    assert [a[1:] for a in start] == [a[1:] for a in twice]
    assert twice[-1].time == pytest.approx(start[-1].time / 2)
    assert start[-1].time == pytest.approx(5000 / 20, rel=0.05)
    assert all(a.time <= b.time for a, b in pairwise(start))
    assert len(list(trace(num_requests=4097).arrivals())) == 4097


def test_users_follow_zipf_and_lengths_their_mean() -> None:
    load = trace(num_requests=40_000, num_users=50, continued=0.0, prompt=Lengths(60, 500, 0.5))
    found = list(load.arrivals())
    counts = np.bincount([a.user for a in found], minlength=50) / len(found)
    weights = 1 / np.arange(1, 51)
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.006)
    assert np.mean([a.prompt_tokens for a in found]) == pytest.approx(60, rel=0.02)
    assert max(a.output_tokens for a in found) == 40  # the cap
    assert len({a.conversation for a in found}) == len(found)


def test_bursts_keep_the_rate() -> None:
    steady = np.array([a.time for a in trace(num_requests=20_000).arrivals()])
    load = trace(num_requests=20_000, on_seconds=2.0, off_seconds=6.0)
    bursty = np.array([a.time for a in load.arrivals()])
    assert bursty[-1] == pytest.approx(1000, rel=0.2)
    # The variance of counts a second over their mean: 1 for a Poisson process.
    dispersion = [
        np.var(counts) / np.mean(counts)
        for counts in (np.bincount(t.astype(int)) for t in (steady, bursty))
    ]
    assert dispersion[0] == pytest.approx(1, abs=0.2)
    assert dispersion[1] > 20
    # Within a burst they come four times as fast.
    assert np.median(np.diff(bursty)) == pytest.approx(np.log(2) / 80, rel=0.1)


def test_conversations_grow_until_they_are_too_long() -> None:
    told: dict[int, int] = {}
    owner: dict[int, int] = {}
    continued = 0
    for arrival in trace(num_requests=5000, num_users=20, continued=0.8).arrivals():
        assert owner.setdefault(arrival.conversation, arrival.user) == arrival.user
        assert told.get(arrival.conversation, 0) < arrival.prompt_tokens <= 500
        continued += arrival.conversation in told
        told[arrival.conversation] = arrival.prompt_tokens + arrival.output_tokens
    assert 0.5 < continued / 5000 < 0.8


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.0},
        {"rate": float("nan")},
        {"num_requests": 0},
        {"num_users": 0},
        {"continued": 1.5},
        {"zipf": -1.0},
        {"off_seconds": -1.0},
        {"max_prompt": 100},
    ],
)
def test_traces_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected|fit"):
        trace(**changes)


def test_the_seed_decides_everything_but_the_hosts_time() -> None:
    def outcome(seed: int) -> dict[str, Any]:
        result = simulator(users=200, refills=True, slots=20).run(trace(seed=seed).arrivals())
        sketches = {k: vars(v) for k, v in vars(result).items() if isinstance(v, Sketch)}
        return {**vars(result), **sketches, "host_s": 0}

    assert outcome(0) == outcome(0)
    assert outcome(0) != outcome(1)


class Unfair:
    """A queue in the scheduler's place that knows no users: the newest or the oldest first."""

    def __init__(self, newest_first: bool) -> None:
        self._items: list[tuple[Stream, Any, int]] = []
        self._end = -1 if newest_first else 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Stream]:
        return (item for item, _, _ in self._items)

    def add(self, item: Stream, user: Any, priority: int, *, front: bool = False) -> None:
        self._items.append((item, user, priority))

    def peek(self) -> tuple[Stream, Any, int] | None:
        return self._items[self._end] if self._items else None

    def pop(self) -> Stream:
        return self._items.pop(self._end)[0]

    def serve(self, *_: Any) -> None:
        pass

    def leave(self, *_: Any) -> None:
        pass


def test_starvation_shows_when_the_newest_goes_first() -> None:
    # One stream at a time, 24 ms each, and one comes every 22 ms.
    arrivals = [Arrival(0.022 * n, n, n, 4, 2) for n in range(1000)]
    fair, unfair = simulator(max_streams=1), simulator(max_streams=1)
    unfair.scheduler.waiting = Unfair(newest_first=True)  # type: ignore[assignment]
    waits = [machine.run(iter(arrivals)).longest_wait for machine in (fair, unfair)]
    assert waits[0] < 0.15 * fair.now
    assert waits[1] > 0.9 * unfair.now


def light_waits(backlog: int, unfair: bool) -> float:
    """How long a user waits who comes behind another's ``backlog``."""
    heavy = [Arrival(0.0, 0, n, 40, 10) for n in range(backlog)]
    machine = simulator(max_streams=2, busy=1)
    if unfair:
        machine.scheduler.waiting = Unfair(newest_first=False)  # type: ignore[assignment]
    result = machine.run(iter([*heavy, Arrival(1.0, 1, backlog, 40, 10)]))
    assert result.ttft_others.count == 1
    assert result.ttft_busy.count == backlog
    return result.ttft_others.max


def test_a_light_users_wait_does_not_grow_with_anothers_backlog() -> None:
    assert light_waits(400, unfair=False) == pytest.approx(light_waits(40, unfair=False))
    assert light_waits(400, unfair=False) < 0.5
    assert light_waits(400, unfair=True) > 8 * light_waits(40, unfair=True)  # what it tells apart


def test_fairness_of_users_who_are_served_unlike() -> None:
    machine = simulator(max_streams=1)
    result = machine.run(iter([Arrival(0.0, n, n, 40, 1) for n in range(2)]))
    # One token in 50 ms, and one in 100 ms.
    assert result.fairness == pytest.approx((20 + 10) ** 2 / (2 * (20**2 + 10**2)))


def test_roofline_by_hand() -> None:
    model = model_size("llama-8b", 16)
    machine = Machine("toy", bytes_per_s=1e12, flop_per_s=1e15, memory_bytes=80e9, source="")
    roofline = Roofline(model, machine, overhead_s=0.001)
    linears = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 32 * 16 * 81920
    head = 128256 * 4096
    one = roofline.terms(Step(1, 0, 100, 100))
    assert one["weights"] == pytest.approx(2 * (linears + head) / 1e12)
    assert one["attention"] == pytest.approx(100 * 131072 / 1e12)
    assert (one["products"], one["refills"], one["overhead"]) == (0, 0, 0.001)
    prompt = roofline.terms(Step(0, 8192, 8192, 8192 * 8193 // 2))
    assert prompt["weights"] == 0
    assert prompt["products"] == pytest.approx((8192 * 2 * linears + 2 * head) / 1e15)
    assert prompt["attention"] == pytest.approx(4 * 32 * 4096 * 8192 * 8193 / 2 / 1e15)
    refills = roofline.terms(Step(1, 0, 1, 1, refills=3))["refills"]
    assert refills == pytest.approx((3 * 14336 + 3584 * 17 * 4) / 1e12)
    assert MACHINES["h100"].bytes_per_s == 3.35e12


def test_measured_decoding_gives_back_what_was_measured() -> None:
    file, model = RESULTS / "decode.json", model_size(SMOLLM, 16)
    found = json.loads(file.read_text())
    measured = read_measured(file, model, MACHINES["h100"], 16)
    assert measured.basis == "measured"
    for batch in (1, 8, 32):
        keys = batch * (found["prompt_tokens"] + found["new_tokens"] // 2)
        rate = found["summary"]["decode"][str(batch)]["all distinct"]["tokens_per_s"]
        assert sum(measured.terms(Step(batch, 0, keys, keys)).values()) == pytest.approx(
            batch / rate
        )
    length = found["prefill_tokens"]
    step = Step(0, length, length, length * (length + 1) // 2)
    rate = found["summary"]["prefill"]["all distinct"]["tokens_per_s"]
    assert sum(measured.terms(step).values()) == pytest.approx(length / rate)
    lines = {n: measured.terms(Step(n, 0, 0, 0))["step"] for n in (1, 8, 20, 32, 512, 992)}
    assert lines[20] == pytest.approx((lines[8] + lines[32]) / 2)
    assert lines[992] == pytest.approx(2 * lines[512] - lines[32])


def test_measured_profile() -> None:
    file, model = RESULTS / "profile.json", model_size(SMOLLM, 16)
    found = json.loads(file.read_text())
    measured = read_measured(file, model, MACHINES["h100"], 16)
    parts = found["steps"]["32"]["all distinct"]
    terms = measured.terms(Step(32, 0, 32 * found["keys"], 32 * found["keys"]))
    assert sum(terms.values()) == pytest.approx(1e-3 * sum(parts.values()))
    assert terms["attention"] == pytest.approx(1e-3 * parts["paged_attention"])
    assert any("does not name its model" in note for note in measured.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected what"),
        ('{"steps": {}}', "ValueError|at least two|ZeroDivision"),
        ('{"steps": {"1": {}}, "keys": 80}', "all distinct"),
        ('{"summary": {"decode": {}}}', "raw"),
        ('{"model": "llama", "steps": {}}', "measured with llama"),
        ('{"rank": 8, "steps": {}}', "rank 8"),
    ],
)
def test_measured_files_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        read_measured(file, model_size(SMOLLM, 16), MACHINES["h100"], 16)


def service(**changes: Any) -> Service:
    memory = MemoryPlan(0, 0, 0, 0, 1, 1000, 1000, 1, 16, 1000)
    options: dict[str, Any] = {
        "memory": memory,
        "step_time": SimpleTime(),
        "objectives": Objectives(1.0, 0.5),
        # Twenty tokens of prompt and eleven steps: 0.13 s alone.
        "trace": trace(
            num_requests=2000,
            continued=0.0,
            prompt=Lengths(20, 20, 0.0),
            output=Lengths(11, 11, 0.0),
        ),
        "max_streams": 1,
        "max_tokens": 100,
        "max_length": 600,
    }
    return Service(**{**options, **changes})


def test_the_rate_that_is_found_holds_and_a_larger_one_does_not() -> None:
    tried: list[float] = []
    rate, result = find_rate(service(), lambda rate: tried.append(rate))
    assert holds(result)
    # One stream at a time: 7.7 a second at most (refills take a little), less for waiting.
    assert 3 < rate < 1 / 0.13
    assert not holds(service().run(PRECISION**2 * rate))
    assert rate in tried


def test_no_rate_holds_an_impossible_objective() -> None:
    rate, result = find_rate(service(objectives=Objectives(0.02, 0.5)), lambda rate: None)
    assert not holds(result)
    # What a request takes alone is told, of all of them.
    assert rate < 0.01
    assert result.requests == 2000
    assert result.ttft.min == pytest.approx(0.030)


def test_a_run_that_fails_stops_early() -> None:
    result: Result = service().run(1000.0, stop_early=True)
    assert result.stopped
    assert not holds(result)
    assert result.requests < 200


def test_many_requests_take_seconds() -> None:
    load = trace(
        num_requests=20_000, num_users=10**6, output=Lengths(6, 20), rate=300.0, continued=0.3
    )
    machine = simulator(
        users=10**6, slots=5000, refills=True, pages=20_000, max_streams=64, max_tokens=512
    )
    machine._step_time = Roofline(model_size("llama-8b", 16), MACHINES["h100"])
    started = time.perf_counter()
    result = machine.run(load.arrivals())
    assert result.requests == 20_000
    assert time.perf_counter() - started < 20
    assert len(machine.scheduler.waiting) == 0
    machine.scheduler.check()


def plan(*more: str, model: str = SMOLLM, machine: str = "h100") -> int:
    return main(["plan", "--model", model, "--machine", machine, *more])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "deep" / "b.json"]
    for file in files:
        assert plan("--rate", "30", "--requests", "200", "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "roofline" in out
    assert "1,000,000 of 1,000,000 users are resident" in out
    found = [json.loads(file.read_text()) for file in files]
    for one in found:
        del one["served"]["scheduler_s_per_step_here"]
    assert found[0] == found[1]
    assert found[0]["basis"]["step_times"] == "roofline"
    assert found[0]["served"]["requests"] == 200
    assert found[0]["users"]["resident"] == 10**6


def test_the_command_with_measured_steps_looks_for_a_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bandwidth-gb-s", "40", "--tflops", "0.4", "--memory-gb", "8"]
    options += ["--measured", str(RESULTS / "decode.json"), "--requests", "60", "--users", "1000"]
    options += ["--max-streams", "16", "--step-tokens", "64", "--json", str(tmp_path / "a.json")]
    options += ["--output-tokens", "16", "--prompt-tokens", "16"]
    assert plan(*options, machine="custom") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["basis"]["step_times"] == "measured"
    assert found["served"]["holds"]
    assert found["machine"]["source"] == "as given"
    assert "too short to tell" in capsys.readouterr().out
    assert plan(*options, "--ttft", "0.001", machine="custom") == 0
    assert "no rate holds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0"], "--rate: expected more than 0"),
        (["--rate", "-1"], "--rate: expected more than 0"),
        (["--memory-gb", "0.25"], "does not fit"),
        (["--memory-gb", "0"], "memory of the machine: expected more than 0"),
        (["--bandwidth-gb-s", "nan"], "bandwidth of the machine"),
        (["--users", "0"], "num_users"),
        (["--requests", "0"], "num_requests"),
        (["--rank", "0"], "rank: expected at least 1"),
        (["--prompt-tokens", "0"], "--prompt-tokens: expected 1"),
        (["--output-tokens", "100000"], "--output-tokens: expected 1"),
        (["--max-length", "100000"], "--max-length: expected 2 to 8192"),
        (["--max-streams", "0"], "streams of a step"),
        (["--max-streams", "64", "--step-tokens", "32"], "streams of a step"),
        (["--page-size", "0"], "page"),
        (["--slots", "3"], "fewer than the 256 streams"),
        (["--ttft", "0"], "objective"),
        (["--overhead-ms", "-1"], "overhead"),
        (["--measured", "/nowhere.json"], "No such file"),
        (["--memory-gb", "0.5", "--users", "256", "--max-length", "8192"], "the longest request"),
    ],
)
def test_the_commands_errors(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--rate" not in options:
        options = [*options, "--rate", "1"]
    assert plan("--requests", "10", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("fssa: error:")
    assert message in error


def test_models_and_machines_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(model="nothing") == 1
    assert "llama-8b" in capsys.readouterr().err
    assert plan(machine="custom") == 1
    assert "--bandwidth-gb-s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan(machine="abacus")
