"""Answers that share the pages of one prompt, each writing on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fssa_runtime.engine.stream import Stream

from .simulated_cache import SimulatedCache


def different(stream: Stream) -> int:
    """Answers to one prompt part ways at once."""
    return stream.order


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("length", range(1, 10))
def test_answers_to_one_prompt(length: int, reuse: bool) -> None:
    """Full pages are shared, the last is copied once for each who comes, if it is not full."""
    sim = SimulatedCache(60, 4, max_tokens=40, reuse=reuse)
    prompt = list(range(length))
    parent = sim.add(prompt, 9)
    sim.step(choose=different)
    children = [sim.add(prompt, 9, parent=parent) for _ in range(3)]
    plan = sim.step(choose=different)
    num_full, rest = divmod(length - 1, 4)
    assert [(p.stream, p.num_tokens) for p in plan.pieces] == [(s, 1) for s in (parent, *children)]
    assert all(child.num_cached == length - 1 for child in children)
    assert all(child.pages[:num_full] == parent.pages[:num_full] for child in children)
    own = [set(stream.pages[num_full:]) for stream in (parent, *children)]
    assert len(set().union(*own)) == sum(map(len, own))
    copied = [(parent.pages[num_full], child.pages[num_full]) for child in children]
    assert plan.copies == (copied if rest else [])
    plans = sim.run_until(lambda: len(sim.ended) == 4, choose=different)
    assert not any(plan.copies for plan in plans)
    assert {tuple(stream.written) for stream in sim.ended} == {
        (stream.order,) * 9 for stream in (parent, *children)
    }
    assert sim.scheduler.pool.num_free == 60


def test_a_copy_of_a_copy_is_made_of_the_first() -> None:
    sim = SimulatedCache(60, 4, max_tokens=40, reuse=False)
    parent = sim.add([1, 2, 3], 9)
    sim.step()
    child = sim.add([1, 2, 3], 9, parent=parent)
    grandchild = sim.add([1, 2, 3], 9, parent=child)
    plan = sim.step()
    assert plan.copies == [
        (parent.pages[0], child.pages[0]),
        (parent.pages[0], grandchild.pages[0]),
    ]
    sim.run()


def test_a_page_that_is_one_s_own_is_not_copied() -> None:
    """The parent writes on where it is, before and after its child came and went."""
    sim = SimulatedCache(60, 4, max_tokens=40)
    parent = sim.add([1, 2], 12)
    sim.step()
    pages = list(parent.pages)
    child = sim.add([1, 2], 1, parent=parent)
    assert len(sim.step().copies) == 1
    assert sim.ended == [child]
    assert parent.pages == pages
    assert not any(plan.copies for plan in sim.run_until(lambda: parent in sim.ended))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("how", ["removed", "finished", "preempted", "expired", "not there yet"])
def test_a_parent_that_cannot_share(how: str, reuse: bool) -> None:
    sim = SimulatedCache(8, 2, max_streams=3, max_tokens=4, reuse=reuse)
    prompt = [1, 2, 3, 4, 5]
    elder = sim.add([7], 14, b"ben")
    parent = sim.add(
        prompt, 1 if how == "finished" else 10, deadline=9.0 if how == "expired" else None
    )
    if how == "preempted":
        sim.run_until(lambda: parent.num_preempted)
    elif how != "not there yet":
        sim.run_until(lambda: parent.written)
    child = sim.add(prompt, 2, parent=parent)
    if how == "removed":
        sim.scheduler.remove(parent)
    plans = sim.run_until(lambda: child in sim.ended, now=9.0)
    assert not any(plan.copies for plan in plans)
    sim.run()
    assert elder in sim.ended
    assert sim.scheduler.pool.num_free == 8


@pytest.mark.parametrize(("num_pages", "fork"), [(4, True), (5, False)])
def test_a_newcomer_leaves_a_page_for_each_who_runs(num_pages: int, fork: bool) -> None:
    """It would fit beside the first if that needed no other page: whether it will is not known."""
    sim = SimulatedCache(num_pages, 2, max_tokens=40, reuse=False)
    first = sim.add([1, 2, 3, 4], 5)
    sim.step()
    newcomer = sim.add([1, 2, 3, 4], 1, parent=first if fork else None)
    assert [piece.stream for piece in sim.step().pieces] == [first]
    sim.run()
    assert newcomer.num_preempted == 0


def test_a_child_knows_nothing_of_what_its_parent_wrote() -> None:
    sim = SimulatedCache(60, 2, max_tokens=40)
    parent = sim.add([1, 2, 3], 20)
    sim.run_until(lambda: len(parent.written) > 8, choose=different)
    sim.add([1, 2, 3], 20, parent=parent)
    sim.run_until(lambda: len(sim.ended) == 2, choose=different)


def test_what_was_shared_outlives_who_shared_it() -> None:
    sim = SimulatedCache(60, 2, max_tokens=40, reuse=False)
    parent = sim.add([1, 2, 3, 4], 9)
    sim.step()
    child = sim.add([1, 2, 3, 4], 9, parent=parent)
    sim.step(choose=different)
    sim.scheduler.remove(parent)
    sim.add([9] * 30, 9, b"ben")  # would write on what was given away
    sim.run()
    assert child in sim.ended


def hold_a_page_too_often(sim: SimulatedCache, stream: Stream) -> None:
    sim.scheduler.pool.retain(stream.pages[0])


def lose_a_page(sim: SimulatedCache, stream: Stream) -> None:
    stream.pages.pop()


def share_a_page_that_is_written(sim: SimulatedCache, stream: Stream) -> None:
    other = sim.add([7], 5, b"ben")
    sim.step()
    assert other.num_computed == 1
    sim.scheduler.pool.retain(stream.pages[0])
    sim.scheduler.pool.release(other.pages[0])
    other.pages[0] = stream.pages[0]


def keep_what_was_computed(sim: SimulatedCache, stream: Stream) -> None:
    sim.add([7], 5).num_computed = 1


@pytest.mark.parametrize(
    "fault",
    [
        hold_a_page_too_often,
        lose_a_page,
        share_a_page_that_is_written,
        keep_what_was_computed,
    ],
)
def test_check_notices(fault: Callable[[SimulatedCache, Stream], None]) -> None:
    sim = SimulatedCache(reuse=False)
    stream = sim.add([1, 2, 3], 5)
    sim.step()
    sim.scheduler.check()
    fault(sim, stream)
    with pytest.raises(AssertionError):
        sim.scheduler.check()
