"""Steps that follow one another without Python: nobody's answer, turn or page depends on it."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fssa_runtime.engine.engine as engine_module
from fssa_kernels.native import MISSING, NATIVE
from fssa_runtime import LLM, AsyncEngine
from fssa_runtime.engine.engine import Engine
from fssa_runtime.engine.scheduler import Plan
from fssa_runtime.engine.step_inputs import MAX_STOP_TOKENS
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import Completion, Request, SamplingParams

from .asynchronous import LONG, accounted_llm, run, serving
from .conditioned import random_conditioning, small_model
from .simulated_cache import SimulatedCache

pytestmark = pytest.mark.skipif(NATIVE is None, reason=str(MISSING))

STOPS = frozenset({257})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("ahead") / "model")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine: what ends steps is never the time they take."""
    monkeypatch.setattr(engine_module, "MAX_SILENCE", math.inf)


def engine(model: LanguageModel, **changes: Any) -> Engine:
    limits = {"max_batch_size": 4, "max_kv_tokens": 256, "page_size": 4, **changes}
    tokenizer = model.copy_tokenizer()
    return Engine(model.decoder, STOPS, tokenizer=tokenizer, debug=True, **limits)


def counted(made: Engine) -> list[int]:
    """Steps of every run of the engine from now on."""
    original, steps = made.runner.run, []

    def counting(*arguments: Any) -> Any:
        result = original(*arguments)
        steps.append(len(result))
        return result

    made.runner.run = counting  # type: ignore[method-assign]
    return steps


def answers(
    model: LanguageModel, requests: Sequence[Request], **limits: Any
) -> list[list[Completion]]:
    asked = engine(model, **limits)
    result = asked.generate_all(requests)
    assert asked.scheduler.pool.num_free == asked.cache.num_pages
    assert len(asked) == 0
    return result


GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


def test_most_steps_follow_one_another(model: LanguageModel) -> None:
    asked = engine(model)
    steps = counted(asked)
    asked.generate([Request(list(b"hello"), sampling=GREEDY)])
    # The prompt and its token, then what is left.
    assert steps == [1, 16, 16, 7]
    one = engine(model, max_steps=1)
    steps = counted(one)
    one.generate([Request(list(b"hello"), sampling=GREEDY)])
    assert steps == [1] * 40


def test_there_is_at_least_one_step(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="max_steps: expected at least 1, got 0"):
        engine(model, max_steps=0)
    asked = engine(model, max_steps=1)
    assert len(asked.generate([Request(list(b"hello"), sampling=GREEDY)])[0].tokens) == 40


def test_a_single_step_is_what_step_computes_unasked(model: LanguageModel) -> None:
    asked = engine(model)
    steps = counted(asked)
    asked.add(Request(list(b"hello"), sampling=GREEDY))
    while len(asked):
        assert len(asked.step()) == 1
    assert steps == [1] * 40


SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 25),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, 255), max_size=MAX_STOP_TOKENS + 2).map(tuple),
    stop=st.sampled_from([(), (), (), ("a", "th"), ("q",)]),
    top_logprobs=st.sampled_from([0, 0, 0, 2]),
    min_tokens=st.sampled_from([0, 0, 0, 1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
)
REQUESTS = st.lists(
    st.builds(
        Request,
        st.lists(st.integers(0, 255), min_size=1, max_size=20),
        sampling=SAMPLING,
        n=st.sampled_from([1, 1, 1, 3]),
        priority=st.sampled_from([0, 0, 1]),
    ),
    min_size=1,
    max_size=9,
)
LIMITS = st.fixed_dictionaries(
    {
        "max_batch_size": st.integers(1, 5),
        "max_batch_tokens": st.integers(5, 40),
        "max_kv_tokens": st.sampled_from([64, 96, 256]),
        "page_size": st.sampled_from([1, 4, 16]),
        "prefix_cache": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(requests=REQUESTS, limits=LIMITS, max_steps=st.sampled_from([2, 5, 16]))
def test_answers_are_those_of_one_step_at_a_time(
    model: LanguageModel, requests: list[Request], limits: dict[str, Any], max_steps: int
) -> None:
    """Tokens, log-probabilities, texts and reasons, to the bit."""
    expected = answers(model, requests, max_steps=1, **limits)
    assert answers(model, requests, max_steps=max_steps, **limits) == expected


def test_users_are_served_as_often(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written counts as service, in whichever step it was written."""
    requests = [
        Request(list(b"abc"), sampling=replace(GREEDY, max_tokens=5 + 7 * index), tenant=index)
        for index in range(6)
    ]
    served = []
    for max_steps in (1, 16):
        asked = engine(model, max_steps=max_steps)
        count: Counter[Any] = Counter()
        original = asked.scheduler.waiting.serve

        def serve(tenant: Any, priority: int, tokens: int) -> None:
            count[tenant] += tokens  # noqa: B023
            original(tenant, priority, tokens)  # noqa: B023

        asked.scheduler.waiting.serve = serve  # type: ignore[method-assign]
        asked.generate(requests)
        served.append(count)
    assert served[0] == served[1]
    # The prompt's three tokens, and all written but the last.
    assert served[1] == {index: 3 + 4 + 7 * index for index in range(6)}


@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, stop=("zq",)),
        replace(GREEDY, top_logprobs=1),
        replace(GREEDY, repetition_penalty=1.1),
        replace(GREEDY, min_tokens=2),
        replace(GREEDY, stop_token_ids=tuple(range(230, 231 + MAX_STOP_TOKENS))),
    ],
    ids=["stop", "top_logprobs", "penalty", "min_tokens", "many-stops"],
)
def test_what_needs_a_look_at_every_token_gets_it(
    model: LanguageModel, sampling: SamplingParams
) -> None:
    """Whoever shares the batch goes step by step as well, and on alone afterwards."""
    asked = engine(model)
    steps = counted(asked)
    other = replace(sampling, max_tokens=10)
    asked.generate(
        [Request(list(b"hello"), sampling=GREEDY), Request(list(b"world"), sampling=other)]
    )
    assert steps[:10] == [1] * 10
    assert steps[10:] == [16, 14]


def test_forced_tokens_go_step_by_step(model: LanguageModel) -> None:
    asked = engine(model)
    steps = counted(asked)
    (scored,) = asked.generate([Request(list(b"abc"), forced_tokens=list(b"xyzzy"))])
    assert scored.tokens == list(b"xyzzy")
    assert steps == [1] * 5


def test_a_stop_token_ends_the_steps_with_its_own(model: LanguageModel) -> None:
    """Others lose nothing by it, and nothing is computed past it."""
    free = engine(model).generate([Request(list(b"hello"), sampling=GREEDY)])[0]
    place = next(i for i in range(3, 15) if free.tokens[i] not in free.tokens[:i])
    stops = replace(GREEDY, stop_token_ids=(free.tokens[place],))
    asked = engine(model)
    steps = counted(asked)
    stopped, other = asked.generate(
        [Request(list(b"hello"), sampling=stops), Request(list(b"world"), sampling=GREEDY)]
    )
    assert stopped.tokens == free.tokens[: place + 1]
    assert stopped.logprobs == free.logprobs[: place + 1]
    assert stopped.finish_reason == "stop"
    assert len(other.tokens) == 40
    assert steps[:2] == [1, place]


def test_stop_tokens_are_never_those_of_an_earlier_request(model: LanguageModel) -> None:
    """Of equal settings, on the same pages: forced tokens are stopped by none."""
    asked = engine(model, prefix_cache=False)
    free = asked.generate([Request(list(b"hello"), sampling=GREEDY)])[0]
    for stop in free.tokens[1:6]:
        other = Engine(model.decoder, frozenset({stop}), page_size=4, prefix_cache=False)
        plain = SamplingParams(max_tokens=40)
        ignoring = [Request(list(b"hello"), sampling=plain, forced_tokens=free.tokens[:6])]
        other.generate(ignoring)
        stopped = other.generate([Request(list(b"hello"), sampling=plain)])[0]
        assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert other.generate(ignoring)[0].tokens == free.tokens[:6]


def test_weights_that_become_no_numbers_end_their_own_answer(model: LanguageModel) -> None:
    with accounted_llm(model) as llm:
        ana, ben = (llm.users.weights(name) for name in ("ana", "ben"))
        requests = [Request(list(b"hello"), user, GREEDY) for user in (ana, ben)]
        expected = llm.engine.generate(requests)
        numbers = [llm.engine.add(request) for request in requests]
        llm.engine.step()
        slots = {a.request: a.slot for a in llm.engine._answers.values()}
        assert llm.engine.slots is not None
        table = llm.engine.slots._table
        before = table.rows[slots[numbers[0]]].clone()
        table.rows[slots[numbers[0]]] = math.nan
        events = []
        while numbers[0] in llm.engine:
            events += llm.engine.step(16)
        (failed,) = [e for e in events if e.request == numbers[0]]
        assert failed.finish_reason == "error"
        assert failed.error == "the model's log-probabilities are not numbers"
        table.rows[slots[numbers[0]]] = before
        while len(llm.engine):
            events += llm.engine.step(16)
        written = [e for e in events if e.request == numbers[1]]
        assert [e.token for e in written] == expected[1].tokens[1:]
        assert [e.logprob for e in written] == expected[1].logprobs[1:]


def test_an_interrupt_ends_steps_after_the_one_at_hand(model: LanguageModel) -> None:
    asked = engine(model)
    asked.add(Request(list(b"hello"), sampling=GREEDY))
    asked.step()
    asked.interrupt.set()
    assert len(asked.step(16)) == 1
    assert len(asked.step(16)) == 1
    asked.interrupt.clear()
    assert len(asked.step(16)) == 16


@pytest.mark.parametrize(("left", "expected"), [(-5.0, 0), (1e-9, 1), (1e9, 16)])
def test_no_step_passes_a_deadline(model: LanguageModel, left: float, expected: int) -> None:
    """An answer whose time is over ends before another step is computed for it."""
    now = 0.0
    asked = engine(model, clock=lambda: now)
    asked.add(Request(list(b"hello"), sampling=GREEDY, timeout=100.0))
    asked.step()
    now = 100.0 - left
    events = asked.step(16)
    assert len([event for event in events if event.token >= 0]) == expected
    assert (events[-1].finish_reason == "deadline") == (expected == 0)


def test_nobody_waits_long_for_what_was_chosen(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MAX_SILENCE", 0.0)
    asked = engine(model)
    steps = counted(asked)
    asked.generate([Request(list(b"hello"), sampling=GREEDY)])
    assert steps == [1] * 40


# ---- the scheduler's part


def writing(num_pages: int = 40) -> SimulatedCache:
    """Two streams, of prompts of 2 and of 3 tokens, that have written one of 9 and of 10 tokens."""
    sim = SimulatedCache(num_pages, 2, max_streams=3, reuse=False)
    sim.add([1, 1], 9)
    sim.add([1, 0, 1], 10)
    sim.step()
    return sim


def test_steps_end_with_the_first_last_token_and_have_their_pages() -> None:
    scheduler = writing().scheduler
    plan = scheduler.plan()
    assert scheduler.look_ahead(plan, 5) == 5
    assert scheduler.look_ahead(plan, 50) == 8
    # Computed are 2 and 3 tokens, and 8 will follow.
    assert [len(stream.pages) for stream in scheduler.running] == [5, 6]
    scheduler.check()


def test_one_step_where_somebody_reads_or_has_written_nothing() -> None:
    sim = writing()
    sim.add([1, 0], 9)
    assert sim.scheduler.look_ahead(sim.scheduler.plan(), 5) == 1
    sim = SimulatedCache(40, 2, max_streams=3, reuse=False)
    sim.add([1], 9)
    assert sim.scheduler.look_ahead(sim.scheduler.plan(), 5) == 1


def test_fewer_steps_where_pages_are_rare() -> None:
    """A page is left for each of those that run."""
    for num_pages, expected in ((12, 7), (9, 4), (8, 3), (7, 2), (6, 1), (40, 8)):
        scheduler = writing(num_pages).scheduler
        plan = scheduler.plan()
        free = scheduler.pool.num_free
        assert scheduler.look_ahead(plan, 50) == expected, num_pages
        taken = free - scheduler.pool.num_free
        assert taken == 0 or scheduler.pool.num_free >= 2
        scheduler.check()


def test_one_step_where_somebody_lost_their_pages() -> None:
    draw = random.Random(3)
    sim = SimulatedCache(8, 2, max_streams=4, max_tokens=4, reuse=False)
    for _ in range(12):
        sim.add([draw.randrange(2) for _ in range(draw.randint(1, 4))], draw.randint(2, 9))
    original, seen = sim.scheduler.look_ahead, Counter[tuple[bool, bool]]()

    def look_ahead(plan: Plan, most: int) -> int:
        steps = original(plan, most)
        assert steps == 1 or len(plan.pieces) == len(sim.scheduler.running)
        seen[bool(plan.preempted), steps > 1] += 1
        return steps

    sim.scheduler.look_ahead = look_ahead  # type: ignore[method-assign]
    sim.run(most=3)
    assert seen[True, False]
    assert seen[False, True]
    assert not seen[True, True]


# ---- who waits for the engine's thread


@pytest.fixture
def llm(model: LanguageModel) -> Iterator[LLM]:
    with accounted_llm(model) as made:
        yield made


def waits_for_a_knock(llm: LLM) -> tuple[threading.Event, list[int]]:
    """Every run that may be of several steps waits to be interrupted before it begins."""
    original, steps, begun = llm.engine.runner.run, [], threading.Event()

    def run(rows: Any, most: int = 1, seconds: float = math.inf) -> Any:
        if most > 1:
            begun.set()
            for _ in range(2000):
                if llm.engine.interrupt._view[0]:
                    break
                threading.Event().wait(0.005)
            else:
                raise AssertionError("nobody interrupted it")
        result = original(rows, most, seconds)
        if most > 1:
            steps.append(len(result))
        return result

    llm.engine.runner.run = run  # type: ignore[method-assign]
    return begun, steps


@pytest.mark.parametrize("what", ["request", "abort", "user", "close"])
def test_steps_end_for_whoever_wants_something(llm: LLM, what: str) -> None:
    begun, steps = waits_for_a_knock(llm)

    async def test() -> None:
        async with serving(llm) as serves:
            first = serves.stream("Why?", "ana", LONG, request_id="first")
            await first.start()
            await asyncio.to_thread(begun.wait, 60)
            other = serves.stream("How?", "ben", LONG)
            wish: asyncio.Future[Any] | None = None
            if what == "request":
                await other.start()
            elif what == "abort":
                assert serves.abort("first")
            elif what == "user":
                wish = asyncio.ensure_future(serves.set_latent("ben", torch.zeros(5)))
            else:
                wish = asyncio.ensure_future(serves.close())
            while not steps:
                await asyncio.sleep(0.005)
            del llm.engine.runner.run  # the class's own again
            if wish is not None:
                await wish
            first.abort()
            other.abort()

    run(test)
    assert steps[0] == 1
    assert not llm.engine.interrupt._view[0]


def test_who_comes_as_the_engine_closes_leaves_no_interrupt(llm: LLM) -> None:
    """Whoever runs this model's engine next would go step by step."""

    async def test() -> None:
        async with serving(llm) as serves:
            join = serves._thread.join

            def late(*arguments: Any) -> None:
                join(*arguments)
                llm.engine.interrupt.set()

            serves._thread.join = late  # type: ignore[method-assign]

    run(test)
    assert not llm.engine.interrupt._view[0]


def test_a_change_of_users_goes_on_after_every_step(model: LanguageModel) -> None:
    llm = LLM(model, random_conditioning(model, "gated"), max_batch_size=8, max_batch_tokens=64)
    choices = [("Why?", "a" * 20 + str(n), "b" * 30 + str(n)) for n in range(8)]
    steps = counted(llm.engine)

    async def test() -> None:
        async with AsyncEngine(llm) as serves:
            stream = serves.stream("Why?", sampling=LONG)
            await stream.__anext__()
            await serves.infer("cy", choices)
            stream.abort()

    run(test)
    # Two or fewer of the options are read in a piece, with a step between two pieces.
    assert steps.count(1) >= 8


def test_the_engine_s_thread_lets_steps_follow_one_another(llm: LLM) -> None:
    steps = counted(llm.engine)
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    (expected,) = llm.generate(["Why?"], "ana", sampling, progress=False)
    del steps[:]

    async def test() -> None:
        async with serving(llm) as serves:
            assert await serves.generate("Why?", "ana", sampling) == expected

    run(test)
    assert sum(steps) == 50
    assert max(steps) == 16
