"""Rows of a matrix by index: token embeddings, and the rows of a step that are sampled from."""

import math
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import FLOAT_DTYPES, INDEX_DTYPES, bad_value, check_rank, check_tensor
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.ops.take_rows.native_impl import cannot_native, take_rows_native
from fssa_kernels.ops.take_rows.reference import take_rows_ref
from fssa_kernels.packed import PackedMatrix
from fssa_kernels.registration import Op, needs_grad

_NAME = "take_rows"


def take_rows(
    table: Tensor | PackedMatrix,
    index: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Rows of a matrix, scaled: y_t = scale * table[index[t]].

    Arguments:
        table: [N,K] fp32, bf16, fp16 or fp64, or what `pack_matrix` made of one: an embedding
            tied to the head of a language model lies in memory once, in the head's layout.
        index: [T] int32 in [0, N).
        scale: factor; the product is rounded to the table's dtype once.
        backend: "auto", "native", "triton" or "reference".

    Returns [T,K] in the table's dtype, fresh. Inference only: raises RuntimeError where a gradient
    would be recorded.

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device or
    backend, and on a CPU an index out of range (on a GPU the row is NaN).
    """
    inputs = _prepare(table, index, scale=scale, backend=backend)
    if isinstance(table, PackedMatrix):
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{_NAME}: table: expected a tensor under torch.compile")
        return _OP.compute(*inputs)
    if needs_grad(table):
        raise RuntimeError(f"{_NAME}: inference only, but table needs a gradient")
    return _OP(*inputs)


def _prepare(
    table: Tensor | PackedMatrix,
    index: Tensor,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    if not isinstance(table, PackedMatrix):
        check_rank(_NAME, "table", table, "[N, K]", 2)
        check_tensor(_NAME, "table", table, tuple(table.shape), FLOAT_DTYPES, table.device)
    check_rank(_NAME, "index", index, "[T]", 1)
    check_tensor(_NAME, "index", index, tuple(index.shape), INDEX_DTYPES, table.device)
    if not math.isfinite(scale):
        bad_value(_NAME, "scale", "a finite number", repr(scale))
    return table, index, scale, backend


def _fake(table: Tensor, index: Tensor, scale: float, backend: str) -> Tensor:
    return table.new_empty(index.shape[0], table.shape[1])


_OP = Op(
    _NAME,
    "(Tensor table, Tensor index, float scale, str backend) -> Tensor",
    prepare=_prepare,
    backends=(
        Backend("native", take_rows_native, cannot_native, records=True),
        triton_backend("fssa_kernels.ops.take_rows.triton_impl", "take_rows_triton"),
        Backend("reference", take_rows_ref),
    ),
    fake=_fake,
)
