"""Latents to rows of the modulation table."""

from typing import Any

import torch
from torch import Tensor

from fssa_kernels.checks import FLOAT_DTYPES, bad_type, check_rank, check_tensor
from fssa_kernels.dispatch import Backend
from fssa_kernels.gpu.backend import triton_backend
from fssa_kernels.ops.expand_modulation.reference import expand_modulation_ref
from fssa_kernels.registration import Op

_NAME = "expand_modulation"
_LATENT_DTYPES = (torch.float32, torch.float64)


def expand_modulation(z: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """rows = z W^T + b: each user's latent becomes their row of the modulation table.

    Arguments:
        z: [n,Z] fp32 or fp64, one latent a user; n = 0 is allowed.
        weight: [W,Z], bias: [W], any floating dtype; computed in z.dtype.
        backend: "auto", "triton" or "reference".

    Returns rows [n,W] in z.dtype. Differentiable in all three. With "triton" a user's row does not
    depend on the others.

    Raises TypeError for a non-tensor or a wrong dtype, ValueError for a wrong shape, device or
    backend. Source: arXiv 2412.13998, the hypernetwork tau(z), linear in z.
    """
    return _OP(*_prepare(z, weight, bias, backend=backend))


def _prepare(z: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> tuple[Any, ...]:
    """The operator's positional arguments, checked."""
    check_rank(_NAME, "z", z, "[n, Z]", 2)
    if z.dtype not in _LATENT_DTYPES:
        bad_type(_NAME, "z", "dtype torch.float32 or torch.float64", str(z.dtype))
    check_rank(_NAME, "weight", weight, "[W, Z]", 2)
    width = weight.shape[0]
    check_tensor(_NAME, "weight", weight, (width, z.shape[1]), FLOAT_DTYPES, z.device)
    check_tensor(_NAME, "bias", bias, (width,), FLOAT_DTYPES, z.device)
    return z, weight, bias, backend


def _fake(z: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return z.new_empty(z.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, weight, bias, _ = inputs
    need_z, need_weight = ctx.needs_input_grad[:2]
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, bias.dtype
    ctx.save_for_backward(z if need_weight else None, weight if need_z else None)


def _backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    z, weight = ctx.saved_tensors
    need_z, need_weight, need_bias = ctx.needs_input_grad[:3]
    dz = drows @ weight.to(drows.dtype) if need_z else None
    dweight = (drows.t() @ z).to(ctx.weight_dtype) if need_weight else None
    dbias = drows.sum(0).to(ctx.bias_dtype) if need_bias else None
    return dz, dweight, dbias, None


_OP = Op(
    _NAME,
    "(Tensor z, Tensor weight, Tensor bias, str backend) -> Tensor",
    prepare=_prepare,
    backends=(
        triton_backend(
            "fssa_kernels.ops.expand_modulation.triton_impl", "expand_modulation_triton"
        ),
        Backend("reference", expand_modulation_ref),
    ),
    fake=_fake,
    save=_save,
    backward=_backward,
)
