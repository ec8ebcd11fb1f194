"""How much a machine holds: one simulation at a given rate, or the largest rate that holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..engine.page_pool import PagePool
from ..engine.scheduler import Scheduler
from ..errors import InputError
from .machine import Step, StepTime
from .memory import MemoryPlan
from .result import Objectives, Result
from .simulator import Simulator
from .trace import Trace

# A rate holds if this share of the requests meets the objectives.
SHARE_WITHIN = 0.99
# The search ends when the rate that holds and the one that does not are this close.
PRECISION = 1.03
# Below this share of what the machine could compute, a rate is not looked for.
_LOWEST = 1e-3
# Requests that all come within this share of the time to a first token come at once.
_AT_ONCE = 0.1

OnRun = Callable[[float], Callable[[int], None] | None]


@dataclass(frozen=True)
class Service:
    """Everything but the rate: the machine's memory and steps, the scheduler's limits, the load.

    ``trace.rate`` is replaced by the rate that is tried. The busy users are the first who send half
    of the requests.
    """

    memory: MemoryPlan
    step_time: StepTime
    objectives: Objectives
    trace: Trace
    max_streams: int
    max_tokens: int
    max_length: int
    reuse: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_streams <= self.max_tokens:
            raise InputError(
                "streams of a step: expected 1 to its tokens, "
                f"got {self.max_streams} streams and {self.max_tokens} tokens"
            )
        for name in ("ttft_s", "itl_s"):
            if not getattr(self.objectives, name) > 0:
                raise InputError(f"objective {name}: expected more than 0")
        if self.max_length > self.memory.kv_tokens:
            raise InputError(
                f"the longest request has {self.max_length} tokens, and {self.memory.kv_tokens} "
                "tokens of keys and values fit in the memory"
            )

    def run(
        self, rate: float, *, stop_early: bool = False, on_done: Callable[[int], None] | None = None
    ) -> Result:
        """Simulate the trace at a rate; with ``stop_early``, until it is clear that it fails."""
        trace = replace(self.trace, rate=rate)
        scheduler = Scheduler(
            PagePool(self.memory.num_pages, self.memory.page_size),
            max_streams=self.max_streams,
            max_tokens=self.max_tokens,
            max_length=self.max_length,
            reuse=self.reuse,
        )
        simulator = Simulator(
            scheduler,
            self.step_time,
            self.objectives,
            num_slots=self.memory.slots,
            num_users=trace.num_users,
            num_busy=int(np.searchsorted(trace.user_shares(), 0.5)) + 1,
            max_late=int((1 - SHARE_WITHIN) * trace.num_requests) if stop_early else None,
        )
        return simulator.run(trace.arrivals(), on_done)

    def estimate(self) -> float:
        """Requests a second that full steps would finish: where the search begins."""
        prompt, output = self.trace.prompt.mean, self.trace.output.mean
        writing = max(1, min(self.max_streams, int(self.memory.kv_tokens / (prompt + output))))
        # As many tokens of prompts a step as its share of finished requests needs.
        prompts = min(int(writing * prompt / output), self.max_tokens)
        keys = int(writing * (prompt + output / 2))
        seconds = sum(self.step_time.terms(Step(writing, prompts, keys, keys)).values())
        return writing / output / seconds


def holds(result: Result) -> bool:
    """Whether enough of the requests met the objectives."""
    return not result.stopped and result.within >= SHARE_WITHIN * result.requests


def find_rate(service: Service, on_run: OnRun) -> tuple[float, Result]:
    """The largest rate that holds, to a few percent, and its run.

    If none does: the lowest that was tried, at which requests hardly meet each other.

    Raises:
        InputError: so few requests that all of them may come at once.

    ``on_run`` hears of every rate that is tried and returns what is told of its progress.
    """

    def attempt(rate: float) -> Result | None:
        result = service.run(rate, stop_early=True, on_done=on_run(rate))
        return result if holds(result) else None

    low = start = service.estimate()
    high = math.inf  # the lowest rate known to fail
    while (best := attempt(low)) is None:
        if low < _LOWEST * start:
            return low, service.run(low, on_done=on_run(low))
        low, high = low / 1.5, low
    while math.isinf(high):
        requests = service.trace.num_requests
        if requests / low < _AT_ONCE * service.objectives.ttft_s:
            raise InputError(
                f"requests: expected more than {requests} to look for a rate: the objectives are "
                "met where all of them come at once"
            )
        result = attempt(1.5 * low)
        if result is None:
            high = 1.5 * low
        else:
            low, best = 1.5 * low, result
    while high > PRECISION * low:
        middle = math.sqrt(low * high)
        result = attempt(middle)
        if result is None:
            high = middle
        else:
            low, best = middle, result
    return low, best
