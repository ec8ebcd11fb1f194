"""Residual add, FiLM and RMS norm on a GPU, with the next linear's low-rank input if wanted.

Without it, one program takes one row, which stays in registers between the sum and the scaling.
With it, one program takes a block of rows, so that A is read once for all of them: a first pass
over the channels makes h and its mean square, a second one normalises and multiplies with A.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.device import Device
from fssa_kernels.gpu.launch import facts, launch

# A row is kept in registers: 1024 threads hold 32 channels each.
MAX_CHANNELS = 32768
MAX_LOW_RANK = 256
# Rows of a program that also multiplies with A.
_SHRINK_ROWS = 16


@triton.jit
def film_kernel_part(s, rows_ptr, slot, known, stride_u, c, mask, num_channels):
    """gamma * s + beta of one block; a slot nobody has gives NaN."""
    base = rows_ptr + slot.to(tl.int64) * stride_u
    gamma = tl.load(base + c, mask=mask & known, other=float("nan")).to(tl.float32)
    beta = tl.load(base + num_channels + c, mask=mask & known, other=float("nan")).to(tl.float32)
    return gamma * s + beta


@triton.jit
def norm_kernel(
    normed_ptr,
    h_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    rows_ptr,
    slots_ptr,
    num_channels,
    num_users,
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
    s = tl.load(x_ptr + t * stride_x + c, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + t * stride_residual + c, mask=mask, other=0.0).to(tl.float32)
    if rows_ptr is not None:
        # One element rather than a scalar: the interpreter mistypes masks joined with scalars.
        slot = tl.load(slots_ptr + t + tl.arange(0, 1))
        known = (slot >= 0) & (slot < num_users)
        s = film_kernel_part(s, rows_ptr, slot, known, stride_u, c, mask, num_channels)
        s = tl.where(mask, s, 0.0)
    # What the next block reads is the rounded h, so the norm is taken from that.
    rounded = s.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + t * num_channels + c, rounded, mask=mask)
    h = rounded.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(h * h, 0) / num_channels + eps)
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32) + weight_offset
    normed = (h * inverse_rms * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + t * num_channels + c, normed, mask=mask)


@triton.jit
def norm_shrink_kernel(
    normed_ptr,
    h_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    rows_ptr,
    lora_a_ptr,
    gates_ptr,
    slots_ptr,
    num_tokens,
    num_channels,
    low_rank,
    num_users,
    num_gates,
    stride_normed,
    stride_x,
    stride_residual,
    stride_u,
    stride_a,
    stride_gates,
    eps,
    weight_offset,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    in_batch = t < num_tokens
    slot = tl.zeros((BLOCK_T,), tl.int32)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + t, mask=in_batch, other=0)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, num_channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        mask = in_batch[:, None] & (c < num_channels)
        s = tl.load(x_ptr + t[:, None] * stride_x + c, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            before = tl.load(residual_ptr + t[:, None] * stride_residual + c, mask=mask, other=0.0)
            s += before.to(tl.float32)
        if rows_ptr is not None:
            known = ((slot >= 0) & (slot < num_users))[:, None]
            s = film_kernel_part(s, rows_ptr, slot[:, None], known, stride_u, c, mask, num_channels)
        rounded = tl.where(mask, s, 0.0).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + t[:, None] * num_channels + c, rounded, mask=mask)
        h = rounded.to(tl.float32)
        squares += tl.sum(h * h, 1)
    inverse_rms = 1.0 / tl.sqrt_rn(squares / num_channels + eps)
    # Threads of the second pass read what other threads of this program wrote in the first.
    tl.debug_barrier()
    w = tl.arange(0, BLOCK_W)
    u = tl.zeros((BLOCK_T, BLOCK_W), tl.float32)
    for start in range(0, num_channels, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        c = columns[None, :]
        mask = in_batch[:, None] & (c < num_channels)
        h = tl.load(h_ptr + t[:, None] * num_channels + c, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=columns < num_channels, other=0.0)
        scale = weight.to(tl.float32) + weight_offset
        normed = (h * inverse_rms[:, None] * scale[None, :]).to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + t[:, None] * stride_normed + c, normed, mask=mask)
        # [BLOCK_C, BLOCK_W]
        a = tl.load(
            lora_a_ptr + w[None, :] * stride_a + columns[:, None],
            mask=(w[None, :] < low_rank) & (columns[:, None] < num_channels),
            other=0.0,
        )
        u = tl.dot(normed.to(a.dtype), a, u, input_precision=PRECISION)
    mask = in_batch[:, None] & (w[None, :] < low_rank)
    if gates_ptr is not None:
        known = ((slot >= 0) & (slot < num_gates))[:, None]
        gates = tl.load(
            gates_ptr + slot[:, None].to(tl.int64) * stride_gates + w[None, :],
            mask=mask & known,
            other=float("nan"),
        )
        u *= gates.to(tl.float32)
    tail = normed_ptr + t[:, None] * stride_normed + num_channels + w[None, :]
    tl.store(tail, u.to(normed_ptr.dtype.element_ty), mask=mask)


def cannot_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    lora_a: Tensor | None,
    gates: Tensor | None,
    eps: float,
    weight_offset: float,
) -> str | None:
    """Why the kernels are unable to serve these inputs, or None."""
    if x.shape[1] > MAX_CHANNELS:
        return f"x has {x.shape[1]} channels, the kernel holds at most {MAX_CHANNELS}"
    if lora_a is not None and lora_a.shape[0] > MAX_LOW_RANK:
        return f"lora_a has {lora_a.shape[0]} rows, the kernel holds at most {MAX_LOW_RANK}"
    if rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    return unsupported(
        x=x, residual=residual, weight=weight, rows=rows, slots=slots, lora_a=lora_a, gates=gates
    )


def residual_film_rms_norm_triton(
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
    """The public function on inputs that `cannot_triton` accepts; NaN for a slot out of range."""
    num_tokens, num_channels = x.shape
    low_rank = 0 if lora_a is None else lora_a.shape[0]
    normed = x.new_empty(num_tokens, num_channels + low_rank)
    h = x.new_empty(num_tokens, num_channels)
    shared = {
        "normed_ptr": normed,
        "h_ptr": h,
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "rows_ptr": rows,
        "slots_ptr": slots,
        "num_channels": num_channels,
        "num_users": 0 if rows is None else rows.shape[0],
        "stride_x": x.stride(0),
        "stride_residual": 0 if residual is None else residual.stride(0),
        "stride_u": 0 if rows is None else rows.stride(0),
        "eps": eps,
        "weight_offset": weight_offset,
    }
    if lora_a is None:
        block = max(16, triton.next_power_of_2(num_channels))
        num_warps = min(32, max(1, block // 512))
        launch(norm_kernel, (num_tokens,), {**shared, "BLOCK_C": block}, num_warps=num_warps)
        return normed, h
    block_c, block_w, num_stages = shrink_tiles(facts(x), x, lora_a)
    launch(
        norm_shrink_kernel,
        (triton.cdiv(num_tokens, _SHRINK_ROWS),),
        {
            **shared,
            "lora_a_ptr": lora_a,
            "gates_ptr": gates,
            "num_tokens": num_tokens,
            "low_rank": low_rank,
            "num_gates": 0 if gates is None else gates.shape[0],
            "stride_normed": normed.stride(0),
            "stride_a": lora_a.stride(0),
            "stride_gates": 0 if gates is None else gates.stride(0),
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            "BLOCK_T": _SHRINK_ROWS,
            "BLOCK_C": block_c,
            "BLOCK_W": block_w,
        },
        num_warps=8 if block_w > 64 else 4,
        num_stages=num_stages,
    )
    return normed, h


def shrink_tiles(device: Device, x: Tensor, lora_a: Tensor) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_W, stages) of `norm_shrink_kernel` that the device's shared memory holds."""
    block_w = max(16, triton.next_power_of_2(lora_a.shape[0]))
    # Without tensor cores a tile's products are kept apart, which takes registers.
    block_c = 64 if block_w > 128 else 128
    if x.dtype == torch.float32:
        block_c = 16 if block_w > 128 else 32
    num_stages = 3
    # A sixteenth is left to what the compiler keeps there besides.
    while _shrink_bytes(x, lora_a, block_c, block_w, num_stages) > device.shared_bytes * 15 // 16:
        if num_stages > 2:
            num_stages -= 1
        else:
            block_c //= 2
    return block_c, block_w, num_stages


def _shrink_bytes(x: Tensor, lora_a: Tensor, block_c: int, block_w: int, num_stages: int) -> int:
    """Shared memory of a program: A and h of the stages under way, and normed for the product."""
    loaded = block_w * lora_a.element_size() + _SHRINK_ROWS * x.element_size()
    return block_c * ((num_stages - 1) * loaded + _SHRINK_ROWS * lora_a.element_size())
