"""Gradient of residual add, FiLM and RMS norm on a GPU; the formulas are those of `gradient.py`.

One program takes one row for ds and, with FiLM, the row's part of dgamma and dbeta, which
`fssa_kernels.gpu.segments` sums for every user. dweight, which only training of whole models
needs, is torch's sum over what the rows leave.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import launch
from fssa_kernels.gpu.segments import Segments, sum_by_slot

# A row is kept in registers, in several forms at once.
MAX_CHANNELS = 8192


@triton.jit
def norm_bwd_kernel(
    ds_ptr,
    dfilm_ptr,
    dscaled_ptr,
    dnormed_ptr,
    dh_ptr,
    h_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    rows_ptr,
    slots_ptr,
    num_channels,
    num_users,
    stride_dnormed,
    stride_dh,
    stride_x,
    stride_residual,
    stride_u,
    eps,
    weight_offset,
    BLOCK_C: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < num_channels
    h = tl.load(h_ptr + t * num_channels + c, mask=mask, other=0.0).to(tl.float32)
    dnormed = tl.load(dnormed_ptr + t * stride_dnormed + c, mask=mask, other=0.0).to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / num_channels + eps)
    unit = h * inverse_rms
    if dscaled_ptr is not None:
        tl.store(dscaled_ptr + t * num_channels + c, dnormed * unit, mask=mask)
    if (ds_ptr is not None) or (dfilm_ptr is not None):
        weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32) + weight_offset
        dunit = tl.where(mask, dnormed * weight, 0.0)
        mean = tl.sum(dunit * unit, 0) / num_channels
        direct = tl.load(dh_ptr + t * stride_dh + c, mask=mask, other=0.0).to(tl.float32)
        dh = direct + inverse_rms * (dunit - unit * mean)
        ds = dh
        if rows_ptr is not None:
            slot = tl.load(slots_ptr + t + tl.arange(0, 1))
            known = (slot >= 0) & (slot < num_users)
            state = rows_ptr + slot.to(tl.int64) * stride_u
            gamma = tl.load(state + c, mask=mask & known, other=float("nan")).to(tl.float32)
            ds = dh * gamma
        if ds_ptr is not None:
            tl.store(ds_ptr + t * num_channels + c, ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if dfilm_ptr is not None:
            s = tl.load(x_ptr + t * stride_x + c, mask=mask, other=0.0).to(tl.float32)
            if residual_ptr is not None:
                before = tl.load(residual_ptr + t * stride_residual + c, mask=mask, other=0.0)
                s += before.to(tl.float32)
            at = dfilm_ptr + t * 2 * num_channels + c
            tl.store(at, dh * s, mask=mask)
            tl.store(at + num_channels, dh, mask=mask)


def cannot_triton(
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
) -> str | None:
    """Why the kernel is unable to serve these inputs, or None."""
    if h.shape[1] > MAX_CHANNELS:
        return f"h has {h.shape[1]} channels, the kernel holds at most {MAX_CHANNELS}"
    if rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    return unsupported(
        dnormed=dnormed,
        dh_direct=dh_direct,
        h=h,
        x=x,
        residual=residual,
        weight=weight,
        rows=rows,
        slots=slots,
    )


def residual_film_rms_norm_bwd_triton(
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
    """`residual_film_rms_norm_bwd_ref` on inputs that `cannot_triton` accepts."""
    need_s, need_weight, need_rows = needs
    num_tokens, num_channels = h.shape
    ds = h.new_empty(h.shape) if need_s else None
    dscaled = h.new_empty(h.shape, dtype=torch.float32) if need_weight else None
    dfilm = h.new_empty((num_tokens, 2, num_channels), dtype=torch.float32) if need_rows else None
    block = max(16, triton.next_power_of_2(num_channels))
    launch(
        norm_bwd_kernel,
        (num_tokens,),
        {
            "ds_ptr": ds,
            "dfilm_ptr": dfilm,
            "dscaled_ptr": dscaled,
            "dnormed_ptr": dnormed,
            "dh_ptr": dh_direct,
            "h_ptr": h,
            "x_ptr": x,
            "residual_ptr": residual,
            "weight_ptr": weight,
            "rows_ptr": rows,
            "slots_ptr": slots,
            "num_channels": num_channels,
            "num_users": 0 if rows is None else rows.shape[0],
            "stride_dnormed": dnormed.stride(0),
            "stride_dh": dh_direct.stride(0),
            "stride_x": 0 if x is None else x.stride(0),
            "stride_residual": 0 if residual is None else residual.stride(0),
            "stride_u": 0 if rows is None else rows.stride(0),
            "eps": eps,
            "weight_offset": weight_offset,
            "BLOCK_C": block,
        },
        num_warps=min(32, max(1, block // 512)),
    )
    grads = [] if ds is None else [ds]
    if dscaled is not None:
        grads.append(dscaled.sum(0).to(weight.dtype))
    if dfilm is not None:
        assert rows is not None
        assert slots is not None
        drows = rows.new_empty(rows.shape)
        sum_by_slot(dfilm, Segments.of(slots, rows.shape[0]), drows)
        grads.append(drows)
    return grads
