"""Counters with which programs that share a tile find out who comes last.

Every kernel that counts leaves its counters at zero, so they are cleared once. Two kernels that run
at the same time must not share them: streams have their own, and so does every recorded graph,
which may be replayed beside anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
            held = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            self._counters[key] = held
        return held


_WORKSPACES = [Workspace()]


def counters(count: int, device: torch.device) -> Tensor:
    """Zeros that a kernel launched now may count in, if it leaves zeros; see `Workspace`."""
    return _WORKSPACES[-1].counters(count, device)


@contextlib.contextmanager
def own_workspace(workspace: Workspace) -> Iterator[None]:
    """Launches inside count in this workspace."""
    _WORKSPACES.append(workspace)
    try:
        yield
    finally:
        _WORKSPACES.pop()
