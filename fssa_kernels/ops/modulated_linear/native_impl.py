"""The modulated linear on the CPU in C++ (csrc/cpu/modulated_linear.h): support and calls."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.native import (
    DTYPE_CODES,
    NATIVE,
    address,
    empty,
    launch,
    rows_of,
    unsupported,
)
from fssa_kernels.packed import PackedMatrix, pack_matrix

# Family and Epilogue in csrc/cpu/modulated_linear.h.
_FAMILY_CODES = {"none": 0, "static": 1, "gated": 2, "core": 3, "factors": 4}
_EPILOGUE_CODES = {"none": 0, "silu_mul": 1, "gelu_tanh_mul": 2}


def cannot_native(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None,
    lora_a: Tensor | PackedMatrix | None,
    lora_b: Tensor | PackedMatrix | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> str | None:
    """Why the native kernel is unable to serve these inputs, or None."""
    reason = unsupported(x=x, bias=bias, rows=rows, slots=slots)
    if reason is not None:
        return reason
    if family == "core" and rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    for name, matrix in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if isinstance(matrix, PackedMatrix):
            if matrix.narrow != (name == "lora_a"):
                return f"{name} was packed with narrow={matrix.narrow}"
            if matrix.header_bytes and not _reads_compressed():
                return f"{name} is compressed, which this instruction set does not read"
            if name == "lora_a" and (len(matrix.splits) != 1 or matrix.paired):
                return (
                    f"lora_a was packed for splits {matrix.splits} with paired={matrix.paired}, "
                    f"not for one split ({matrix.shape[0]},) with paired=False"
                )
            if name != "lora_a" and (
                matrix.splits != tuple(splits) or matrix.paired != (epilogue != "none")
            ):
                return (
                    f"{name} was packed for splits {matrix.splits} and epilogue "
                    f"{'some' if matrix.paired else 'none'}, not {tuple(splits)} and {epilogue!r}"
                )
        elif matrix is not None and matrix.dtype not in DTYPE_CODES:
            return f"{name} is {matrix.dtype}, the kernel takes float32 and bfloat16"
    # Packing takes any strides; the factors of users are read where they lie.
    if family == "factors" and isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor):
        return unsupported(lora_a=lora_a, lora_b=lora_b)
    return None


def avoid_native(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None,
    lora_a: Tensor | PackedMatrix | None,
    lora_b: Tensor | PackedMatrix | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> str | None:
    """Why `auto` prefers the reference on inputs the native kernel could serve, or None."""
    if isinstance(weight, PackedMatrix):
        return None
    return "weight is not packed, and packing it for one call reads it twice and writes it once"


def modulated_linear_native(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    bias: Tensor | None,
    lora_a: Tensor | PackedMatrix | None,
    lora_b: Tensor | PackedMatrix | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> Tensor:
    """The public function on inputs that `cannot_native` accepts; ValueError for a bad slot."""
    assert NATIVE is not None
    num_tokens, in_features = x.shape
    packed = _packed(weight, splits, epilogue)
    num_columns = packed.shape[0] if epilogue == "none" else packed.shape[0] // 2
    y = empty(x, (num_tokens, num_columns), x.dtype, apart=True)
    rank = num_users = 0
    low_rank: Tensor | None = None
    partial: Tensor | None = None
    own: Tensor | None = None
    unmixed: Tensor | None = None
    widened: Tensor | None = None
    if x.dtype == torch.bfloat16:
        # Where an instruction set has no products of bf16, those of several rows read x from here.
        widened = empty(x, (num_tokens, in_features), torch.float32)
    shrink: Tensor | PackedMatrix | None = None
    expand: Tensor | PackedMatrix | None = None
    if family == "factors":
        assert isinstance(lora_a, Tensor)
        assert isinstance(lora_b, Tensor)
        shrink, expand = lora_a, lora_b
        rank, num_users = lora_b.shape[-1], lora_a.shape[0]
        low_rank = empty(x, (num_tokens, len(splits) * rank), torch.float32)
    elif lora_a is not None and lora_b is not None:
        shrink = lora_a if isinstance(lora_a, PackedMatrix) else _pack(lora_a, narrow=True)
        expand = _packed(lora_b, splits, epilogue)
        rank, num_users = expand.shape[1], 0 if rows is None else rows.shape[0]
        width, most_rows = len(splits) * rank, NATIVE.MOST_ROWS
        low_rank = empty(x, (num_tokens, width), torch.float32)
        partial = empty(x, (most_rows, NATIVE.shrink_parts(in_features) * width), torch.float32)
        own = empty(x, (torch.get_num_threads(), most_rows * width), torch.float32, own=True)
        if family == "core":
            unmixed = empty(x, (num_tokens, width), torch.float32)
    call = NATIVE.modulated_linear(
        rows_of(x),
        y.data_ptr(),
        y.stride(0),
        DTYPE_CODES[y.dtype],
        x.data_ptr(),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        packed.data.data_ptr(),
        packed.header_bytes,
        address(bias),
        _side(shrink),
        _side(expand),
        _side(rows),
        address(slots),
        packed.halves.data_ptr(),
        len(packed.halves),
        address(low_rank),
        address(partial),
        address(own),
        address(unmixed),
        address(widened),
        len(splits),
        in_features,
        rank,
        num_users,
        _FAMILY_CODES[family],
        _EPILOGUE_CODES[epilogue],
    )
    launch(
        "modulated_linear",
        call,
        x,
        packed.data,
        packed.halves,
        bias,
        _memory(shrink),
        _memory(expand),
        rows,
        slots,
    )
    return y


def _reads_compressed() -> bool:
    return NATIVE is not None and NATIVE.reads_compressed()


def _packed(matrix: Tensor | PackedMatrix, splits: Sequence[int], epilogue: str) -> PackedMatrix:
    if isinstance(matrix, PackedMatrix):
        return matrix
    return _pack(matrix, splits=splits, paired=epilogue != "none")


def _pack(matrix: Tensor, **layout: Any) -> PackedMatrix:
    """For one call: compressing takes longer than reading what it saves."""
    return pack_matrix(matrix, compress=False, **layout)


def _memory(matrix: Tensor | PackedMatrix | None) -> Tensor | None:
    return matrix.data if isinstance(matrix, PackedMatrix) else matrix


def _side(matrix: Tensor | PackedMatrix | None) -> tuple[int, int, int, int, int]:
    """Address, dtype code, stride from row to row and from user to user, bytes of a header."""
    if matrix is None:
        return 0, 0, 0, 0, 0
    if isinstance(matrix, PackedMatrix):
        return matrix.data.data_ptr(), DTYPE_CODES[matrix.dtype], 0, 0, matrix.header_bytes
    rows, users = (
        (matrix.stride(1), matrix.stride(0)) if matrix.dim() == 3 else (matrix.stride(0), 0)
    )
    return matrix.data_ptr(), DTYPE_CODES[matrix.dtype], rows, users, 0
