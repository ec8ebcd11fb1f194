"""Weights laid out once, when they are loaded, in the order the native kernels read them.

A panel holds 32 output columns of the linear, two halves of 16, so that one step of the inner loop
reads two whole vector registers:

    fp32  [panel][K][32]          bf16  [panel][K/2][32][2]  (odd K padded by a zero)

A half belongs to one projection of a stack. Where an epilogue multiplies two projections, a panel's
halves are the same 16 columns of both, so that the product never leaves the registers.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from fssa_kernels.native import DTYPE_CODES, MISSING, NATIVE

_HALF = 16
_PANEL = 2 * _HALF
_PAGE = 1 << 21  # a huge page: fewer entries of the TLB for weights that are read end to end


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix ``[N, K]`` in panels; stands where the ops take the weight of a linear.

    Attributes:
        shape: ``(N, K)`` of the matrix. dtype: float32 or bfloat16.
        splits: sizes of the stacked projections, sum N.
        paired: whether the two projections are multiplied in an epilogue.
        data: the panels, uint8. halves: ``[num_halves, 4]`` int32: first row, first column of the
            result, columns in use, projection.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    splits: tuple[int, ...]
    paired: bool
    data: Tensor = field(repr=False)
    halves: Tensor = field(repr=False)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def num_bytes(self) -> int:
        """Memory of the panels, padding included."""
        return self.data.numel()

    def unpack(self) -> Tensor:
        """The matrix ``[N, K]`` as it was, to the bit."""
        assert NATIVE is not None
        matrix = torch.empty(self.shape, dtype=self.dtype)
        NATIVE.unpack_matrix(
            matrix.data_ptr(),
            self.data.data_ptr(),
            DTYPE_CODES[self.dtype],
            self.shape[1],
            self.shape[1],
            self.halves.data_ptr(),
            len(self.halves),
            torch.get_num_threads(),
        )
        return matrix


class PackArena:
    """One stretch of memory for many packed matrices, on huge pages where the system grants them.

    Args:
        num_bytes: room for all of them; see `packed_bytes`.
    """

    def __init__(self, num_bytes: int) -> None:
        memory = mmap.mmap(-1, -(-max(1, num_bytes) // _PAGE) * _PAGE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._free = torch.frombuffer(memory, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """The next ``num_bytes``; ValueError when less is left."""
        if num_bytes > self._free.numel():
            raise ValueError(f"pack arena: expected {self._free.numel()} bytes or fewer")
        taken, self._free = self._free[:num_bytes], self._free[num_bytes:]
        return taken


def packed_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    splits: Sequence[int] | None = None,
    paired: bool = False,
) -> int:
    """Memory that a packed matrix of this shape takes; arguments as for `pack_matrix`."""
    num_rows, width = shape
    _check(num_rows, dtype, splits, paired)
    assert NATIVE is not None
    num_halves = len(_halves(_sizes(num_rows, splits), paired))
    return num_halves // 2 * NATIVE.panel_bytes(DTYPE_CODES[dtype], width)


def pack_matrix(
    matrix: Tensor,
    *,
    splits: Sequence[int] | None = None,
    paired: bool = False,
    arena: PackArena | None = None,
) -> PackedMatrix:
    """Lay a matrix ``[N, K]`` out for the native kernels.

    Arguments:
        matrix: weight of a linear, or the low-rank factor B of one; float32 or bfloat16, CPU.
        splits: sizes of the stacked projections; None means one.
        paired: the two projections, equally large, will be multiplied in an epilogue.
        arena: where to put it; None for memory of its own.

    Raises TypeError for a dtype, ValueError for a shape, device or splits that do not fit, and
    RuntimeError where the native module is missing.
    """
    if matrix.dim() != 2:
        raise ValueError(f"pack_matrix: expected shape [N, K], got {tuple(matrix.shape)}")
    if matrix.device.type != "cpu":
        raise ValueError(f"pack_matrix: expected a matrix on the CPU, got {matrix.device}")
    num_rows, width = matrix.shape
    _check(num_rows, matrix.dtype, splits, paired)
    assert NATIVE is not None
    sizes = _sizes(num_rows, splits)
    halves = torch.tensor(_halves(sizes, paired), dtype=torch.int32).reshape(-1, 4)
    code = DTYPE_CODES[matrix.dtype]
    if width > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    num_bytes = len(halves) // 2 * NATIVE.panel_bytes(code, width)
    data = (arena or PackArena(num_bytes)).take(num_bytes)
    NATIVE.pack_matrix(
        data.data_ptr(),
        matrix.detach().data_ptr(),
        code,
        matrix.stride(0),
        width,
        halves.data_ptr(),
        len(halves),
        torch.get_num_threads(),
    )
    return PackedMatrix((num_rows, width), matrix.dtype, tuple(sizes), paired, data, halves)


def unpacked(matrix: Tensor | PackedMatrix) -> Tensor:
    """The matrix as a tensor, whichever it is."""
    return matrix.unpack() if isinstance(matrix, PackedMatrix) else matrix


def _check(num_rows: int, dtype: torch.dtype, splits: Sequence[int] | None, paired: bool) -> None:
    if NATIVE is None:
        raise RuntimeError(f"pack_matrix: {MISSING}")
    if dtype not in DTYPE_CODES:
        raise TypeError(f"pack_matrix: expected dtype float32 or bfloat16, got {dtype}")
    sizes = _sizes(num_rows, splits)
    if sum(sizes) != num_rows or min(sizes) < 0:
        raise ValueError(f"pack_matrix: splits: expected a sum of N = {num_rows}, got {sizes}")
    if paired and (len(sizes) != 2 or sizes[0] != sizes[1]):
        raise ValueError(f"pack_matrix: splits: expected two equal sizes to pair, got {sizes}")


def _sizes(num_rows: int, splits: Sequence[int] | None) -> list[int]:
    return [num_rows] if splits is None else list(splits)


def _halves(sizes: Sequence[int], paired: bool) -> list[tuple[int, int, int, int]]:
    """(first row, first column, columns in use, projection) of every half, panels in full."""
    if paired:
        return list(_paired_halves(sizes[0]))
    halves = []
    for split, (size, stop) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        first = stop - size
        halves += [
            (first + c, first + c, min(_HALF, size - c), split) for c in range(0, size, _HALF)
        ]
    return halves + [(0, 0, 0, 0)] * (len(halves) % 2)


def _paired_halves(size: int) -> Iterator[tuple[int, int, int, int]]:
    for column in range(0, size, _HALF):
        valid = min(_HALF, size - column)
        yield column, column, valid, 0
        yield size + column, column, valid, 1
