"""Time: how much is left, and how long calls take.

On a GPU calls are captured in a CUDA graph that goes through several copies of the inputs, so that
what they read is not in the cache, and events are recorded around a replay. In the dry run the
host's clock takes their place; what it says is no measurement.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fssa_kernels.gpu.workspace import Workspace, own_workspace

# Long enough that the replay is queued before the first event: without it the launch of the graph
# itself is timed as well.
_HEAD_START_CYCLES = 200_000


class Deadline:
    """A point in time, and the shares of what is left until then."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0.0

    def share(self, part: float) -> Deadline:
        """The deadline of somebody who may use this part of what is left."""
        return Deadline(part * self.left)


@dataclass(frozen=True)
class Timed:
    """Something ready to be timed; `sample()` gives the seconds of one call."""

    sample: Callable[[], float]
    how: str


class Clock(Protocol):
    """Times a call that takes the number of the copy it shall work on."""

    def prepare(
        self, call: Callable[[int], Any], *, copies: int, calls: int, graph: bool
    ) -> Timed: ...

    def release(self) -> None:
        """Nothing prepared so far will be sampled again."""


class GpuClock:
    """CUDA graphs where they can be captured, and CUDA events."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._workspace = Workspace()

    def prepare(self, call: Callable[[int], Any], *, copies: int, calls: int, graph: bool) -> Timed:
        outside = torch.cuda.current_stream()
        # One stream and one workspace for all captures: as in a step graph, what ops keep is there
        # from the first calls on.
        side = self._stream = self._stream or torch.cuda.Stream()
        side.wait_stream(outside)
        with torch.cuda.stream(side), own_workspace(self._workspace):
            for index in range(min(2, copies)):
                call(index)
        outside.wait_stream(side)
        torch.cuda.synchronize()

        def launches() -> None:
            for index in range(calls):
                call(index % copies)

        run, how = launches, "launches"
        if graph:
            try:
                run, how = self._capture(launches, side), "graph"
            except Exception as error:
                how = f"launches, no graph: {str(error).splitlines()[0][:120]}"
                torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            torch.cuda._sleep(_HEAD_START_CYCLES)
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls

        return Timed(sample, how)

    def _capture(
        self, launches: Callable[[], None], stream: torch.cuda.Stream
    ) -> Callable[[], Any]:
        """A graph of the launches; `torch.cuda.graph` would empty the cache of memory each time.

        Graphs share their memory: what one leaves there nobody reads.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        captured = torch.cuda.CUDAGraph()
        # Memory freed by a collection during the capture would break it.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream), own_workspace(self._workspace):
                captured.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    launches()
                except Exception:
                    with contextlib.suppress(Exception):
                        captured.capture_end()
                    raise
                captured.capture_end()
        finally:
            if collecting:
                gc.enable()
        return captured.replay

    def release(self) -> None:
        self._pool = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class HostClock:
    """The host's clock around one call: for the dry run, where there is nothing to measure."""

    def prepare(self, call: Callable[[int], Any], *, copies: int, calls: int, graph: bool) -> Timed:
        def sample() -> float:
            start = time.perf_counter()
            call(copies - 1)
            return time.perf_counter() - start

        return Timed(sample, "host clock, dry run")

    def release(self) -> None:
        pass


def interleaved(sides: Mapping[str, Timed], rounds: int, twice: str) -> dict[str, list[float]]:
    """Seconds of every side, sampled in turn, every other round backwards.

    The side named `twice` is sampled again in every round, as "<twice> again": how far the two
    differ is the noise.
    """
    order = [*sides, f"{twice} again"] if twice in sides else list(sides)
    samples: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            samples[name].append(sides[name.removesuffix(" again")].sample())
    return samples


def calls_for(seconds: float, copies: int) -> int:
    """Calls of one sample: about half a millisecond, every copy equally often."""
    rounds = math.ceil(5e-4 / max(seconds, 1e-7) / copies)
    return copies * max(1, min(rounds, 256 // copies))
