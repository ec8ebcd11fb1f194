"""What serving engines do for many adapters: the base product, then a shrink and an expand kernel.

After the algorithm published as SGMV (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285) and used
by the engines since: tokens are grouped by adapter; shrink computes u = x A^T of every group, split
over K; expand adds u B^T to the base product's result, of all stacked projections in one launch.
The grouping is made once for a batch and is not timed. Partial sums of shrink lie side by side and
expand adds them up, which spares the launch that would clear them. The activation is a third
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fssa_kernels.gpu.launch import facts, launch
from fssa_kernels.testing import Inputs


@triton.jit
def shrink_kernel(
    u_ptr,
    x_ptr,
    lora_a_ptr,
    tokens_ptr,
    tiles_ptr,
    num_tokens,
    in_features,
    width,
    k_per_split,
    stride_x,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    projection = tl.program_id(2)
    adapter = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    last = tl.load(tiles_ptr + tile * 3 + 2)
    m = first + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + m, mask=m < last, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    x_rows = x_ptr + token[:, None] * stride_x
    a_rows = lora_a_ptr + (adapter * width + projection * RANK + r[None, :]) * in_features
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, k_per_split, BLOCK_K):
        k = split * k_per_split + start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_rows + k[None, :], mask=(m < last)[:, None] & (k < in_features)[None, :], other=0.0
        )
        a = tl.load(
            a_rows + k[:, None], mask=(r < RANK)[None, :] & (k < in_features)[:, None], other=0.0
        )
        u = tl.dot(x, a, u, input_precision=PRECISION)
    out = u_ptr + (split * num_tokens + token[:, None]) * width + projection * RANK + r[None, :]
    tl.store(out, u, mask=(m < last)[:, None] & (r < RANK)[None, :])


@triton.jit
def expand_kernel(
    y_ptr,
    u_ptr,
    lora_b_ptr,
    tokens_ptr,
    tiles_ptr,
    blocks_ptr,
    num_tokens,
    num_columns,
    width,
    num_splits,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0)
    block = tl.program_id(1)
    adapter = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1)
    last = tl.load(tiles_ptr + tile * 3 + 2)
    projection = tl.load(blocks_ptr + block * 3)
    n = tl.load(blocks_ptr + block * 3 + 1) + tl.arange(0, BLOCK_N)
    n_last = tl.load(blocks_ptr + block * 3 + 2)
    m = first + tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + m, mask=m < last, other=0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    in_u = (m < last)[:, None] & (r < RANK)[None, :]
    u_rows = u_ptr + token[:, None] * width + projection * RANK + r[None, :]
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for _ in range(0, num_splits):
        u += tl.load(u_rows, mask=in_u, other=0.0)
        u_rows += num_tokens * width
    b = tl.load(
        lora_b_ptr + (adapter * num_columns + n[None, :]) * RANK + r[:, None],
        mask=(n < n_last)[None, :] & (r < RANK)[:, None],
        other=0.0,
    )
    delta = tl.dot(u.to(b.dtype), b, input_precision=PRECISION)
    y_tile = y_ptr + token[:, None] * num_columns + n[None, :]
    in_y = (m < last)[:, None] & (n < n_last)[None, :]
    y = tl.load(y_tile, mask=in_y, other=0.0)
    tl.store(y_tile, (y.to(tl.float32) + delta).to(y.dtype), mask=in_y)


@triton.jit
def silu_mul_kernel(out_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < width
    gate = tl.load(y_ptr + row * 2 * width + c, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + row * 2 * width + width + c, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + c, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(y: Tensor) -> Tensor:
    """silu(y[:, :N/2]) * y[:, N/2:] in one kernel."""
    num_tokens, width = y.shape[0], y.shape[1] // 2
    out = y.new_empty(num_tokens, width)
    launch(
        silu_mul_kernel,
        (num_tokens, triton.cdiv(width, 1024)),
        {"out_ptr": out, "y_ptr": y, "width": width, "BLOCK": 1024},
    )
    return out


def base_linear(inputs: Inputs) -> Tensor:
    """The vendor's product and, where there is one, the activation: nobody modulated."""
    y = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    return silu_mul(y) if inputs["epilogue"] == "silu_mul" else y


@dataclass(frozen=True)
class Grouping:
    """Tokens of a batch by adapter, and the columns by projection.

    `tokens` are sorted by adapter. A row of `tiles` is (adapter, first, last) of up to `block_m`
    of them; a row of `blocks` is (projection, first, last) of up to `block_n` columns.
    """

    tokens: Tensor
    tiles: Tensor
    blocks: Tensor
    block_m: int
    block_n: int


def group(slots: Tensor, splits: list[int]) -> Grouping:
    """Group a batch by its slots; reads them, so it synchronises."""
    order = slots.argsort(stable=True)
    adapters, counts = slots.unique(return_counts=True)
    largest = int(counts.max())
    block_m = 64 if largest >= 64 else 32 if largest >= 32 else 16
    tiles = []
    start = 0
    for adapter, count in zip(adapters.tolist(), counts.tolist(), strict=True):
        stop = start + count
        tiles += [(adapter, m, min(m + block_m, stop)) for m in range(start, stop, block_m)]
        start = stop
    blocks = []
    start = 0
    for projection, size in enumerate(splits):
        stop = start + size
        blocks += [(projection, n, min(n + 128, stop)) for n in range(start, stop, 128)]
        start = stop
    as_tensor = {"dtype": torch.int32, "device": slots.device}
    return Grouping(
        order.int(),
        torch.tensor(tiles, **as_tensor),
        torch.tensor(blocks, **as_tensor),
        block_m,
        128,
    )


def multi_lora_linear(inputs: Inputs, grouping: Grouping) -> Tensor:
    """The linear of `inputs`, a `modulated_linear` call of the family "factors"."""
    x, lora_a, lora_b = inputs["x"], inputs["lora_a"], inputs["lora_b"]
    y = F.linear(x, inputs["weight"], inputs["bias"])
    num_tokens, in_features = x.shape
    width, rank = lora_a.shape[1], lora_b.shape[2]
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    num_tiles, projections = len(grouping.tiles), width // rank
    # Two programs for every multiprocessor, of 256 columns of x at least.
    wanted = 2 * facts(x).num_sms // max(1, num_tiles * projections)
    splits = max(1, min(wanted, triton.cdiv(in_features, 256)))
    per_split = 128 * triton.cdiv(triton.cdiv(in_features, splits), 128)
    splits = triton.cdiv(in_features, per_split)
    u = x.new_empty(splits, num_tokens, width, dtype=torch.float32)
    shared = {
        "u_ptr": u,
        "tokens_ptr": grouping.tokens,
        "tiles_ptr": grouping.tiles,
        "num_tokens": num_tokens,
        "width": width,
        "RANK": rank,
        "PRECISION": precision,
        "BLOCK_M": grouping.block_m,
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
    }
    launch(
        shrink_kernel,
        (num_tiles, splits, projections),
        {
            **shared,
            "x_ptr": x,
            "lora_a_ptr": lora_a,
            "in_features": in_features,
            "k_per_split": per_split,
            "stride_x": x.stride(0),
            "BLOCK_K": 128,
        },
    )
    launch(
        expand_kernel,
        (num_tiles, len(grouping.blocks)),
        {
            **shared,
            "y_ptr": y,
            "lora_b_ptr": lora_b,
            "blocks_ptr": grouping.blocks,
            "num_columns": y.shape[1],
            "num_splits": splits,
            "BLOCK_N": grouping.block_n,
        },
    )
    return silu_mul(y) if inputs["epilogue"] == "silu_mul" else y
