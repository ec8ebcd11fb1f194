"""Gradient of the modulated linear on a GPU.

The large products (dy W, dy^T x) are the vendor's. What the low-rank term adds is made by two
kernels that read dy and x once each: `low_rank_bwd_kernel` gives every row its du and u,
`weight_grad_kernel` sums over rows for dA and dB, in a fixed order; sums of a user's rows are
`fssa_kernels.gpu.segments`. The formulas are those of `gradient.py`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import launch
from fssa_kernels.gpu.segments import Segments, outer_by_slot, sum_by_slot
from fssa_kernels.ops.modulated_linear.reference import modulate, modulate_bwd
from fssa_kernels.ops.modulated_linear.triton_config import padded_rank

MAX_RANK = 128


@triton.jit(do_not_specialize=["num_tokens"])
def low_rank_bwd_kernel(
    du_ptr,
    u_ptr,
    dy_ptr,
    x_ptr,
    lora_a_ptr,
    lora_b_ptr,
    num_tokens,
    in_features,
    rank,
    start,
    end,
    s,
    stride_low,
    stride_dy,
    stride_x,
    stride_a,
    stride_b,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """du' = dy B and u = x A^T of one projection, whose columns are start..end, in fp32."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    t_mask = t < num_tokens
    r_mask = r < rank
    at = t[:, None] * stride_low + s * rank + r[None, :]
    mask = t_mask[:, None] & r_mask[None, :]
    if du_ptr is not None:
        du = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for n0 in range(start, end, BLOCK_K):
            n = n0 + k
            dy = tl.load(
                dy_ptr + t[:, None] * stride_dy + n[None, :],
                mask=t_mask[:, None] & (n < end)[None, :],
                other=0.0,
            )
            b = tl.load(
                lora_b_ptr + n[:, None].to(tl.int64) * stride_b + r[None, :],
                mask=(n < end)[:, None] & r_mask[None, :],
                other=0.0,
            )
            # Factors in fp32 keep their precision: both sides become fp32 then.
            du = tl.dot(dy.to(b.dtype), b, du, input_precision=PRECISION)
        tl.store(du_ptr + at, du, mask=mask)
    if u_ptr is not None:
        u = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for k0 in range(0, in_features, BLOCK_K):
            inside = (k0 + k < in_features)[None, :]
            x = tl.load(
                x_ptr + t[:, None] * stride_x + (k0 + k)[None, :],
                mask=t_mask[:, None] & inside,
                other=0.0,
            )
            a = tl.load(
                lora_a_ptr + (s * rank + r)[:, None].to(tl.int64) * stride_a + (k0 + k)[None, :],
                mask=r_mask[:, None] & inside,
                other=0.0,
            )
            u = tl.dot(x.to(a.dtype), tl.trans(a), u, input_precision=PRECISION)
        tl.store(u_ptr + at, u, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def weight_grad_kernel(
    out_ptr,
    low_ptr,
    wide_ptr,
    num_tokens,
    rank,
    first_low,
    first_wide,
    num_wide,
    stride_low,
    stride_wide,
    stride_out_low,
    stride_out_wide,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[r, c] = sum_t low[t, first_low + r] wide[t, first_wide + c]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    c_mask = c < num_wide
    r_mask = r < rank
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, num_tokens, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        t_mask = (t < num_tokens)[:, None]
        low = tl.load(
            low_ptr + t[:, None] * stride_low + first_low + r[None, :],
            mask=t_mask & r_mask[None, :],
            other=0.0,
        )
        wide = tl.load(
            wide_ptr + t[:, None] * stride_wide + first_wide + c[None, :],
            mask=t_mask & c_mask[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(low), wide.to(tl.float32), total, input_precision=PRECISION)
    at = r[:, None].to(tl.int64) * stride_out_low + c[None, :].to(tl.int64) * stride_out_wide
    mask = r_mask[:, None] & c_mask[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def cannot_triton(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    needs: Sequence[bool],
) -> str | None:
    """Why the kernels are unable to serve these inputs, or None."""
    if family == "factors":
        return "every user of factors has A and B of their own"
    reason = unsupported(dy=dy, x=x, lora_a=lora_a, lora_b=lora_b, rows=rows, slots=slots)
    if reason is not None:
        return reason
    if lora_b is not None and lora_b.shape[1] > MAX_RANK:
        return f"the rank is {lora_b.shape[1]}, the kernel takes at most {MAX_RANK}"
    return None


def modulated_linear_bwd_triton(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """`modulated_linear_bwd_ref` on inputs that `cannot_triton` accepts."""
    need_x, need_weight, need_bias, need_a, need_b, need_rows = needs
    dx = dweight = dbias = da = db = drows = None
    if need_x:
        assert weight is not None
        dx = dy @ weight
    if need_weight:
        assert x is not None
        dweight = dy.t() @ x
    if need_bias:
        dbias = dy.sum(0)
    if lora_a is not None and lora_b is not None and (need_x or need_a or need_b or need_rows):
        rank = lora_b.shape[1]
        dmodulated, u = _low_rank_bwd(
            dy,
            x,
            lora_a,
            lora_b,
            splits,
            need_du=need_x or need_a or need_rows,
            need_u=need_b or need_rows,
        )
        if need_rows:
            assert rows is not None
            assert slots is not None
            assert dmodulated is not None
            assert u is not None
            drows = rows.new_empty(rows.shape)
            segments = Segments.of(slots, rows.shape[0])
            if family == "gated":
                sum_by_slot(dmodulated * u, segments, drows)
            else:
                outer_by_slot(dmodulated, u, segments, drows)
        if need_b:
            assert u is not None
            mixed = modulate(u, rows, slots, family)
            db = lora_b.new_empty(lora_b.shape)
            start = 0
            for s, size in enumerate(splits):
                _weight_grad(db[start : start + size].t(), mixed, s * rank, dy, start)
                start += size
        if need_x or need_a:
            assert dmodulated is not None
            du = modulate_bwd(dmodulated, rows, slots).contiguous()
        if need_a:
            assert x is not None
            da = lora_a.new_empty(lora_a.shape)
            for s in range(len(splits)):
                _weight_grad(da[s * rank : (s + 1) * rank], du, s * rank, x, 0)
        if dx is not None:
            dx.addmm_(du.to(dx.dtype), lora_a.to(dx.dtype))
    return [grad for grad in (dx, dweight, dbias, da, db, drows) if grad is not None]


def _low_rank_bwd(
    dy: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    splits: Sequence[int],
    *,
    need_du: bool,
    need_u: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(du' [T,S*R], u [T,S*R]) in fp32, those that are needed."""
    num_tokens, rank = dy.shape[0], lora_b.shape[1]
    shape = (num_tokens, len(splits) * rank)
    du = dy.new_empty(shape, dtype=torch.float32) if need_du else None
    u = dy.new_empty(shape, dtype=torch.float32) if need_u else None
    wide = dy.dtype == torch.float32
    block_t = 16 if wide else (32 if rank > 32 else 64)
    start = 0
    for s, size in enumerate(splits):
        launch(
            low_rank_bwd_kernel,
            (triton.cdiv(num_tokens, block_t),),
            {
                "du_ptr": du,
                "u_ptr": u,
                "dy_ptr": dy,
                "x_ptr": x,
                "lora_a_ptr": lora_a,
                "lora_b_ptr": lora_b,
                "num_tokens": num_tokens,
                "in_features": lora_a.shape[1],
                "rank": rank,
                "start": start,
                "end": start + size,
                "s": s,
                "stride_low": shape[1],
                "stride_dy": dy.stride(0),
                "stride_x": 0 if x is None else x.stride(0),
                "stride_a": lora_a.stride(0),
                "stride_b": lora_b.stride(0),
                "PRECISION": "ieee" if wide else "tf32",
                "BLOCK_T": block_t,
                "BLOCK_K": 32 if wide and rank > 32 else 64,
                "BLOCK_R": padded_rank(rank),
            },
        )
        start += size
    return du, u


def _weight_grad(out: Tensor, low: Tensor, first_low: int, wide: Tensor, first_wide: int) -> None:
    """out [R,c] = low[:, first_low:][:, :R]^T wide[:, first_wide:][:, :c]; out has any strides."""
    rank, num_wide = out.shape
    block_c = 32 if wide.dtype == torch.float32 else 64
    launch(
        weight_grad_kernel,
        (triton.cdiv(num_wide, block_c),),
        {
            "out_ptr": out,
            "low_ptr": low,
            "wide_ptr": wide,
            "num_tokens": low.shape[0],
            "rank": rank,
            "first_low": first_low,
            "first_wide": first_wide,
            "num_wide": num_wide,
            "stride_low": low.stride(0),
            "stride_wide": wide.stride(0),
            "stride_out_low": out.stride(0),
            "stride_out_wide": out.stride(1),
            "PRECISION": "ieee" if wide.dtype == torch.float32 else "tf32",
            "BLOCK_T": 16 if wide.dtype == torch.float32 else 32,
            "BLOCK_C": block_c,
            "BLOCK_R": padded_rank(rank),
        },
    )
