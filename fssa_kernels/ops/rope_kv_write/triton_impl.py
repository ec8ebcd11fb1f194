"""Rotary positions and the cache write on a GPU, in one launch.

A program takes some heads of one token: of q, which it rotates into the output, or of k and v,
which it stores in the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import launch

MAX_HEAD_DIM = 4096
# Channels of a program: 128 threads hold 16 each.
BLOCK_CHANNELS = 2048


@triton.jit
def rotate_kernel_part(
    out,
    x,
    in_heads,
    written,
    norm_ptr,
    cos_sin_row,
    known,
    eps,
    weight_offset,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads that start at x [heads,1], normalised and rotated, to where out [heads,1] points.

    The two halves of the rotation and the channels past it are blocks of their own, because each
    channel meets the one half a rotation away.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    dtype = x.dtype.element_ty
    c = tl.arange(0, BLOCK_HALF)[None, :]
    r = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, :]
    half_mask = in_heads & (c < HALF)
    rest_mask = in_heads & (r < HEAD_DIM)
    x1 = tl.load(x + c, mask=half_mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF + c, mask=half_mask, other=0.0).to(tl.float32)
    if ROTARY_DIM < HEAD_DIM:
        rest = tl.load(x + r, mask=rest_mask, other=0.0)
    if norm_ptr is not None:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if ROTARY_DIM < HEAD_DIM:
            squares += tl.sum(rest.to(tl.float32) * rest.to(tl.float32), 1)
        inverse_rms = (1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps))[:, None]
        # The rotation starts from the rounded norm, as it would from a norm in a launch of its own.
        weight1 = tl.load(norm_ptr + c, mask=c < HALF, other=0.0).to(tl.float32) + weight_offset
        x1 = (x1 * inverse_rms * weight1).to(dtype).to(tl.float32)
        weight2 = tl.load(norm_ptr + HALF + c, mask=c < HALF, other=0.0).to(tl.float32)
        x2 = (x2 * inverse_rms * (weight2 + weight_offset)).to(dtype).to(tl.float32)
        if ROTARY_DIM < HEAD_DIM:
            weight = tl.load(norm_ptr + r, mask=r < HEAD_DIM, other=0.0).to(tl.float32)
            rest = (rest.to(tl.float32) * inverse_rms * (weight + weight_offset)).to(dtype)
    angle_mask = known & (c < HALF)
    cos = tl.load(cos_sin_row + c, mask=angle_mask, other=float("nan"))
    sin = tl.load(cos_sin_row + HALF + c, mask=angle_mask, other=float("nan"))
    mask = half_mask & written
    tl.store(out + c, (x1 * cos - x2 * sin).to(dtype), mask=mask)
    tl.store(out + HALF + c, (x2 * cos + x1 * sin).to(dtype), mask=mask)
    if ROTARY_DIM < HEAD_DIM:
        rest = tl.where(known, rest, float("nan"))
        tl.store(out + r, rest, mask=rest_mask & written)


@triton.jit
def rope_kv_write_kernel(
    rotated_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    positions_ptr,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    kv_slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    num_heads,
    num_kv_heads,
    max_positions,
    num_slots,
    page_size,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_cos_sin,
    stride_k_page,
    stride_k_offset,
    stride_k_cache_head,
    stride_v_page,
    stride_v_offset,
    stride_v_cache_head,
    eps,
    weight_offset,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    # Blocks rather than scalars: the interpreter mistypes masks joined with scalars.
    one = tl.arange(0, 1)
    position = tl.load(positions_ptr + t + one)
    known = ((position >= 0) & (position < max_positions))[:, None]
    cos_sin_row = (cos_sin_ptr + position.to(tl.int64) * stride_cos_sin)[:, None]
    num_q_groups = tl.cdiv(num_heads, BLOCK_HEADS)
    if group < num_q_groups:
        h = (group * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        in_heads = h < num_heads
        rotate_kernel_part(
            rotated_ptr + (t * num_heads + h) * HEAD_DIM,
            q_ptr + t * stride_q + h * stride_q_head,
            in_heads,
            in_heads,
            q_norm_ptr,
            cos_sin_row,
            known,
            eps,
            weight_offset,
            HEAD_DIM,
            ROTARY_DIM,
            BLOCK_HALF,
            BLOCK_REST,
        )
    else:
        h = ((group - num_q_groups) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        in_heads = h < num_kv_heads
        slot = tl.load(kv_slots_ptr + t + one)[:, None]
        stored = (slot >= 0) & (slot < num_slots)
        page, offset = (slot // page_size).to(tl.int64), (slot % page_size).to(tl.int64)
        rotate_kernel_part(
            k_cache_ptr + page * stride_k_page + offset * stride_k_offset + h * stride_k_cache_head,
            k_ptr + t * stride_k + h * stride_k_head,
            in_heads,
            stored,
            k_norm_ptr,
            cos_sin_row,
            known,
            eps,
            weight_offset,
            HEAD_DIM,
            ROTARY_DIM,
            BLOCK_HALF,
            BLOCK_REST,
        )
        d = tl.arange(0, BLOCK_DIM)[None, :]
        mask = in_heads & stored & (d < HEAD_DIM)
        v = tl.load(v_ptr + t * stride_v + h * stride_v_head + d, mask=mask, other=0.0)
        cell = v_cache_ptr + page * stride_v_page + offset * stride_v_offset
        tl.store(cell + h * stride_v_cache_head + d, v, mask=mask)


def cannot_triton(
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
) -> str | None:
    """Why the kernel is unable to serve these inputs, or None."""
    if q.shape[2] > MAX_HEAD_DIM:
        return f"D is {q.shape[2]}, the kernel holds heads of at most {MAX_HEAD_DIM}"
    return unsupported(
        q=q,
        k=k,
        v=v,
        positions=positions,
        cos_sin=cos_sin,
        k_cache=k_cache,
        v_cache=v_cache,
        kv_slots=kv_slots,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def rope_kv_write_triton(
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
    """The public function on inputs that `cannot_triton` accepts.

    For a position out of range q's row and the stored k are NaN; a kv slot out of range stores
    nothing.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, num_kv_heads, _ = k_cache.shape
    rotary_dim = cos_sin.shape[1]
    rotated = q.new_empty(num_tokens, num_heads, head_dim)
    block_dim = triton.next_power_of_2(head_dim)
    most = triton.next_power_of_2(max(num_heads, num_kv_heads))
    block_heads = max(1, min(BLOCK_CHANNELS // block_dim, most))
    launch(
        rope_kv_write_kernel,
        (num_tokens, triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads)),
        {
            "rotated_ptr": rotated,
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "positions_ptr": positions,
            "cos_sin_ptr": cos_sin,
            "k_cache_ptr": k_cache,
            "v_cache_ptr": v_cache,
            "kv_slots_ptr": kv_slots,
            "q_norm_ptr": q_norm,
            "k_norm_ptr": k_norm,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "max_positions": cos_sin.shape[0],
            "num_slots": num_pages * page_size,
            "page_size": page_size,
            "stride_q": q.stride(0),
            "stride_q_head": q.stride(1),
            "stride_k": k.stride(0),
            "stride_k_head": k.stride(1),
            "stride_v": v.stride(0),
            "stride_v_head": v.stride(1),
            "stride_cos_sin": cos_sin.stride(0),
            "stride_k_page": k_cache.stride(0),
            "stride_k_offset": k_cache.stride(1),
            "stride_k_cache_head": k_cache.stride(2),
            "stride_v_page": v_cache.stride(0),
            "stride_v_offset": v_cache.stride(1),
            "stride_v_cache_head": v_cache.stride(2),
            "eps": eps,
            "weight_offset": weight_offset,
            "HEAD_DIM": head_dim,
            "ROTARY_DIM": rotary_dim,
            "BLOCK_HEADS": block_heads,
            "BLOCK_HALF": max(1, triton.next_power_of_2(rotary_dim // 2)),
            "BLOCK_REST": max(1, triton.next_power_of_2(head_dim - rotary_dim)),
            "BLOCK_DIM": block_dim,
        },
    )
    return rotated
