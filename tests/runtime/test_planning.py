"""The simulator: arithmetic by hand, the clock, fairness."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fssa_runtime.engine.stream import Stream
from fssa_runtime.errors import InputError
from fssa_runtime.planning.machine import MACHINES, Roofline, Step
from fssa_runtime.planning.memory import plan_memory
from fssa_runtime.planning.shapes import model_size
from fssa_runtime.planning.sketch import Sketch
from fssa_runtime.planning.slots import SlotTable
from fssa_runtime.planning.trace import Arrival, Lengths

from .planned import SMOLLM, SimpleTime, simulator, trace


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
    assert not machine._slots._users.num_referred


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
