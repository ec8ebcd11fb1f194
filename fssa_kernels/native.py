"""Loading of the native module, the codes it shares with csrc, and how its calls are made.

The module is optional: without a compiler the package installs and works on the references. What
kept it from loading is part of every verdict that `explain` gives on a native backend.

A native backend prepares a call (addresses, sizes, strides) and hands it to `launch`, which runs
it, or, while a `StepGraph` is being recorded, appends it to that graph.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # DType in csrc/common/dtype.h


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fssa_kernels._native"), None
    except ModuleNotFoundError:
        return None, "fssa_kernels._native was not built (no C++ compiler at installation)"
    except ImportError as error:
        return None, f"fssa_kernels._native is built but does not load: {error}"


# torch is imported above, so the module's OpenMP symbols bind to the runtime torch brought along:
# one pool of threads, not two that take turns on the same cores.
NATIVE, MISSING = _load()


class RecordingError(RuntimeError):
    """A step, or an op in it, cannot be recorded into a `StepGraph`."""


class Recorder(Protocol):
    """What takes calls instead of running them; see `graph.StepGraph`."""

    def rows(self, tensor: Tensor) -> Any:
        """The native row count of a tensor that the graph knows."""
        ...

    def empty(
        self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, apart: bool, own: bool
    ) -> Tensor:
        """Memory for an output with as many rows as `like` has, as `native.empty` says."""
        ...

    def add(self, op: str, call: Any, tensors: tuple[Tensor | None, ...]) -> None:
        """Append a call of an op; its tensors stay alive as long as the graph."""
        ...


class _Current(threading.local):
    recorder: Recorder | None = None


CURRENT = _Current()


def rows_of(tensor: Tensor) -> Any:
    """How many rows a call on this tensor has, for the native module."""
    assert NATIVE is not None
    if CURRENT.recorder is not None:
        return CURRENT.recorder.rows(tensor)
    return NATIVE.Rows(tensor.shape[0])


def empty(
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    apart: bool = False,
    own: bool = False,
) -> Tensor:
    """Uninitialised memory for an output; its rows are those of `like`.

    Args:
        apart: for rows that a product takes or stores a dozen at a time. In a recorded step they
            lie an odd number of cache lines apart: a power of two apart, all the words that a
            product takes at once would be in one set of the first cache, which holds eight or
            twelve. So their stride has to be asked for.
        own: for rows that no thread reads but the one that wrote them. In a recorded step they
            get memory that only such rows had before: a core that writes to a line which others
            have read waits until they have given it up.
    """
    if CURRENT.recorder is not None:
        return CURRENT.recorder.empty(like, shape, dtype, apart=apart, own=own)
    return torch.empty(shape, dtype=dtype)


def launch(op: str, call: Any, *tensors: Tensor | None) -> None:
    """Run a prepared call on torch's number of threads, or record it; the call reads `tensors`."""
    if CURRENT.recorder is not None:
        CURRENT.recorder.add(op, call, tensors)
    else:
        call.run(torch.get_num_threads())


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def unsupported(**tensors: Tensor | None) -> str | None:
    """Why the native kernels cannot read one of these tensors, or None.

    They take float32 and bfloat16 on the CPU, the last dimension contiguous.
    """
    if NATIVE is None:
        return MISSING
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}, the kernel runs on the CPU"
        if tensor.is_floating_point() and tensor.dtype not in DTYPE_CODES:
            return f"{name} is {tensor.dtype}, the kernel takes float32 and bfloat16"
        if tensor.dim() and tensor.stride(-1) != 1 and not _is_trivial(tensor):
            return f"the last dimension of {name} is not contiguous (strides {tensor.stride()})"
    return None


def _is_trivial(tensor: Tensor) -> bool:
    """Whether the stride of the last dimension is never used: one element there, or none at all."""
    return tensor.shape[-1] == 1 or tensor.numel() == 0
