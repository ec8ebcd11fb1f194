"""Which streams compute what in the next step, on which pages: policy only, no tensors, no clock.

A step has a budget of tokens. Streams that write get theirs first, one each, so that a long prompt
does not make others wait; what is left goes to prompts, in pieces. Streams wait while rows or pages
are lacking, and are admitted by priority, then fairly between tenants, then in order of arrival.
When a running stream needs a page and there is none, the least important one loses its pages and
waits again; a step in which nothing can run cannot be, since `add` refuses what does not fit alone.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import InputError
from .fair_queue import FairQueue
from .page_pool import PagePool, extend_keys
from .stream import Stream


class Piece(NamedTuple):
    """A stream's part of a step: ``num_tokens`` of its pending ones.

    ``writes``: the step ends with the stream's newest token, so a next one is chosen.
    """

    stream: Stream
    num_tokens: int
    writes: bool


@dataclass
class Plan:
    """A step: what is computed, and what has to happen before.

    Attributes:
        pieces: at most one a stream, of at least one token.
        copies: (from, to) pages whose content is copied before the step, for a page that two
            streams share is not written. No page is both, so their order is free.
        expired: streams whose deadline has passed; they are out already.
        preempted: streams that lost their pages.
    """

    pieces: list[Piece] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    expired: list[Stream] = field(default_factory=list)
    preempted: list[Stream] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


def _place(stream: Stream) -> tuple[int, int]:
    """Where a running stream stands among the others."""
    return -stream.priority, stream.order


class Scheduler:
    """Streams waiting and running, over one pool of pages.

    Args:
        pool: the pages.
        max_streams: streams of one step at most. max_tokens: tokens of one step at most.
        max_length: tokens of one stream at most, its answer included.
        reuse: look for computed pages of equal content when a stream is admitted.

    Attributes:
        running: streams with pages, the important and the old first.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_streams: int,
        max_tokens: int,
        max_length: int,
        reuse: bool = True,
    ) -> None:
        if not 1 <= max_streams <= max_tokens:
            raise ValueError(
                f"expected 1 <= max_streams <= max_tokens, got {max_streams} and {max_tokens}"
            )
        self.pool = pool
        self.max_streams = max_streams
        self.max_tokens = max_tokens
        self.max_length = max_length
        self.reuse = reuse
        self.waiting: FairQueue[Stream] = FairQueue()
        self.running: list[Stream] = []
        self._deadlines: list[tuple[float, int, Stream]] = []

    def __len__(self) -> int:
        """Streams waiting and running."""
        return len(self.waiting) + len(self.running)

    def add(self, stream: Stream) -> None:
        """Let a stream wait.

        Raises:
            InputError: see `check_stream`; nothing is kept of it.
            ValueError: its parent's prompt or weights are not its own.
        """
        self.check_stream(stream)
        parent = stream.parent
        if parent is not None and (
            parent.fingerprint != stream.fingerprint or list(parent.prompt) != list(stream.prompt)
        ):
            raise ValueError("parent: expected the same prompt and fingerprint as the stream's")
        self.waiting.add(stream, stream.tenant, stream.priority)
        if stream.deadline is not None:
            if len(self._deadlines) > 2 * len(self) + 100:  # most are of streams long gone
                self._deadlines = [
                    (other.deadline, other.order, other)
                    for other in self.streams()
                    if other.deadline is not None and other is not stream
                ]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (stream.deadline, stream.order, stream))

    def check_stream(self, stream: Stream) -> None:
        """Raise InputError if a stream could never run.

        It has no prompt, no room for one token, or is longer than the model or the cache; or its
        deadline is not a number.
        """
        if not stream.prompt:
            raise InputError("the prompt is empty")
        if stream.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {stream.max_tokens}")
        if stream.deadline is not None and math.isnan(stream.deadline):
            raise InputError("the deadline must be a number, got nan")
        total = len(stream.prompt) + stream.max_tokens
        if total > self.max_length:
            raise InputError(
                f"prompt and answer need {total} positions, the model has {self.max_length}"
            )
        # The last token is written, but never computed.
        if self.pool.pages_for(total - 1) > self.pool.num_pages:
            raise InputError(
                f"prompt and answer need {total} tokens of cache, "
                f"it holds {self.pool.num_pages * self.pool.page_size}"
            )

    def remove(self, stream: Stream) -> bool:
        """Take a stream out, whatever its state; whether it was in."""
        if any(other is stream for other in self.running):
            self.running = [other for other in self.running if other is not stream]
            self._release(stream)
            self.waiting.leave(stream.tenant, stream.priority)
            return True
        return self.waiting.remove(stream, stream.tenant, stream.priority)

    def plan(self, now: float = 0.0) -> Plan:
        """The next step. Pages it writes are reserved; call `computed` when it has run."""
        plan = Plan()
        self._expire(plan, now)
        budget = self.max_tokens
        # Those that come first make the others give up room for them.
        pieces: dict[int, Piece] = {}
        pending = [(stream, stream.num_pending) for stream in self.running]
        writing = [pair for pair in pending if pair[1] == 1]
        reading = [pair for pair in pending if pair[1] > 1]
        for stream, num_pending in (*writing, *reading):
            count = min(budget, num_pending)
            if count and stream not in plan.preempted and self._reserve(stream, count, plan):
                pieces[id(stream)] = Piece(stream, count, count == num_pending)
                budget -= count
        # A stream may have lost its pages to one that was planned after it.
        plan.pieces = [pieces[id(s)] for s in self.running if id(s) in pieces]
        for stream, count, _ in plan.pieces:
            self.waiting.serve(stream.tenant, stream.priority, count)
        if not plan.preempted:
            self._admit(plan, budget)
        return plan

    def look_ahead(self, plan: Plan, most: int) -> int:
        """How many steps may follow one another like the plan's, with one plan for all: 1 to
        ``most``. Pages for them are reserved.

        More than one where every running stream writes a token, not its first, and none comes to
        its last token or needs a page before the last step that others might want.
        """
        pieces = plan.pieces
        if plan.preempted:
            return 1
        for stream, num_tokens, writes in pieces:
            if not writes or num_tokens > 1 or not stream.written:
                return 1
            most = min(most, stream.max_tokens - len(stream.written))
        # One page is left for each, as where a newcomer is let in.
        free = max(0, self.pool.num_free - len(self.running))
        while most > 1 and free < sum(
            max(0, self.pool.pages_for(stream.num_computed + most) - len(stream.pages))
            for stream, _, _ in pieces
        ):
            most -= 1
        for stream, _, _ in pieces:
            self._reserve(stream, most, plan)
        return most

    def repeat(self, plan: Plan) -> None:
        """The plan's step runs once more: its tenants are served as `plan` served them."""
        for stream, count, _ in plan.pieces:
            self.waiting.serve(stream.tenant, stream.priority, count)

    def computed(self, plan: Plan) -> None:
        """The plan's step has run: its keys and values are in the pages."""
        for stream, count, _ in plan.pieces:
            if not stream.pages:  # removed while the step ran
                continue
            stream.num_computed += count
            if self.reuse and stream.num_computed // self.pool.page_size > len(stream.keys):
                self._publish(stream)

    @property
    def next_deadline(self) -> float:
        """When a stream may expire at the earliest; infinity if none ever does."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def streams(self) -> Iterator[Stream]:
        """All streams, running ones first."""
        yield from self.running
        yield from self.waiting

    def check(self) -> None:
        """Raise AssertionError unless pages and streams account for each other."""
        self.pool.check()
        references = [0] * self.pool.num_pages
        for stream in self.running:
            assert len(stream.pages) >= self.pool.pages_for(stream.num_computed)
            for page in stream.pages:
                references[page] += 1
            if stream.num_computed % self.pool.page_size:
                page = stream.pages[stream.num_computed // self.pool.page_size]
                assert not self.pool.is_shared(page), "two would write on one page"
        for stream in self.waiting:
            assert not stream.pages
            assert stream.num_computed == 0
        assert references == self.pool._references, "a page is held by nobody, or not held"
        assert len(self.running) <= self.max_streams
        assert self.running == sorted(self.running, key=_place), "out of order"

    def _expire(self, plan: Plan, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            stream = heapq.heappop(self._deadlines)[2]
            if self.remove(stream):
                plan.expired.append(stream)

    def _admit(self, plan: Plan, budget: int) -> None:
        """Let streams in while there is room. After this no page is taken from a stream in the
        plan, so that what is to be copied stays what it is.
        """
        # A newcomer needs a page at least: see `_has_room`. To look further is not for free.
        while (
            budget
            and len(self.running) < self.max_streams
            and len(self.running) < self.pool.num_free
        ):
            head = self.waiting.peek()
            if head is None:
                break
            stream = head[0]
            num_looked_up = self._find_computed(stream)
            count = min(budget, stream.num_pending)
            if not self._has_room(stream, count):
                self._release(stream)
                break
            self.waiting.pop()
            # Counted once for each time it is admitted, however often it was looked for.
            self.pool.stats.looked_up += num_looked_up
            self.pool.stats.found += stream.num_computed if num_looked_up else 0
            stream.num_cached = min(stream.num_computed, len(stream.prompt))
            insort(self.running, stream, key=_place)
            self._copy_last_page(stream, plan)
            reserved = self._reserve(stream, count, plan)
            assert reserved, "there was room for it"
            plan.pieces.append(Piece(stream, count, count == stream.num_pending))
            self.waiting.serve(stream.tenant, stream.priority, count)
            budget -= count

    def _find_computed(self, stream: Stream) -> int:
        """Give it the pages that hold what it would compute first; tokens looked up in the pool.

        Its newest token is computed in any case: a next one follows from it.
        """
        parent, size = stream.parent, self.pool.page_size
        shared = len(stream.prompt) - 1
        if parent is not None and parent.num_computed >= shared and not stream.written:
            stream.pages = list(parent.pages[: self.pool.pages_for(shared)])
            for page in stream.pages:
                self.pool.retain(page)
            stream.num_computed = shared
            stream.keys = list(parent.keys[: shared // size])
            return 0
        if self.reuse and stream.finds:
            keys = self._keys(stream, stream.num_tokens - 1)
            stream.pages = self.pool.find(keys)
            stream.num_computed = len(stream.pages) * size
            stream.keys = keys[: len(stream.pages)]
            return len(keys) * size
        return 0

    def _has_room(self, stream: Stream, count: int) -> bool:
        """Whether pages are free for a newcomer, and one for each who writes beside it.

        Without the margin a newcomer would be preempted again by those who run already.
        """
        # Full pages are shared, a page that is not full is copied.
        num_kept = stream.num_computed // self.pool.page_size
        needed = self.pool.pages_for(stream.num_computed + count) - num_kept
        return needed + len(self.running) <= self.pool.num_free

    def _copy_last_page(self, stream: Stream, plan: Plan) -> None:
        """A newcomer's own copy of its last page, if that is not full: others write there too."""
        if stream.num_computed % self.pool.page_size == 0:
            return
        shared, own = stream.pages[-1], self.pool.allocate()
        assert own is not None, "there was room for it"
        # A page that is itself a copy has its content only once the copies are made.
        origin = {to: source for source, to in plan.copies}.get(shared, shared)
        plan.copies.append((origin, own))
        self.pool.release(shared)
        stream.pages[-1] = own

    def _reserve(self, stream: Stream, count: int, plan: Plan) -> bool:
        """Pages for the next ``count`` tokens; others make room. False if it lost its own."""
        num_pages = self.pool.pages_for(stream.num_computed + count)
        while len(stream.pages) < num_pages:
            page = self.pool.allocate()
            if page is not None:
                stream.pages.append(page)
                continue
            victim = self.running[-1]  # the least important, of those the youngest
            self._preempt(victim, plan)
            if victim is stream:
                return False
        return True

    def _preempt(self, stream: Stream, plan: Plan) -> None:
        self.running = [other for other in self.running if other is not stream]
        self._release(stream)
        stream.num_preempted += 1
        plan.preempted.append(stream)
        self.waiting.add(stream, stream.tenant, stream.priority, front=True)
        # It was present as running and is now as waiting.
        self.waiting.leave(stream.tenant, stream.priority)

    def _release(self, stream: Stream) -> None:
        for page in reversed(stream.pages):  # the end of a text is the first to be given up
            self.pool.release(page)
        stream.pages, stream.keys, stream.num_computed = [], [], 0

    def _publish(self, stream: Stream) -> None:
        """Tell the pool what the stream's newly full pages hold."""
        known = len(stream.keys)
        stream.keys = self._keys(stream, stream.num_computed)
        for index in range(known, len(stream.keys)):
            self.pool.publish(stream.pages[index], stream.keys[index])

    def _keys(self, stream: Stream, stop: int) -> list[bytes]:
        size = self.pool.page_size
        if stop // size == len(stream.keys):
            return stream.keys
        following = stream.tokens(len(stream.keys) * size, stop)
        return extend_keys(stream.keys, stream.fingerprint, following, size)
