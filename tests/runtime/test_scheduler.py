"""The policy of a step: whose tokens, on which pages, and who makes room."""

from __future__ import annotations

import math
import random

import pytest

from fssa_runtime.engine.page_pool import PagePool
from fssa_runtime.engine.scheduler import Scheduler
from fssa_runtime.engine.stream import Stream
from fssa_runtime.errors import InputError

from .simulated_cache import SimulatedCache


@pytest.mark.parametrize("most", [1, 3, 16])
@pytest.mark.parametrize("reuse", [False, True])
def test_everybody_finishes(reuse: bool, most: int) -> None:
    draw = random.Random(1)
    sim = SimulatedCache(12, 2, max_streams=5, max_tokens=7, reuse=reuse)
    streams = [
        sim.add(
            [draw.randrange(2) for _ in range(draw.randint(1, 12))],
            draw.randint(1, 10),
            draw.choice([b"heavy"] * 9 + [b"light"]),
            priority=draw.choice([0, 0, 1]),
        )
        for _ in range(150)
    ]
    # The most important of those that run goes on in every step.
    sim.run(sum(len(stream.prompt) + stream.max_tokens for stream in streams), most)
    assert set(sim.ended) == set(streams)
    assert sim.scheduler.pool.num_free == 12


def test_a_light_user_does_not_wait_for_a_heavy_one() -> None:
    sim = SimulatedCache(max_streams=2, reuse=False)
    heavy = [sim.add([1] * 4, 4, b"heavy") for _ in range(300)]
    for _ in range(50):
        sim.step()
    light = sim.add([1] * 4, 4, b"light")
    for _ in range(10):
        sim.step()
    assert light in sim.ended
    assert len(sim.ended) < len(heavy) / 4


def test_streams_admitted_in_one_step_are_of_all_users() -> None:
    sim = SimulatedCache(max_streams=4, max_tokens=8, reuse=False)
    for _ in range(10):
        sim.add([1, 1], 9, b"heavy")
    for _ in range(2):
        sim.add([1, 1], 9, b"light")
    plan = sim.step()
    assert sorted(piece.stream.tenant for piece in plan.pieces) == [b"heavy"] * 2 + [b"light"] * 2


def test_what_is_written_counts_as_service() -> None:
    sim = SimulatedCache(40, 2, max_streams=2, reuse=False)
    for _ in range(200):
        sim.add([1], 20, b"long")
        sim.add([1], 2, b"short")
    for _ in range(400):
        sim.step()
    written = {user: 0 for user in (b"long", b"short")}
    for stream in sim.ended:
        written[stream.fingerprint] += stream.max_tokens
    assert written[b"long"] == pytest.approx(written[b"short"], rel=0.2)


def test_priority_is_admitted_first() -> None:
    sim = SimulatedCache(max_streams=1, reuse=False)
    streams = [sim.add([1], 1, priority=priority) for priority in (0, 2, 1, 2)]
    sim.run()
    assert sim.ended == [streams[index] for index in (1, 3, 2, 0)]


def test_who_writes_goes_before_prompts_and_pieces_add_up() -> None:
    sim = SimulatedCache(40, 2, max_streams=3, max_tokens=4, reuse=False)
    writers = [sim.add([1], 30, b"ana"), sim.add([2], 30, b"ben")]
    sim.step()
    long = sim.add(list(range(11)), 2, b"eve")
    plans = sim.run_until(lambda: long.written)
    for plan in plans:
        assert [piece.stream for piece in plan.pieces if piece.writes][:2] == writers
    counts = [piece.num_tokens for plan in plans for piece in plan.pieces if piece.stream is long]
    assert counts == [2, 2, 2, 2, 2, 1]
    assert [len(stream.written) for stream in writers] == [7, 7]


def test_budget_left_by_one_prompt_goes_to_the_next() -> None:
    sim = SimulatedCache(40, 2, max_tokens=10, reuse=False)
    first, second = sim.add([1] * 7), sim.add([2] * 9)
    plan = sim.step()
    assert [(p.stream, p.num_tokens, p.writes) for p in plan.pieces] == [
        (first, 7, True),
        (second, 3, False),
    ]
    plan = sim.step()
    assert [(p.stream, p.num_tokens, p.writes) for p in plan.pieces] == [(second, 6, True)]


@pytest.mark.parametrize("reuse", [False, True])
def test_two_that_need_the_whole_cache_finish_one_after_the_other(reuse: bool) -> None:
    sim = SimulatedCache(6, 2, reuse=reuse)
    streams = [sim.add([user] * 3, 10, bytes([user])) for user in range(2)]
    sim.run(60)
    assert sim.ended == streams
    assert streams[0].num_preempted == 0
    assert streams[1].num_preempted > 0


def test_the_least_important_and_youngest_makes_room() -> None:
    sim = SimulatedCache(8, 2, max_tokens=32, reuse=False)
    old = sim.add([1], 12, b"1")
    dull = sim.add([2], 12, b"2", priority=-1)
    young = sim.add([3], 12, b"3")
    plans = sim.run_until(lambda: old in sim.ended)
    order = [stream for plan in plans for stream in plan.preempted]
    assert order[0] is dull
    assert young in order
    assert old not in order
    sim.run()
    assert len(sim.ended) == 3


def test_who_is_preempted_keeps_what_it_wrote_and_computes_all_again() -> None:
    sim = SimulatedCache(5, 2, max_tokens=16, reuse=False)
    sim.add([1], 10, b"1")
    young = sim.add([2, 2], 7, b"2")
    sim.run_until(lambda: young.num_preempted)
    written = list(young.written)
    assert written
    plans = sim.run_until(lambda: len(young.written) > len(written))
    counts = [piece.num_tokens for plan in plans for piece in plan.pieces if piece.stream is young]
    assert sum(counts) == 2 + len(written)
    sim.run()
    assert young.written[: len(written)] == written
    assert len(young.written) == 7


def test_who_is_preempted_goes_before_its_user_s_others() -> None:
    sim = SimulatedCache(5, 2, max_tokens=16, reuse=False)
    sim.add([1], 10, b"ben")
    young, other = sim.add([2, 2], 7, b"ana"), sim.add([2, 2], 7, b"ana")
    sim.run()
    assert young.num_preempted > 0
    assert sim.ended.index(young) < sim.ended.index(other)


def test_the_end_of_a_text_is_given_up_first() -> None:
    sim = SimulatedCache(6, 2, max_tokens=16)
    sim.add(list(range(9)), 1, b"ana")
    sim.run()
    sim.add([9] * 6, 1, b"ben")  # takes the two pages left and one that is known
    sim.run()
    again = sim.add(list(range(9)), 1, b"ana")
    sim.step()
    assert again.num_cached == 6


def test_an_important_newcomer_waits_for_pages_but_not_for_others() -> None:
    sim = SimulatedCache(4, 2, max_tokens=16, reuse=False)
    sim.add([1] * 6, 3, b"1")
    sim.step()
    small, large = sim.add([1], 1, b"2"), sim.add([2] * 5, 1, b"3", priority=1)
    sim.run()
    assert sim.ended.index(large) < sim.ended.index(small)


def test_deadlines() -> None:
    sim = SimulatedCache(max_streams=1, reuse=False)
    runs, waits = sim.add([1], 20, deadline=5.0), sim.add([1], 20, deadline=3.0)
    last, gone = sim.add([1], 2), sim.add([1], 2, deadline=4.0)
    assert not sim.step(2.9).expired
    assert sim.scheduler.remove(gone)
    assert sim.step(3.0).expired == [waits]
    assert sim.step(4.0).expired == []
    plan = sim.step(5.0)
    assert plan.expired == [runs]
    assert [piece.stream for piece in plan.pieces] == [last]
    sim.run()
    assert sim.scheduler.pool.num_free == 16


def test_deadlines_of_finished_streams_are_not_kept() -> None:
    sim = SimulatedCache()
    kept = sim.add([1], 1, deadline=9.0)
    for _ in range(1000):
        sim.scheduler.remove(sim.add([1], 1, deadline=1e9))
    assert len(sim.scheduler._deadlines) < 200
    assert sim.step(9.0).expired == [kept]


@pytest.mark.parametrize("state", ["waiting", "reading", "writing", "preempted", "over", "unknown"])
def test_a_stream_is_removed_in_every_state(state: str) -> None:
    sim = SimulatedCache(5, 2, max_streams=3, max_tokens=4, reuse=False)
    sim.add([1], 10, b"1")
    stream = sim.add([2] * (6 if state == "reading" else 2), 1 if state == "over" else 5, b"2")
    if state in ("reading", "writing"):
        sim.step()
        assert stream.num_computed > 0
        assert (stream.num_pending > 1) == (state == "reading")
    elif state == "preempted":
        sim.run_until(lambda: stream.num_preempted)
    elif state == "over":
        sim.run()
    elif state == "unknown":
        stream = Stream([2], 1)
    assert sim.scheduler.remove(stream) == (state not in ("over", "unknown"))
    assert not sim.scheduler.remove(stream)
    assert not stream.pages
    sim.scheduler.check()
    sim.run()
    assert sim.scheduler.pool.num_free == 5
    assert len(sim.ended) == (2 if state in ("over", "unknown") else 1)


def test_a_stream_that_leaves_while_its_step_runs_gets_nothing() -> None:
    sim = SimulatedCache()
    first, second = sim.add([1] * 3, 5, b"1"), sim.add([2] * 3, 5, b"2")
    sim.step(leaving=first)
    assert (first.pages, first.num_computed, first.written) == ([], 0, [])
    sim.run()
    assert sim.ended == [second]


@pytest.mark.parametrize(
    ("stream", "error", "match"),
    [
        (Stream([], 1), InputError, "prompt is empty"),
        (Stream([1], 0), InputError, "max_tokens"),
        (Stream([1] * 15, 6), InputError, "21 positions, the model has 20"),
        (Stream([1] * 10, 8), InputError, "18 tokens of cache, it holds 16"),
        (Stream([1], 1, deadline=math.nan), InputError, "deadline"),
        (Stream([1], 1, tenant=[]), TypeError, "unhashable"),
        (Stream([1], 1, b"ana", parent=Stream([1], 1, b"ben")), ValueError, "fingerprint"),
        (Stream([1], 1, b"ana", parent=Stream([2], 1, b"ana")), ValueError, "same prompt"),
    ],
)
def test_a_stream_that_cannot_be_leaves_nothing(
    stream: Stream, error: type[Exception], match: str
) -> None:
    sim = SimulatedCache(8, 2, max_length=20)
    with pytest.raises(error, match=match):
        sim.scheduler.add(stream)
    assert len(sim.scheduler) == 0
    assert not sim.scheduler._deadlines
    assert not sim.step(1e9).expired
    fits = sim.add([1] * 10, 7)  # the last token is never computed
    sim.run()
    assert sim.ended == [fits]


@pytest.mark.parametrize(("max_streams", "max_tokens"), [(0, 4), (5, 4)])
def test_limits_that_cannot_be(max_streams: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="max_streams"):
        Scheduler(PagePool(2, 2), max_streams=max_streams, max_tokens=max_tokens, max_length=9)


def test_pages_are_found_again_under_the_same_weights_only() -> None:
    sim = SimulatedCache(40, 2, max_tokens=40)
    prompt = list(range(9))
    for user, length, expected in (
        (b"ana", 9, 0), (b"ben", 9, 0), (b"ana", 9, 8), (b"ana", 8, 6), (b"ana", 1, 0)
    ):  # fmt: skip
        # The newest token is computed in any case.
        stream = sim.add(prompt[:length], 1, user)
        plan = sim.step()
        assert stream.num_cached == expected
        assert [piece.num_tokens for piece in plan.pieces] == [length - expected]
    assert sim.scheduler.pool.stats.looked_up == 8 * 3 + 6
    assert sim.scheduler.pool.stats.found == 8 + 6


def test_an_answer_is_found_again_as_the_beginning_of_a_prompt() -> None:
    sim = SimulatedCache(40, 2, max_tokens=40)
    first = sim.add([5, 6, 7], 6)
    sim.run()
    stream = sim.add([5, 6, 7, *first.written, 8], 1)
    sim.step()
    assert stream.num_cached == 8  # the ninth, the last it wrote, was never computed


def test_those_who_run_share_full_pages() -> None:
    sim = SimulatedCache(40, 2, max_tokens=40)
    first = sim.add(list(range(7)), 5)
    sim.step()
    second, other = sim.add(list(range(7)), 5), sim.add(list(range(7)), 5, b"ben")
    assert not sim.step().copies
    assert second.pages[:3] == first.pages[:3]
    assert not set(second.pages[3:]) & set(first.pages)
    assert not set(other.pages) & set(first.pages + second.pages)
    assert sim.scheduler.pool.num_free == 40 - (4 + 1 + 4)


def test_a_stream_that_waits_is_looked_up_once() -> None:
    sim = SimulatedCache(6, 2, max_tokens=40)
    sim.add([1] * 4, 4)
    sim.step()
    sim.add([1] * 9, 1)
    sim.run()
    assert sim.scheduler.pool.stats.looked_up == 2 + 8
    assert sim.scheduler.pool.stats.found == 4
