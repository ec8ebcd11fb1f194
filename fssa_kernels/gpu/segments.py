"""Sums over the tokens of every user, in a fixed order.

``index_add_`` on a GPU adds in the order in which threads arrive. Here tokens are sorted by slot
(stably, without a synchronisation) and one program sums one user's, first to last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.launch import launch


class Segments(NamedTuple):
    """Tokens by user: those of slot u are order[bounds[u]] .. order[bounds[u + 1]]."""

    order: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, slots: Tensor, num_users: int) -> Segments:
        """From slots [T]; a slot outside [0, num_users) belongs to nobody."""
        ordered, order = torch.sort(slots, stable=True)
        users = torch.arange(num_users + 1, dtype=slots.dtype, device=slots.device)
        return cls(order, torch.searchsorted(ordered, users))


@triton.jit
def sum_by_slot_kernel(
    out_ptr,
    values_ptr,
    order_ptr,
    bounds_ptr,
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    first = tl.load(bounds_ptr + user)
    last = tl.load(bounds_ptr + user + 1)
    total = tl.zeros((BLOCK_W,), tl.float32)
    for start in range(first, last, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        t = tl.load(order_ptr + i, mask=i < last, other=0)
        values = tl.load(
            values_ptr + t[:, None] * width + w[None, :],
            mask=(i < last)[:, None] & (w < width)[None, :],
            other=0.0,
        )
        total += tl.sum(values, 0)
    tl.store(out_ptr + user * width + w, total.to(out_ptr.dtype.element_ty), mask=w < width)


@triton.jit
def outer_by_slot_kernel(
    out_ptr,
    left_ptr,
    right_ptr,
    order_ptr,
    bounds_ptr,
    num_splits,
    rank,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    user = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    first = tl.load(bounds_ptr + user)
    last = tl.load(bounds_ptr + user + 1)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        t = tl.load(order_ptr + i, mask=i < last, other=0)
        at = (t[:, None] * num_splits + s) * rank + r[None, :]
        mask = (i < last)[:, None] & (r < rank)[None, :]
        left = tl.load(left_ptr + at, mask=mask, other=0.0)
        right = tl.load(right_ptr + at, mask=mask, other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    at = ((user * num_splits + s) * rank + r[:, None]) * rank + r[None, :]
    mask = (r < rank)[:, None] & (r < rank)[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_by_slot(values: Tensor, segments: Segments, out: Tensor) -> None:
    """out[u] = sum of values[t] over the tokens of u: values [T,...] fp32 contiguous, out [U,...].

    `out` is written whole; a user without tokens gets zero.
    """
    width = out[:1].numel()
    block = min(128, max(16, triton.next_power_of_2(width)))
    launch(
        sum_by_slot_kernel,
        (out.shape[0], triton.cdiv(width, block)),
        {
            "out_ptr": out,
            "values_ptr": values,
            "order_ptr": segments.order,
            "bounds_ptr": segments.bounds,
            "width": width,
            "BLOCK_T": 32,
            "BLOCK_W": block,
        },
    )


def outer_by_slot(left: Tensor, right: Tensor, segments: Segments, out: Tensor) -> None:
    """out[u, s] = sum of left[t, s] right[t, s]^T over the tokens of u.

    left, right: [T,S*R] fp32, contiguous; out [U,S,R,R], written whole.
    """
    num_users, num_splits, rank, _ = out.shape
    launch(
        outer_by_slot_kernel,
        (num_users, num_splits),
        {
            "out_ptr": out,
            "left_ptr": left,
            "right_ptr": right,
            "order_ptr": segments.order,
            "bounds_ptr": segments.bounds,
            "num_splits": num_splits,
            "rank": rank,
            "BLOCK_T": 16,
            "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        },
        num_warps=4 if rank <= 32 else 8,
    )
