"""PyTorch maths of rotary positions and the write into the paged KV cache."""

import torch
from torch import Tensor

from fssa_kernels.checks import bad_value, pick
from fssa_kernels.ops.residual_film_rms_norm.reference import residual_film_rms_norm_ref


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim channels of every head by the token's position.

        y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin   (x1, x2 the two halves: "rotate half")

    Arguments:
        x: [T,H,D] floating; strides are free.
        positions: [T] int32 or int64, rows of cos_sin.
        cos_sin: [max_positions, rotary_dim], rotary_dim even and <= D: cosines in the first
            half, sines in the second.

    Returns [T,H,D] in x.dtype, computed in fp32 (fp64 for fp64 x) and rounded once. Channels past
    rotary_dim pass through. Differentiable in x.

    Source: rotary embeddings, arXiv 2104.09864, in the half-split layout of GPT-NeoX.
    """
    rotary_dim = cos_sin.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = pick("rope_kv_write", "positions", cos_sin, positions).to(wide)
    cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x[..., :rotary_dim].to(wide).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return rotated
    return torch.cat([rotated, x[..., rotary_dim:]], dim=-1)


def head_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    """RMS norm of every head of x [T,H,D], weight [D]; x itself for None. Differentiable."""
    if weight is None:
        return x
    flat = x.reshape(-1, x.shape[-1])
    normed, _ = residual_film_rms_norm_ref(
        flat, None, weight, None, None, None, None, eps, weight_offset
    )
    return normed.view(x.shape)


def rope_kv_write_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    """Normalise and rotate q and k, store k, v at kv_slots (-1: nowhere), return the rotated q."""
    q, k = head_norm(q, q_norm, eps, weight_offset), head_norm(k, k_norm, eps, weight_offset)
    num_pages, page_size = k_cache.shape[:2]
    num_heads = q.shape[1]
    # One rotation for q and k: on small batches the number of torch calls is what costs.
    rotated = apply_rope(torch.cat([q, k], dim=1), positions, cos_sin)
    rotated_q, rotated_k = rotated[:, :num_heads].contiguous(), rotated[:, num_heads:]
    if kv_slots.numel():
        lowest, highest = (int(bound) for bound in kv_slots.aminmax())
        if lowest < -1 or highest >= num_pages * page_size:
            expected = f"-1 or values in [0, {num_pages * page_size})"
            bad_value("rope_kv_write", "kv_slots", expected, str(kv_slots.tolist()))
        if lowest < 0:
            written = kv_slots >= 0
            kv_slots, rotated_k, v = kv_slots[written], rotated_k[written], v[written]
    page, offset = kv_slots // page_size, kv_slots % page_size
    k_cache[page, offset] = rotated_k
    v_cache[page, offset] = v
    return rotated_q
