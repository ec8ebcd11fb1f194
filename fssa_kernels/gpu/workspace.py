"""Counters with which programs that share a tile find out who comes last.

Every kernel that counts leaves its counters at zero, so they are cleared once. Two kernels that run
at the same time must not share them: streams have their own, and so does every recorded graph,
which may be replayed beside anything. In a capture that is not ours every launch has its own,
cleared in the graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_Key = tuple[torch.device, int]


class Workspace:
    """The counters of one stream after another, or of one graph."""

    def __init__(self) -> None:
        self._counters: dict[_Key, Tensor] = {}
        self._outgrown: list[Tensor] = []  # captured graphs may still count there

    def counters(self, count: int, device: torch.device) -> Tensor:
        """At least `count` int32 zeros on a device, for kernels of its current stream."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream)
        held = self._counters.get(key)
        if held is None or len(held) < count:
            if held is not None:
                self._outgrown.append(held)
            held = _zeros_outside_pools(max(count, 4096), device)
            self._counters[key] = held
        return held


class _Current(threading.local):
    own: Workspace | None = None


SHARED = Workspace()
_CURRENT = _Current()


def counters(count: int, device: torch.device) -> Tensor:
    """Zeros that a kernel launched now may count in, if it leaves zeros; see `Workspace`."""
    if _CURRENT.own is not None:
        return _CURRENT.own.counters(count, device)
    if _is_capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    return SHARED.counters(count, device)


@contextlib.contextmanager
def own_workspace(workspace: Workspace) -> Iterator[None]:
    """Launches of this thread count in this workspace inside."""
    before = _CURRENT.own
    _CURRENT.own = workspace
    try:
        yield
    finally:
        _CURRENT.own = before


def _is_capturing(device: torch.device) -> bool:
    """Whether a launch on the device's current stream goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _zeros_outside_pools(count: int, device: torch.device) -> Tensor:
    """Zeros, written on the current stream, whose memory is torch's and not of a private pool.

    A pool's owner may use the memory again, or take what stays there for a leak, as the CUDA
    graphs of torch.compile do when they have warmed up. A pool is given the allocations of one
    thread (`torch.cuda.use_mem_pool`), so these are another's.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(count, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(allocate).result()
