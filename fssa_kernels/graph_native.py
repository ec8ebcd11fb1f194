"""A step recorded as calls of the native CPU kernels; see `graph.StepGraph`.

Recording runs the step's Python once. Nothing is computed: every op prepares its call (addresses,
sizes, strides) and appends it here, and intermediate tensors get memory that is used again as soon
as Python has let go of them. A replay is one native call, with the GIL released and one team of
threads, a barrier between two ops. How many rows it has is read at replay as well.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fssa_kernels.graph import Following, Inputs, Step, StepGraph, tensors_of
from fssa_kernels.native import CURRENT, MISSING, NATIVE, RecordingError

_LINE = 64  # bytes of a cache line, at which blocks begin


class NativeStepGraph(StepGraph):
    """A recorded step on the CPU; made by `StepGraph.record`.

    Attributes:
        names: the op behind every recorded call of the step.
    """

    def __init__(
        self,
        step: Step,
        inputs: Inputs,
        capacity: Mapping[str, int],
        following: Following | None = None,
    ) -> None:
        if NATIVE is None:
            raise RecordingError(f"StepGraph: {MISSING}")
        if CURRENT.recorder is not None:
            raise RecordingError("StepGraph: another graph is being recorded")
        recorder = _NativeRecorder(inputs, capacity)
        CURRENT.recorder = recorder
        try:
            with torch.inference_mode(), _OnlyOurs():
                outputs = step(inputs)
                names = list(recorder.names)
                if following is not None:
                    recorder.end_step(following)
                    following.advance(outputs)
        finally:
            CURRENT.recorder = None
        super().__init__(capacity, outputs)
        self.names = names
        self.can_repeat = following is not None
        self._native = recorder.graph
        self._keep = recorder
        # Some calls have scratch memory for each thread.
        self._max_threads = torch.get_num_threads()

    def __len__(self) -> int:
        """Ops of the step."""
        return len(self._native)

    def profile(self, repeats: int, **rows: int) -> list[float]:
        """Mean seconds of every op, in order, over some replays."""
        self._check(rows)
        times = self._native.profile(self._dims(rows), self._num_threads(), repeats, _is_main())
        return [seconds / repeats for seconds in times]

    def _replay(self, rows: Mapping[str, int]) -> None:
        self._native.replay(self._dims(rows), self._num_threads(), _is_main())

    def _repeat(self, rows: Mapping[str, int], times: int, seconds: float) -> int:
        if not self.can_repeat:
            return super()._repeat(rows, times, seconds)
        return self._native.repeat(
            self._dims(rows), self._num_threads(), times, seconds, _is_main()
        )

    def _num_threads(self) -> int:
        return min(torch.get_num_threads(), self._max_threads)

    def _dims(self, rows: Mapping[str, int]) -> list[int]:
        return [rows[name] for name in self.capacity]


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


class _NativeRecorder:
    """Collects calls, knows the dimension of every tensor, and lends memory."""

    def __init__(self, inputs: Inputs, capacity: Mapping[str, int]) -> None:
        assert NATIVE is not None
        self.graph = NATIVE.Graph(len(inputs))
        self.names: list[str] = []
        self._dims: dict[int, int] = {}  # dimension of the memory that starts there
        self._pool = _Pool()
        self._kept: dict[int, Tensor] = {}
        for dim, (name, group) in enumerate(inputs.items()):
            for tensor in tensors_of(group):
                if self._dims.setdefault(_start(tensor), dim) != dim:
                    other = list(inputs)[self._dims[_start(tensor)]]
                    raise ValueError(
                        f"StepGraph: {name}: expected memory of its own for every dimension, "
                        f"got an input that shares memory with one of {other}"
                    )
                self._kept[_start(tensor)] = tensor
        self._limits = list(capacity.values())

    def rows(self, tensor: Tensor) -> Any:
        assert NATIVE is not None
        dim = self._dim(tensor)
        if tensor.shape[0] != self._limits[dim]:
            raise RecordingError(
                f"StepGraph: expected {self._limits[dim]} rows, as the input this was computed "
                f"from has, got shape {tuple(tensor.shape)}"
            )
        return NATIVE.Rows(self.graph, dim)

    def empty(
        self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, apart: bool, own: bool
    ) -> Tensor:
        dim = self._dim(like)
        row_stride = math.prod(shape[1:])
        if apart:
            lines = -(-row_stride * dtype.itemsize // _LINE)
            row_stride = (lines | 1) * _LINE // dtype.itemsize
        tensor = self._pool.empty(shape, dtype, row_stride, own)
        self._dims[_start(tensor)] = dim
        return tensor

    def add(self, op: str, call: Any, tensors: tuple[Tensor | None, ...]) -> None:
        for tensor in tensors:
            # Indices are checked before a replay starts, when this one does not exist yet.
            if tensor is not None and tensor.dtype == torch.int32 and self._pool.owns(tensor):
                raise RecordingError(
                    f"StepGraph: {op}: expected indices that are static inputs, got an index "
                    "computed in the step"
                )
        self.graph.add(call)
        self.names.append(op)
        for tensor in tensors:
            if tensor is not None and not self._pool.owns(tensor):
                self._kept[_start(tensor)] = tensor

    def end_step(self, following: Following) -> None:
        """What is added from here on follows the step when it is repeated."""
        ended, interrupt = following.ended, following.interrupt
        dim = self._dims.get(_start(ended))
        one_a_row = ended.dtype == torch.int32 and ended.dim() == 1 and ended.is_contiguous()
        if dim is None or self._pool.owns(ended) or not one_a_row:
            raise ValueError("StepGraph: ended: expected a static input, one int32 number a row")
        if interrupt.dtype != torch.int32 or interrupt.numel() != 1:
            raise ValueError(
                f"StepGraph: interrupt: expected one int32 number, got {interrupt.dtype} "
                f"of shape {tuple(interrupt.shape)}"
            )
        self._kept[_start(interrupt)] = interrupt
        self.graph.end_step(ended.data_ptr(), dim, interrupt.data_ptr())

    def _dim(self, tensor: Tensor) -> int:
        dim = self._dims.get(_start(tensor))
        if dim is None:
            raise RecordingError(
                f"StepGraph: a tensor of shape {tuple(tensor.shape)} is neither a static input "
                "nor the result of a recorded op"
            )
        return dim


def _start(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Pool:
    """Memory of a recording: a block goes back when the last tensor on it is gone.

    Blocks for rows of a thread's own are never lent for others. Tensors own their block: what a
    step returns may outlive the graph.
    """

    def __init__(self) -> None:
        # Addresses of free blocks, by size and whether they are for rows of a thread's own.
        self._free: dict[tuple[int, bool], list[int]] = {}
        self._blocks: dict[int, Tensor] = {}  # by address

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, row_stride: int, own: bool
    ) -> Tensor:
        count = shape[0] * row_stride
        num_bytes = max(1, count * dtype.itemsize)
        size = 1 << max(_LINE.bit_length(), (num_bytes - 1).bit_length())
        free = self._free.setdefault((size, own), [])
        start = free.pop() if free else self._allocate(size)
        # The storage holds the array, so the array dies with the last tensor on that storage.
        array = (ctypes.c_uint8 * size).from_address(start)
        owner = weakref.finalize(array, _give_back, free, start, self._blocks[start])
        owner.atexit = False  # tensors still alive at exit keep their memory
        rows = torch.frombuffer(array, dtype=dtype, count=count).view(shape[0], row_stride)
        return rows[:, : math.prod(shape[1:])].view(shape)

    def owns(self, tensor: Tensor) -> bool:
        return _start(tensor) in self._blocks

    def _allocate(self, size: int) -> int:
        block = torch.empty(size + _LINE, dtype=torch.uint8)
        start = -(-block.data_ptr() // _LINE) * _LINE
        self._blocks[start] = block
        return start


def _give_back(free: list[int], start: int, block: Tensor) -> None:
    """The end of a tensor on a block, which is held until this has been called."""
    free.append(start)


class _OnlyOurs(TorchDispatchMode):
    """Raises for whatever torch computes: a replay would not repeat it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None
        allowed = func.namespace == "fssa" or func in _HARMLESS
        if allowed or func.is_view:
            result = func(*args, **(kwargs or {}))
        # `reshape` and `contiguous` count as views and yet may copy.
        if not (allowed or (func.is_view and _share_memory(args[0], result))):
            raise RecordingError(
                f"StepGraph: {func} is torch's own and would not be replayed; "
                "only ops of fssa_kernels and views may be used in a recorded step"
            )
        return result


def _share_memory(tensor: Tensor, views: Any) -> bool:
    parts = (views,) if isinstance(views, Tensor) else views
    return all(_start(part) == _start(tensor) for part in parts)


_HARMLESS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
    torch.ops.aten.alias.default,
)
