"""Residual add, FiLM and RMS norm in one op: what happens between two blocks of a decoder."""

from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import (
    INDEX_DTYPES,
    bad_value,
    check_float,
    check_rank,
    check_tensor,
)
from fssa_kernels.dispatch import Backend
from fssa_kernels.ops.residual_film_rms_norm.gradient import (
    residual_film_rms_norm_bwd,
    save_for_bwd,
)
from fssa_kernels.ops.residual_film_rms_norm.native_impl import (
    cannot_native,
    residual_film_rms_norm_native,
)
from fssa_kernels.ops.residual_film_rms_norm.reference import residual_film_rms_norm_ref
from fssa_kernels.registration import Op

_NAME = "residual_film_rms_norm"


def residual_film_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the residual, modulate with the row's user (FiLM), normalise.

        h = gamma * (residual + x) + beta,     gamma, beta = rows[slots[t]]
        normed = h / sqrt(mean(h^2) + eps) * (weight + weight_offset)

    Arguments:
        x: [T,C] fp32, bf16, fp16 or fp64. residual: [T,C], x.dtype, or None for zero.
        weight: [C], x.dtype or fp32; `weight_offset` is 1 for norms that store weight - 1.
        rows: [U,2,C] (gamma, beta), x.dtype or fp32, possibly a strided view of a table; None
            for no FiLM. slots: [T] int32 in [0, U), needed with rows, not read without.
        eps: added to the mean square, >= 0.
        backend: "auto", "native" or "reference".

    Returns (normed, h), both [T,C] in x.dtype, both fresh. Computed in fp32 (fp64 for fp64 x); h
    is rounded to x.dtype before the norm is taken from it. Differentiable in x, residual, weight
    and rows. A row's result does not depend on the other rows.

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device,
    eps or backend, missing slots, and on a CPU a slot out of range.

    Source: FiLM on block outputs as in arXiv 2412.13998; RMS norm as in arXiv 1910.07467.
    """
    return _OP(
        *_prepare(
            x,
            residual,
            weight,
            rows,
            slots,
            eps=eps,
            weight_offset=weight_offset,
            backend=backend,
        )
    )


def _prepare(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "x", x, "[T, C]", 2)
    check_float(_NAME, "x", x)
    dtype, device = x.dtype, x.device
    num_tokens, num_channels = x.shape
    if residual is not None:
        check_tensor(_NAME, "residual", residual, (num_tokens, num_channels), (dtype,), device)
    side_dtypes = (dtype, torch.float32)
    check_tensor(_NAME, "weight", weight, (num_channels,), side_dtypes, device)
    if rows is None:
        slots = None
    else:
        check_rank(_NAME, "rows", rows, "[U, 2, C]", 3)
        check_tensor(_NAME, "rows", rows, (rows.shape[0], 2, num_channels), side_dtypes, device)
        check_tensor(_NAME, "slots", slots, (num_tokens,), INDEX_DTYPES, device)
    if not eps >= 0:
        bad_value(_NAME, "eps", "a number >= 0", repr(eps))
    return x, residual, weight, rows, slots, eps, weight_offset, backend


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    eps: float,
    weight_offset: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_OP = Op(
    _NAME,
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? rows, Tensor? slots, float eps, "
    "float weight_offset, str backend) -> (Tensor, Tensor)",
    prepare=_prepare,
    backends=(
        Backend("native", residual_film_rms_norm_native, cannot_native, records=True),
        Backend("reference", residual_film_rms_norm_ref),
    ),
    fake=_fake,
    save=save_for_bwd,
    backward=residual_film_rms_norm_bwd,
)
