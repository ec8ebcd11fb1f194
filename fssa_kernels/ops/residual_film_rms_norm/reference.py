"""PyTorch maths of residual add, FiLM and RMS norm."""

import torch
from torch import Tensor

from fssa_kernels.checks import pick


def residual_film_rms_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    lora_a: Tensor | None,
    gates: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """(normed, h): h = gamma * (residual + x) + beta, normed = h / rms(h) * (weight + offset).

    Both steps in fp32 (fp64 for fp64 x), each rounded to x.dtype once; the norm is taken from the
    rounded h, which is what the next block reads as its residual. With lora_a, normed is followed
    by (normed A^T) * gates[slots], computed in the same precision from the rounded normed.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if rows is None:
        h = x.clone() if residual is None else x + residual
    else:
        s = x.to(wide) if residual is None else x.to(wide) + residual
        assert slots is not None
        gamma, beta = pick("residual_film_rms_norm", "slots", rows, slots).to(wide).unbind(1)
        h = torch.addcmul(beta, gamma, s).to(x.dtype)
    h = h.contiguous()  # torch keeps the layout of x
    h_wide = h.to(wide)
    inverse_rms = torch.rsqrt(h_wide.square().mean(1, keepdim=True) + eps)
    scale = weight.to(wide) + weight_offset if weight_offset else weight.to(wide)
    normed = (h_wide * inverse_rms * scale).to(x.dtype)
    if lora_a is None:
        return normed, h
    u = normed.to(wide) @ lora_a.to(wide).t()
    if gates is not None:
        assert slots is not None
        u = u * pick("residual_film_rms_norm", "slots", gates, slots).to(wide)
    return torch.cat([normed, u.to(x.dtype)], dim=1), h
