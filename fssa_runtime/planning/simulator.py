"""The engine's scheduler at work on a clock of its own: steps take what a model of them says.

The scheduler and the pages are the engine's own. In place of the model every step writes stub
tokens: a conversation's token at a position is a number of its own, so that equal beginnings have
equal pages, and others do not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..engine.scheduler import Plan, Scheduler
from ..engine.stream import Stream
from .machine import Step, StepTime
from .result import Objectives, Result, jain_index
from .slots import SlotTable
from .trace import Arrival

_CONVERSATION = 1 << 24  # tokens at most, so that conversations have no token in common


@dataclass(eq=False)
class SimulatedStream(Stream):
    """A stream with the times of what happened to it."""

    user: int = 0
    arrived: float = 0.0
    first: float = math.nan
    last: float = math.nan
    resident: bool = False


class Simulator:
    """One run of a trace.

    Args:
        scheduler: new, with the pages the machine has. step_time: what a step takes.
        num_slots: users in the modulation table, at least the scheduler's ``max_streams``.
        num_users: users of the trace. num_busy: the first so many are counted as busy.
        max_late: the run ends when more requests than these have missed the objectives.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_time: StepTime,
        objectives: Objectives,
        *,
        num_slots: int,
        num_users: int,
        num_busy: int = 0,
        max_late: int | None = None,
    ) -> None:
        if num_slots < min(scheduler.max_streams, num_users):
            raise ValueError(f"expected a slot for every stream of a step, got {num_slots}")
        self.scheduler = scheduler
        self.now = 0.0
        self.result = Result()
        self._step_time = step_time
        self._objectives = objectives
        self._slots = SlotTable(num_slots)
        self._num_busy = num_busy
        self._max_late = math.inf if max_late is None else max_late
        # By user: tokens written, and the time of all requests from arrival to the last token.
        self._tokens = np.zeros(num_users)
        self._time = np.zeros(num_users)

    def run(
        self, arrivals: Iterator[Arrival], on_done: Callable[[int], None] | None = None
    ) -> Result:
        """Serve all arrivals, or stop at ``max_late``. ``on_done`` gets requests done so far."""
        result, scheduler = self.result, self.scheduler
        upcoming = next(arrivals, None)
        while result.late <= self._max_late:
            while upcoming is not None and upcoming.time <= self.now:
                self._arrive(upcoming)
                upcoming = next(arrivals, None)
            if len(scheduler):
                self._step()
                if on_done is not None and result.steps % 1000 == 0:
                    on_done(result.requests)
            elif upcoming is not None:
                result.queue.add(0, upcoming.time - self.now)
                self.now = upcoming.time
            else:
                break
        else:
            result.stopped = True
        result.seconds = self.now
        result.fairness = jain_index(self._tokens, self._time)
        return result

    def _arrive(self, arrival: Arrival) -> None:
        start = arrival.conversation * _CONVERSATION
        self.result.last_arrival = arrival.time
        self.scheduler.add(
            SimulatedStream(
                prompt=range(start, start + arrival.prompt_tokens),
                max_tokens=arrival.output_tokens,
                fingerprint=arrival.user.to_bytes(8, "little"),
                tenant=arrival.user,
                user=arrival.user,
                arrived=arrival.time,
            )
        )

    def _step(self) -> None:
        result, scheduler = self.result, self.scheduler
        started = time.perf_counter()
        plan = scheduler.plan(self.now)
        planned = time.perf_counter()
        for preempted in plan.preempted:
            assert isinstance(preempted, SimulatedStream)
            result.preemptions += 1
            self._slots.release(preempted.user)
            preempted.resident = False
        terms = self._step_time.terms(self._work(plan))
        seconds = 0.0
        for name, value in terms.items():
            seconds += value
            result.terms[name] = result.terms.get(name, 0.0) + value
        before, self.now = self.now, self.now + seconds
        result.steps += 1
        result.batch.add(len(plan.pieces))
        result.queue.add(len(scheduler.waiting), seconds)
        computing = time.perf_counter()
        scheduler.computed(plan)
        result.host_s += planned - started + time.perf_counter() - computing
        self._write(plan, before)

    def _work(self, plan: Plan) -> Step:
        """What the planned step computes; users who are new in it get their rows."""
        writing = prompt_tokens = keys = pairs = refills = 0
        result = self.result
        for piece in plan.pieces:
            stream, count = piece.stream, piece.num_tokens
            assert isinstance(stream, SimulatedStream)
            if not stream.resident:
                refills += self._admit(stream)
            start = stream.num_computed
            keys += start + count
            if count == 1:
                writing += 1
                pairs += start + 1
            else:
                prompt_tokens += count
                pairs += count * start + count * (count + 1) // 2
        result.slot_misses += refills
        return Step(writing, prompt_tokens, keys, pairs, refills)

    def _admit(self, stream: SimulatedStream) -> int:
        stream.resident = True
        self.result.slot_lookups += 1
        if not stream.num_preempted:
            self.result.prompt_tokens += len(stream.prompt)
            self.result.reused_tokens += stream.num_cached
        return not self._slots.acquire(stream.user)

    def _write(self, plan: Plan, before: float) -> None:
        """Stub tokens for the streams that are through with theirs; the finished leave."""
        now, steady = self.now, 0
        for piece in plan.pieces:
            if not piece.writes:
                continue
            stream = piece.stream
            assert isinstance(stream, SimulatedStream)
            written, prompt = stream.written, stream.prompt
            written.append(prompt[0] + len(prompt) + len(written))
            if len(written) == 1:
                self._first(stream)
            elif stream.last == before:
                steady += 1
            else:
                self.result.itl.add(now - stream.last)
            stream.last = now
            if len(written) == stream.max_tokens:
                self._finish(stream)
        if steady:
            self.result.itl.add(now - before, steady)

    def _first(self, stream: SimulatedStream) -> None:
        result = self.result
        stream.first = self.now
        waited = self.now - stream.arrived
        result.ttft.add(waited)
        (result.ttft_busy if stream.user < self._num_busy else result.ttft_others).add(waited)
        if waited > result.longest_wait:
            result.longest_wait, result.longest_wait_user = waited, stream.user

    def _finish(self, stream: SimulatedStream) -> None:
        result, count = self.result, len(stream.written)
        self.scheduler.remove(stream)
        self._slots.release(stream.user)
        self._tokens[stream.user] += count
        self._time[stream.user] += self.now - stream.arrived
        gap = (stream.last - stream.first) / (count - 1) if count > 1 else 0.0
        fast = stream.first - stream.arrived <= self._objectives.ttft_s
        if fast and gap <= self._objectives.itl_s:
            result.within += 1
        else:
            result.late += 1
        result.requests += 1
        result.output_tokens += count
