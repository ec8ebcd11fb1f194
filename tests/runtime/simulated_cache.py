"""A scheduler over a cache that remembers what was written: isolation shown without a model.

Keys and values at a position depend on the weights and on all tokens up to it. So the cache holds,
for each position of each page, (fingerprint, those tokens), and whoever attends must find its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fssa_runtime.engine.page_pool import PagePool, page_keys
from fssa_runtime.engine.scheduler import Plan, Scheduler
from fssa_runtime.engine.stream import Stream

Content = tuple[bytes, tuple[int, ...]]


def importance(stream: Stream) -> tuple[int, int]:
    """Who keeps its pages: the smallest first."""
    return -stream.priority, stream.order


class SimulatedCache:
    """Steps of a scheduler, each checked.

    Attributes:
        ended: streams that wrote all they may.
    """

    def __init__(
        self,
        num_pages: int = 16,
        page_size: int = 2,
        *,
        max_streams: int = 8,
        max_tokens: int = 8,
        max_length: int = 1000,
        reuse: bool = True,
    ) -> None:
        self.scheduler = Scheduler(
            PagePool(num_pages, page_size),
            max_streams=max_streams,
            max_tokens=max_tokens,
            max_length=max_length,
            reuse=reuse,
        )
        self.pages: list[list[Content | None]] = [[None] * page_size for _ in range(num_pages)]
        self.ended: list[Stream] = []

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1,
        user: bytes = b"ana",
        *,
        priority: int = 0,
        deadline: float | None = None,
        parent: Stream | None = None,
    ) -> Stream:
        stream = Stream(
            prompt,
            max_tokens,
            fingerprint=user,
            tenant=user,
            priority=priority,
            deadline=deadline,
            parent=parent,
        )
        self.scheduler.add(stream)
        return stream

    def step(
        self,
        now: float = 0.0,
        *,
        choose: Callable[[Stream], int] = lambda stream: len(stream.written) % 2,
        leaving: Stream | None = None,
        most: int = 1,
    ) -> Plan:
        """Plan, compute, choose; up to ``most`` times, as far as steps may follow one another.

        ``leaving`` is removed while the step runs.
        """
        scheduler = self.scheduler
        before = list(scheduler.running)
        plan = scheduler.plan(now)
        scheduler.check()
        self._check_plan(plan, before)
        steps = 1 if most == 1 else scheduler.look_ahead(plan, most)
        scheduler.check()
        # All are read before one is written, as an indexed copy does.
        content = [list(self.pages[source]) for source, _ in plan.copies]
        for (_, to), copied in zip(plan.copies, content, strict=True):
            self.pages[to] = copied
        num_ended = len(self.ended)
        for number in range(steps):
            assert len(self.ended) == num_ended, "a step follows an end"
            if number > 0:
                scheduler.repeat(plan)
            self._compute(plan, choose, leaving)
        for page in scheduler.pool.unused():
            self.pages[page] = [None] * scheduler.pool.page_size
        return plan

    def _compute(self, plan: Plan, choose: Callable[[Stream], int], leaving: Stream | None) -> None:
        scheduler = self.scheduler
        rows = [
            (piece.stream, piece.stream.num_computed, piece.num_tokens, list(piece.stream.pages))
            for piece in plan.pieces
        ]
        if leaving is not None:
            assert scheduler.remove(leaving)
        for stream, start, count, pages in rows:
            self._write(stream, start, count, pages)
        for stream, start, count, pages in rows:
            self._read(stream, start + count, pages)
        scheduler.computed(plan)
        scheduler.check()
        self._check_keys()
        for piece in plan.pieces:
            if piece.writes and piece.stream is not leaving:
                self._choose(piece.stream, choose(piece.stream))
        scheduler.check()

    def run_until(
        self,
        reached: Callable[[], object],
        now: float = 0.0,
        *,
        choose: Callable[[Stream], int] = lambda stream: len(stream.written) % 2,
        max_steps: int = 1000,
        most: int = 1,
    ) -> list[Plan]:
        """Step until something is so; the steps."""
        plans = []
        while not reached():
            assert len(plans) < max_steps, f"not reached, {len(self.scheduler)} streams are left"
            plans.append(self.step(now, choose=choose, most=most))
        return plans

    def run(self, max_steps: int = 1000, most: int = 1) -> None:
        """Step until nobody is left."""
        self.run_until(lambda: not len(self.scheduler), max_steps=max_steps, most=most)

    def _choose(self, stream: Stream, token: int) -> None:
        stream.written.append(token)
        if len(stream.written) == stream.max_tokens:
            assert self.scheduler.remove(stream)
            self.ended.append(stream)

    def _write(self, stream: Stream, start: int, count: int, pages: list[int]) -> None:
        size = self.scheduler.pool.page_size
        for position in range(start, start + count):
            known = (stream.fingerprint, tuple(stream.tokens(0, position + 1)))
            self.pages[pages[position // size]][position % size] = known

    def _read(self, stream: Stream, stop: int, pages: list[int]) -> None:
        size = self.scheduler.pool.page_size
        for position in range(stop):
            expected = (stream.fingerprint, tuple(stream.tokens(0, position + 1)))
            assert self.pages[pages[position // size]][position % size] == expected

    def _check_keys(self) -> None:
        """What is known of pages is true."""
        pool = self.scheduler.pool
        for page, key in pool._keys.items():
            content = self.pages[page][-1]
            assert content is not None
            fingerprint, tokens = content
            assert len(tokens) % pool.page_size == 0
            assert page_keys(fingerprint, tokens, pool.page_size)[-1] == key

    def _check_plan(self, plan: Plan, before: list[Stream]) -> None:
        scheduler = self.scheduler
        planned = [piece.stream for piece in plan.pieces]
        assert plan.pieces or not len(scheduler), "nobody goes on"
        assert plan.num_tokens <= scheduler.max_tokens
        assert len(set(planned)) == len(planned) <= scheduler.max_streams
        assert set(planned) <= set(scheduler.running)
        for piece in plan.pieces:
            assert 1 <= piece.num_tokens <= piece.stream.num_pending
            assert piece.writes == (piece.num_tokens == piece.stream.num_pending)
        for stream in set(before) & set(scheduler.running):
            assert stream in planned or stream.num_pending > 1, "one who writes was left out"
        for stream in plan.preempted:
            assert not stream.pages
            assert stream.num_computed == 0
            assert all(importance(stream) > importance(other) for other in scheduler.running)
        assert not set(plan.expired) & set(scheduler.streams())
        sources = {source for source, _ in plan.copies}
        targets = [to for _, to in plan.copies]
        assert len(set(targets)) == len(targets)
        assert not sources & set(targets), "the order of the copies matters"
        held = [page for stream in scheduler.running for page in stream.pages]
        assert all(held.count(to) == 1 for to in targets)
        assert sources <= set(held), "a page is copied that was given away"
