"""How Triton kernels are launched; or only collected, where no GPU is.

Compiling ahead of time needs every launch a launcher would make: `collecting` has the launchers run
on meta tensors, for a GPU that need not be there, and keeps what they would have launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.gpu.device import NOMINAL, Device, device_facts


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its grid, its arguments by name, constants included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class _Collector:
    def __init__(self) -> None:
        self.device: Device | None = None
        self.launches: list[Launch] = []


_COLLECTOR = _Collector()


@contextlib.contextmanager
def collecting(device: Device) -> Iterator[list[Launch]]:
    """Keep the launches made inside, as if on `device`, instead of running them."""
    _COLLECTOR.device, _COLLECTOR.launches = device, []
    try:
        yield _COLLECTOR.launches
    finally:
        _COLLECTOR.device = None


def is_collecting() -> bool:
    """Whether launches are being collected."""
    return _COLLECTOR.device is not None


def facts(tensor: Tensor) -> Device:
    """The GPU that a kernel on this tensor runs on; an H100 in the interpreter."""
    if _COLLECTOR.device is not None:
        return _COLLECTOR.device
    if tensor.device.type == "cpu":
        return NOMINAL[90]
    return device_facts(tensor.device.index)


def options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What every kernel is compiled with.

    Fusing multiplications and additions is Triton's default up to 3.9, not after. As many registers
    as a block of so many threads can have: left alone, the assembler spills a few values to reach
    the next step of occupancy.
    """
    return {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,
        "maxnreg": min(255, 65536 // (32 * num_warps)),
    }


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """Launch on the device of the tensors among the arguments, in its current stream.

    An empty grid launches nothing.
    """
    if not all(grid):
        return
    if _COLLECTOR.device is not None:
        _COLLECTOR.launches.append(Launch(kernel, grid, arguments, num_warps, num_stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    # Triton launches in the current device, whatever device its tensors are on.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**arguments, **options(num_warps, num_stages))
