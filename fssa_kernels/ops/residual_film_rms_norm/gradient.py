"""Gradient of residual add, FiLM and RMS norm, by formula.

With s = residual + x, r = 1 / rms(h), n = h r and w = weight + offset, and dh0 the gradient that
reaches h directly:

    dweight = sum_t dnormed_t * n_t        dn = dnormed * w
    dh = dh0 + r (dn - n mean(dn * n))     ds = dh * gamma
    dgamma[slot_t] += dh_t * s_t           dbeta[slot_t] += dh_t
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import pick, sum_by_index
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.registration import Op


def residual_film_rms_norm_bwd_ref(
    dnormed: Tensor,
    dh_direct: Tensor,
    h: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed ones of ds, dweight and drows, in that order; x is read for drows only."""
    need_s, need_weight, need_rows = needs
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    h_wide, dnormed_wide = h.to(wide), dnormed.to(wide)
    inverse_rms = torch.rsqrt(h_wide.square().mean(1, keepdim=True) + eps)
    unit = h_wide * inverse_rms
    grads = []
    if need_s or need_rows:
        dunit = dnormed_wide * (weight.to(wide) + weight_offset)
        mean = (dunit * unit).mean(1, keepdim=True)
        dh = dh_direct.to(wide) + inverse_rms * (dunit - unit * mean)
    if need_s:
        ds = dh
        if rows is not None and slots is not None:
            ds = dh * pick("residual_film_rms_norm", "slots", rows, slots)[:, 0].to(wide)
        grads.append(ds.to(h.dtype).contiguous())
    if need_weight:
        grads.append((dnormed_wide * unit).sum(0).to(weight.dtype))
    if need_rows:
        assert x is not None
        assert rows is not None
        assert slots is not None
        s = x.to(wide) if residual is None else x.to(wide) + residual
        per_token = torch.stack([dh * s, dh], dim=1)
        grads.append(sum_by_index(per_token, slots, rows.shape[0]).to(rows.dtype))
    return grads


def save_for_bwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep h, and x and residual only for the gradient of gamma."""
    x, residual, weight, rows, slots, lora_a, _, eps, weight_offset, _ = inputs
    if lora_a is not None:
        raise RuntimeError(
            "residual_film_rms_norm: lora_a: expected None where a gradient is wanted, got a tensor"
        )
    need_rows = ctx.needs_input_grad[3]
    ctx.eps, ctx.weight_offset = eps, weight_offset
    ctx.save_for_backward(
        output[1],
        x if need_rows else None,
        residual if need_rows else None,
        weight,
        rows,
        slots,
    )


def residual_film_rms_norm_bwd(
    ctx: Any, dnormed: Tensor, dh_direct: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients for the forward operator's inputs, None where none is needed."""
    need_x, need_residual, need_weight, need_rows = ctx.needs_input_grad[:4]
    needs = [need_x or need_residual, need_weight, need_rows]
    grads = iter(
        OP_BWD(dnormed, dh_direct, *ctx.saved_tensors, ctx.eps, ctx.weight_offset, needs, "auto")
    )
    ds, dweight, drows = (next(grads) if need else None for need in needs)
    dx, dresidual = ds if need_x else None, ds if need_residual else None
    return dx, dresidual, dweight, drows, None, None, None, None, None, None


def _fake_bwd(
    dnormed: Tensor,
    dh_direct: Tensor,
    h: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip((h, weight, rows), needs, strict=True)
        if need and tensor is not None
    ]


def _prepare_bwd(*inputs: Any) -> tuple[Any, ...]:
    """Nothing to check: only the forward's gradient calls, with what the forward has checked."""
    return inputs


OP_BWD = Op(
    "residual_film_rms_norm_bwd",
    "(Tensor dnormed, Tensor dh_direct, Tensor h, Tensor? x, Tensor? residual, Tensor weight, "
    "Tensor? rows, Tensor? slots, float eps, float weight_offset, bool[] needs, str backend) "
    "-> Tensor[]",
    prepare=_prepare_bwd,
    backends=(
        triton_backend(
            "fssa_kernels.ops.residual_film_rms_norm.triton_bwd",
            "residual_film_rms_norm_bwd_triton",
        ),
        Backend("reference", residual_film_rms_norm_bwd_ref),
    ),
    fake=_fake_bwd,
)
