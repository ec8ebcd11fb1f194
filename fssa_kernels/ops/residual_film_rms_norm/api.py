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
from fssa_kernels.cuda.backend import cuda_backend
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
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
    lora_a: Tensor | None = None,
    gates: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add the residual, modulate with the row's user (FiLM), normalise.

        h = gamma * (residual + x) + beta,     gamma, beta = rows[slots[t]]
        normed = h / sqrt(mean(h^2) + eps) * (weight + weight_offset)

    and, if lora_a is given, the low-rank input of the linear that follows, next to it:

        s = (normed A^T) * gates[slots[t]]

    so that one product of [normed | s] with [W | B] (`extend_weight`) is the whole modulated
    linear. Worth it for many rows; `modulated_linear` makes s itself on the way for few.

    Arguments:
        x: [T,C] fp32, bf16, fp16 or fp64. residual: [T,C], x.dtype, or None for zero.
        weight: [C], x.dtype or fp32; `weight_offset` is 1 for norms that store weight - 1.
        rows: [U,2,C] (gamma, beta), x.dtype or fp32, possibly a strided view of a table; None
            for no FiLM.
        lora_a: [W,C], x.dtype or fp32: the stacked A of the next linear, W = S*R; None for none.
        gates: [U,W], x.dtype or fp32, possibly a strided view: g of the gated family; None for
            a static term.
        slots: [T] int32 in [0, U), needed with rows or gates, not read without.
        eps: added to the mean square, >= 0.
        backend: "auto", "native", "triton", "cuda" or "reference"; "auto" does not take "cuda",
            whose speed has not been measured.

    Returns (normed, h), both in x.dtype, both fresh: h [T,C], normed [T,C], with lora_a [T,C+W].
    Computed in fp32 (fp64 for fp64 x); h is rounded to x.dtype before the norm is taken from it.
    Differentiable in x, residual, weight and rows, without lora_a. A row's result does not depend
    on the other rows.

    Raises TypeError for a non-tensor or a wrong dtype; ValueError for a wrong shape, device,
    eps or backend, missing slots, and on a CPU a slot out of range (on a GPU the row is NaN);
    RuntimeError for lora_a where a gradient would be recorded.

    Source: FiLM on block outputs as in arXiv 2412.13998; RMS norm as in arXiv 1910.07467.
    """
    return _OP(
        *_prepare(
            x,
            residual,
            weight,
            rows,
            slots,
            lora_a,
            gates,
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
    lora_a: Tensor | None = None,
    gates: Tensor | None = None,
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
    if rows is not None:
        check_rank(_NAME, "rows", rows, "[U, 2, C]", 3)
        check_tensor(_NAME, "rows", rows, (rows.shape[0], 2, num_channels), side_dtypes, device)
    if lora_a is not None:
        check_rank(_NAME, "lora_a", lora_a, "[W, C]", 2)
        shape = (lora_a.shape[0], num_channels)
        check_tensor(_NAME, "lora_a", lora_a, shape, side_dtypes, device)
    if gates is not None:
        if lora_a is None:
            bad_value(_NAME, "gates", "None without lora_a", "a tensor")
        check_rank(_NAME, "gates", gates, "[U, W]", 2)
        shape = (gates.shape[0], lora_a.shape[0])
        check_tensor(_NAME, "gates", gates, shape, side_dtypes, device)
    if rows is None and gates is None:
        slots = None
    else:
        check_tensor(_NAME, "slots", slots, (num_tokens,), INDEX_DTYPES, device)
    if not eps >= 0:
        bad_value(_NAME, "eps", "a number >= 0", repr(eps))
    return x, residual, weight, rows, slots, lora_a, gates, eps, weight_offset, backend


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    lora_a: Tensor | None,
    gates: Tensor | None,
    eps: float,
    weight_offset: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_channels = x.shape
    width = num_channels if lora_a is None else num_channels + lora_a.shape[0]
    return x.new_empty(num_tokens, width), x.new_empty(x.shape)


_OP = Op(
    _NAME,
    "(Tensor x, Tensor? residual, Tensor weight, Tensor? rows, Tensor? slots, "
    "Tensor? lora_a, Tensor? gates, float eps, float weight_offset, str backend) "
    "-> (Tensor, Tensor)",
    prepare=_prepare,
    backends=(
        Backend("native", residual_film_rms_norm_native, cannot_native, records=True),
        triton_backend(
            "fssa_kernels.ops.residual_film_rms_norm.triton_impl", "residual_film_rms_norm_triton"
        ),
        cuda_backend(
            "fssa_kernels.ops.residual_film_rms_norm.cuda_impl", "residual_film_rms_norm_cuda"
        ),
        Backend("reference", residual_film_rms_norm_ref),
    ),
    fake=_fake,
    save=save_for_bwd,
    backward=residual_film_rms_norm_bwd,
)
