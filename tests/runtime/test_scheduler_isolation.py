"""Whatever comes and goes, in whatever order: everybody reads its own, and everybody ends."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fssa_runtime.engine.stream import Stream
from fssa_runtime.errors import InputError

from .simulated_cache import SimulatedCache


def readers(sim: SimulatedCache) -> list[Stream]:
    """Those whose prompt is computed, so that it can be shared."""
    return [s for s in sim.scheduler.running if s.num_computed >= len(s.prompt) - 1 > 0]


@pytest.mark.parametrize("seed", range(12))
def test_a_long_rush_on_a_small_cache(seed: int) -> None:
    """The state machine below finds the shortest way to a fault; this one is always crowded."""
    draw = random.Random(seed)
    size = draw.randint(1, 5)
    sim = SimulatedCache(
        draw.randint(60, 90) // size, size, max_streams=8, max_tokens=12, reuse=seed % 3 > 0
    )
    expected: set[Stream] = set()
    counts: Counter[str] = Counter()
    now = 0.0
    for _ in range(1200):
        now += 1
        while len(sim.scheduler) < 12:
            parent = draw.choice([None, *readers(sim)])
            if parent is None:
                prompt = [draw.randrange(2) for _ in range(draw.randint(1, 20))]
                user = draw.choice([b"ana", b"ben", b"eve"])
            else:
                prompt, user = list(parent.prompt), parent.fingerprint
            for _ in range(1 if parent is None else 3):
                stream = sim.add(
                    prompt,
                    draw.randint(1, 20),
                    user,
                    priority=draw.choice([0, 0, 1]),
                    deadline=now + draw.randint(1, 99) if draw.random() < 0.1 else None,
                    parent=parent,
                )
                expected.add(stream)
                parent = parent and draw.choice([parent, stream])
        leaving = None
        if draw.random() < 0.1:
            stream = draw.choice(list(sim.scheduler.streams()))
            expected.discard(stream)
            if stream.deadline is None and draw.random() < 0.5:
                leaving = stream
            else:
                assert sim.scheduler.remove(stream)
        plan = sim.step(now, choose=lambda stream: draw.randrange(2), leaving=leaving)
        expected.difference_update(plan.expired)
        counts["copied"] += len(plan.copies)
        counts["preempted"] += len(plan.preempted)
        counts["expired"] += len(plan.expired)
        counts["in pieces"] += sum(not piece.writes for piece in plan.pieces)
        counts["left"] += leaving is not None
    if size == 1:
        del counts["copied"]  # no page is ever partly full
    assert min(counts.values()) > 0, counts
    assert (sim.scheduler.pool.stats.found > 0) == sim.scheduler.reuse
    sim.run(5000)
    assert set(sim.ended) == expected


# Few tokens, so that prompts often begin alike.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
USERS = st.sampled_from([b"ana", b"ben"])


class Sharing(RuleBasedStateMachine):
    """Anything in any order, on a cache that is too small; every step is checked."""

    @initialize(
        num_pages=st.integers(4, 12),
        page_size=st.integers(1, 4),
        max_streams=st.integers(1, 4),
        extra=st.integers(0, 8),
        reuse=st.booleans(),
    )
    def start(
        self, num_pages: int, page_size: int, max_streams: int, extra: int, reuse: bool
    ) -> None:
        self.sim = SimulatedCache(
            num_pages,
            page_size,
            max_streams=max_streams,
            max_tokens=max_streams + extra,
            reuse=reuse,
        )
        self.now = 0.0
        self.expected: set[Stream] = set()
        # Streams are numbered from the start of the process on, and an example is to be the same
        # whenever it is tried.
        self.before = Stream([0], 1).order

    def streams(self) -> list[Stream]:
        return list(self.sim.scheduler.streams())

    def _add(
        self,
        prompt: list[int],
        max_tokens: int,
        user: bytes,
        priority: int,
        patience: float | None,
        parent: Stream | None = None,
    ) -> None:
        deadline = None if patience is None else self.now + patience
        pool = self.sim.scheduler.pool
        if len(prompt) + max_tokens - 1 > pool.num_pages * pool.page_size:
            with pytest.raises(InputError, match="tokens of cache"):
                self.sim.add(prompt, max_tokens, user)
            return
        stream = self.sim.add(
            prompt, max_tokens, user, priority=priority, deadline=deadline, parent=parent
        )
        self.expected.add(stream)

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 9),
        user=USERS,
        priority=st.sampled_from([0, 0, 0, 1]),
        patience=st.none() | st.none() | st.integers(1, 20),
    )
    def add(
        self, prompt: list[int], max_tokens: int, user: bytes, priority: int, patience: float | None
    ) -> None:
        self._add(prompt, max_tokens, user, priority, patience)

    @precondition(lambda self: self.streams())
    @rule(
        data=st.data(),
        count=st.integers(1, 3),
        max_tokens=st.integers(1, 9),
        priority=st.sampled_from([0, 0, 0, 1]),
    )
    def fork(self, data: st.DataObject, count: int, max_tokens: int, priority: int) -> None:
        parent = data.draw(st.sampled_from(readers(self.sim) or self.streams()))
        for _ in range(count):
            self._add(list(parent.prompt), max_tokens, parent.fingerprint, priority, None, parent)

    @rule(count=st.integers(1, 3), data=st.data())
    def step(self, count: int, data: st.DataObject) -> None:
        for _ in range(count):
            self._step(data)

    @precondition(lambda self: self.streams())
    @rule(data=st.data())
    def step_while_one_leaves(self, data: st.DataObject) -> None:
        leaving = data.draw(st.sampled_from(self.streams()))
        if leaving.deadline is None:
            self.expected.discard(leaving)
            self._step(data, leaving)

    @precondition(lambda self: self.streams())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.streams()))
        assert self.sim.scheduler.remove(stream)
        self.expected.discard(stream)

    def _step(self, data: st.DataObject, leaving: Stream | None = None) -> None:
        tokens = data.draw(st.integers(0, 255), label="tokens")
        self.now += 1
        plan = self.sim.step(
            self.now,
            choose=lambda stream: tokens >> ((stream.order - self.before) % 8) & 1,
            leaving=leaving,
        )
        assert all(s.deadline is not None and s.deadline <= self.now for s in plan.expired)
        self.expected.difference_update(plan.expired)
        assert not any(s.deadline is not None and s.deadline <= self.now for s in self.streams())

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        streams = self.streams()
        num_tokens = sum(len(stream.prompt) + stream.max_tokens for stream in streams)
        self.sim.run(num_tokens + 1)
        assert set(self.sim.ended) == self.expected
        pool = self.sim.scheduler.pool
        assert pool.num_free == pool.num_pages


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
