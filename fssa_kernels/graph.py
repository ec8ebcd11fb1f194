"""StepGraph: the ops of a step recorded once, then replayed without Python.

Python costs 10 to 60 us an op; a decode step of a small model has some 250 of them and floors at a
few milliseconds. Recording runs the step's Python once. Nothing is computed: every op prepares its
call (addresses, sizes, strides) and appends it here, and intermediate tensors get memory that is
used again as soon as Python has let go of them. A replay is one native call, with the GIL released
and one team of threads, a barrier between two ops. Tokens, positions, slots, lengths and pages are
read from the static inputs at replay, so neither a new user nor a longer text needs a recording.

How many rows a replay has is read at replay as well. Each static input belongs to a dimension
("tokens", say); whatever is computed from it has as many rows.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fssa_kernels.native import CURRENT, MISSING, NATIVE, RecordingError

_ALIGNMENT = 64


class StepGraph:
    """A recorded step; make one with `record`.

    Attributes:
        outputs: what the step returned while it was recorded; holds a replay's results.
        capacity: rows at most, by dimension.
    """

    def __init__(self, capacity: Mapping[str, int], native: Any, outputs: Any, keep: Any) -> None:
        self.capacity = dict(capacity)
        self.outputs = outputs
        self._native = native
        self._keep = keep
        # Some calls have scratch memory for each thread.
        self._num_threads = torch.get_num_threads()

    @classmethod
    def record(cls, step: Callable[[], Any], inputs: Mapping[str, Sequence[Tensor]]) -> StepGraph:
        """Record what ``step()`` computes from static inputs.

        ``inputs`` names the dimensions; the tensors of one have as many rows, which is the
        dimension's capacity. A replay with fewer rows reads the first ones.

        Inside ``step`` only ops of this package may compute, and views; anything else raises
        RecordingError, because a replay would not repeat it. So does an op that has no native
        kernel for its inputs, with the reason.

        Raises ValueError for tensors of one dimension that differ in rows, or on a GPU.
        """
        if NATIVE is None:
            raise RecordingError(f"StepGraph: {MISSING}")
        if CURRENT.recorder is not None:
            raise RecordingError("StepGraph: another graph is being recorded")
        recorder = _NativeRecorder(inputs)
        CURRENT.recorder = recorder
        try:
            with torch.inference_mode(), _OnlyOurs():
                outputs = step()
        finally:
            CURRENT.recorder = None
        return cls(recorder.capacity, recorder.graph, outputs, recorder)

    def __len__(self) -> int:
        """Ops recorded."""
        return len(self._native)

    def replay(self, **rows: int) -> None:
        """Run the step on the first ``rows`` of each dimension: ``replay(tokens=5, sequences=5)``.

        Raises ValueError for a missing or unknown dimension, more rows than the capacity, and for
        indices out of range, before anything is written.
        """
        self._native.replay(self._dims(rows), self._num_threads)

    def profile(self, repeats: int, **rows: int) -> list[float]:
        """Mean seconds of every op, in order, over some replays."""
        times = self._native.profile(self._dims(rows), self._num_threads, repeats)
        return [seconds / repeats for seconds in times]

    @property
    def names(self) -> list[str]:
        """The op behind every recorded call."""
        return list(self._keep.names)

    def _dims(self, rows: Mapping[str, int]) -> list[int]:
        if rows.keys() != self.capacity.keys():
            expected = ", ".join(self.capacity)
            raise ValueError(f"StepGraph: expected rows of {expected}, got {', '.join(rows)}")
        for name, count in rows.items():
            if not 0 <= count <= self.capacity[name]:
                raise ValueError(
                    f"StepGraph: {name}: expected 0 to {self.capacity[name]} rows, got {count}"
                )
        return [rows[name] for name in self.capacity]


class _NativeRecorder:
    """Collects calls, knows the dimension of every tensor, and lends memory."""

    def __init__(self, inputs: Mapping[str, Sequence[Tensor]]) -> None:
        assert NATIVE is not None
        self.capacity: dict[str, int] = {}
        self.graph = NATIVE.Graph(len(inputs))
        self.names: list[str] = []
        self._dims: dict[int, int] = {}  # dimension of the memory that starts there
        self._pool = _Pool()
        self._kept: dict[int, Tensor] = {}
        for dim, (name, tensors) in enumerate(inputs.items()):
            if not tensors:
                raise ValueError(f"StepGraph: {name}: expected at least one input, got none")
            for tensor in tensors:
                if tensor.device.type != "cpu":
                    raise ValueError(f"StepGraph: expected inputs on the CPU, got {tensor.device}")
                if tensor.shape[0] != self.capacity.setdefault(name, tensor.shape[0]):
                    raise ValueError(
                        f"StepGraph: {name}: expected {self.capacity[name]} rows in every input, "
                        f"got {tensor.shape[0]}"
                    )
                if self._dims.setdefault(_start(tensor), dim) != dim:
                    other = list(inputs)[self._dims[_start(tensor)]]
                    raise ValueError(
                        f"StepGraph: {name}: expected memory of its own for every dimension, "
                        f"got an input that shares memory with one of {other}"
                    )
                self._kept[_start(tensor)] = tensor
        self._limits = list(self.capacity.values())

    def rows(self, tensor: Tensor) -> Any:
        assert NATIVE is not None
        dim = self._dim(tensor)
        if tensor.shape[0] != self._limits[dim]:
            raise RecordingError(
                f"StepGraph: expected {self._limits[dim]} rows, as the input this was computed "
                f"from has, got shape {tuple(tensor.shape)}"
            )
        return NATIVE.Rows(self.graph, dim)

    def empty(self, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        dim = self._dim(like)
        tensor = self._pool.empty(shape, dtype)
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
    """Memory of a recording: a block goes back when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._free: dict[int, list[int]] = {}  # addresses of free blocks, by size
        self._blocks: list[Tensor] = []
        self._owned: set[int] = set()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        num_bytes = max(1, count * dtype.itemsize)
        size = 1 << max(_ALIGNMENT.bit_length(), (num_bytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        start = free.pop() if free else self._allocate(size)
        # The storage holds the array, so the array dies with the last tensor on that storage.
        array = (ctypes.c_uint8 * size).from_address(start)
        weakref.finalize(array, free.append, start)
        return torch.frombuffer(array, dtype=dtype, count=count).view(shape)

    def owns(self, tensor: Tensor) -> bool:
        return _start(tensor) in self._owned

    def _allocate(self, size: int) -> int:
        block = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        self._blocks.append(block)
        start = -(-block.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._owned.add(start)
        return start


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
