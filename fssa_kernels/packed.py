"""Weights laid out once, when they are loaded, in the order the native kernels read them.

A panel holds 32 output columns of the linear, two halves of 16, so that one step of the inner loop
reads two whole vector registers:

    fp32  [panel][K][32]          bf16  [panel][K/2][32][2]  (odd K padded by a zero)

Panels of bf16 may be compressed to three quarters, to the bit (csrc/cpu/compressed.h): the sixteen
most frequent high bytes of a panel take four bits each. What is shorter comes from memory sooner;
the products of some instruction sets read panels so.

The factor A of a low-rank term has few rows and lies in narrow panels ``[half][part]``, each of one
half and a part of the K columns.

A half belongs to one projection of a stack. Where an epilogue multiplies two projections, a panel's
halves are the same 16 columns of both, so that the product never leaves the registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from fssa_kernels.huge_pages import zeros_on_huge_pages
from fssa_kernels.native import DTYPE_CODES, MISSING, NATIVE

_HALF = 16
_BLOCK = 1 << 26
_LINE = 64


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix ``[N, K]`` in panels; stands where the ops take the weight of a linear.

    Attributes:
        shape: ``(N, K)`` of the matrix. dtype: float32 or bfloat16.
        splits: sizes of the stacked projections, sum N.
        paired: whether the two projections are multiplied in an epilogue.
        narrow: whether a panel is one half of a part of the columns.
        data: the panels, uint8. halves: ``[num_halves, 4]`` int32: first row, first column of the
            result, columns in use, projection.
        header_bytes: of a compressed panel, 0 where they are not compressed.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    splits: tuple[int, ...]
    paired: bool
    narrow: bool
    data: Tensor = field(repr=False)
    halves: Tensor = field(repr=False)
    header_bytes: int = 0

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def num_bytes(self) -> int:
        """Memory of the panels, padding included."""
        return self.data.numel()

    @property
    def panel_halves(self) -> int:
        """Halves of a panel."""
        return 1 if self.narrow else 2

    @property
    def num_panels(self) -> int:
        assert NATIVE is not None
        parts: int = NATIVE.shrink_parts(self.shape[1]) if self.narrow else 1
        return len(self.halves) // self.panel_halves * parts

    def unpack(self) -> Tensor:
        """The matrix ``[N, K]`` as it was, to the bit."""
        assert NATIVE is not None
        panels = self.data
        if self.header_bytes:
            panels = _memory(len(self.halves) * _half_bytes(self.dtype, self.shape[1]), None)
            NATIVE.decompress_panels(
                panels.data_ptr(),
                self.data.data_ptr(),
                self.num_panels,
                panels.numel() // (2 * self.num_panels),
                self.header_bytes,
                torch.get_num_threads(),
            )
        matrix = torch.empty(self.shape, dtype=self.dtype)
        NATIVE.unpack_matrix(
            matrix.data_ptr(),
            panels.data_ptr(),
            self.shape[1],
            DTYPE_CODES[self.dtype],
            self.shape[1],
            self.halves.data_ptr(),
            len(self.halves),
            self.panel_halves,
            torch.get_num_threads(),
        )
        return matrix


class PackArena:
    """Memory for many packed matrices, one after the other, on huge pages where there are any.

    It grows by blocks of 64 MiB, or of a matrix that is larger, whose unused end is never touched
    and so takes no memory.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """``num_bytes`` that nobody else has, a multiple of 64 from the one before."""
        if num_bytes > self._free.numel():
            self._free = zeros_on_huge_pages(max(num_bytes, _BLOCK))
        taken = self._free[:num_bytes]
        self._free = self._free[-(-num_bytes // _LINE) * _LINE :]
        return taken


def pack_matrix(
    matrix: Tensor,
    *,
    splits: Sequence[int] | None = None,
    paired: bool = False,
    narrow: bool = False,
    compress: bool | None = None,
    arena: PackArena | None = None,
) -> PackedMatrix:
    """Lay a matrix ``[N, K]`` out for the native kernels.

    Arguments:
        matrix: weight of a linear, or a low-rank factor of one; float32 or bfloat16, CPU.
        splits: sizes of the stacked projections; None means one.
        paired: the two projections, equally large, will be multiplied in an epilogue.
        narrow: what the factor A wants, and nothing else.
        compress: whether panels are compressed where that makes them smaller, which takes bfloat16,
            K a multiple of 4 and at least 64 (twice as much where they are narrow) and numbers of
            few magnitudes; None: where the instruction set in use reads them so.
        arena: where to put it, side by side with others; None for memory of its own.

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
    listed = list(_paired_halves(sizes[0]) if paired else _halves(sizes))
    if not narrow and len(listed) % 2:
        listed.append((0, 0, 0, 0))
    halves = torch.tensor(listed, dtype=torch.int32).reshape(-1, 4)
    if width > 1 and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    num_bytes = len(halves) * _half_bytes(matrix.dtype, width)
    if compress is None:
        compress = NATIVE.reads_compressed()
    compress = compress and matrix.dtype == torch.bfloat16 and width % (8 if narrow else 4) == 0
    # What is going to be compressed is laid out somewhere else first.
    data = _memory(num_bytes, None if compress else arena)
    packed = PackedMatrix(
        (num_rows, width), matrix.dtype, tuple(sizes), paired, narrow, data, halves
    )
    NATIVE.pack_matrix(
        data.data_ptr(),
        matrix.detach().data_ptr(),
        matrix.stride(0),
        DTYPE_CODES[matrix.dtype],
        width,
        halves.data_ptr(),
        len(halves),
        packed.panel_halves,
        torch.get_num_threads(),
    )
    return _compressed(packed, arena) if compress else packed


def _compressed(packed: PackedMatrix, arena: PackArena | None) -> PackedMatrix:
    """The matrix with its panels compressed, or as they are where that is better."""
    assert NATIVE is not None
    panels, num_panels, threads = packed.data, packed.num_panels, torch.get_num_threads()
    num_words = panels.numel() // (2 * max(1, num_panels))
    header_bytes = NATIVE.compressed_header_bytes(panels.data_ptr(), num_panels, num_words, threads)
    if not header_bytes:
        kept = panels if arena is None else arena.take(panels.numel()).copy_(panels)
        return replace(packed, data=kept)
    data = _memory(num_panels * NATIVE.compressed_panel_bytes(header_bytes, num_words), arena)
    NATIVE.compress_panels(
        data.data_ptr(), panels.data_ptr(), num_panels, num_words, header_bytes, threads
    )
    return replace(packed, data=data, header_bytes=header_bytes)


def _half_bytes(dtype: torch.dtype, width: int) -> int:
    assert NATIVE is not None
    num_bytes: int = NATIVE.half_bytes(DTYPE_CODES[dtype], width)
    return num_bytes


def _memory(num_bytes: int, arena: PackArena | None) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8) if arena is None else arena.take(num_bytes)


def unpacked(matrix: Tensor | PackedMatrix) -> Tensor:
    """The matrix as a tensor, whichever it is."""
    return matrix.unpack() if isinstance(matrix, PackedMatrix) else matrix


def _check(num_rows: int, dtype: torch.dtype, splits: Sequence[int] | None, paired: bool) -> None:
    if NATIVE is None:
        raise RuntimeError(f"pack_matrix: {MISSING}")
    if dtype not in DTYPE_CODES:
        raise TypeError(f"pack_matrix: expected dtype float32 or bfloat16, got {dtype}")
    sizes = _sizes(num_rows, splits)
    if not sizes or sum(sizes) != num_rows or min(sizes) < 0:
        raise ValueError(
            f"pack_matrix: splits: expected at least one size and a sum of N = {num_rows}, "
            f"got {sizes}"
        )
    if paired and (len(sizes) != 2 or sizes[0] != sizes[1]):
        raise ValueError(f"pack_matrix: splits: expected two equal sizes to pair, got {sizes}")


def _sizes(num_rows: int, splits: Sequence[int] | None) -> list[int]:
    return [num_rows] if splits is None else list(splits)


def _halves(sizes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first row, first column, columns in use, projection) of every half."""
    for split, (size, stop) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        first = stop - size
        for column in range(0, size, _HALF):
            yield first + column, first + column, min(_HALF, size - column), split


def _paired_halves(size: int) -> Iterator[tuple[int, int, int, int]]:
    for column in range(0, size, _HALF):
        valid = min(_HALF, size - column)
        yield column, column, valid, 0
        yield size + column, column, valid, 1
