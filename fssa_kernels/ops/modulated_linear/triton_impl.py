"""The modulated linear on a GPU: which kernels a call takes, and their launches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fssa_kernels.gpu.backend import unsupported
from fssa_kernels.gpu.launch import facts, launch
from fssa_kernels.gpu.workspace import counters
from fssa_kernels.ops.modulated_linear.triton_config import Config, choose, in_loop, padded_rank
from fssa_kernels.ops.modulated_linear.triton_kernels import expand_kernel, modulated_linear_kernel
from fssa_kernels.ops.modulated_linear.triton_low_rank import shrink_kernel, shrink_rows_kernel

MAX_PROJECTIONS = 4
MAX_RANK = 128


def cannot_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> str | None:
    """Why the kernels are unable to serve these inputs, or None."""
    if len(splits) > MAX_PROJECTIONS:
        return f"{len(splits)} projections are stacked, the kernel takes at most {MAX_PROJECTIONS}"
    reason = unsupported(
        x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, rows=rows, slots=slots
    )
    if reason is not None:
        return reason
    if lora_b is not None and lora_b.shape[-1] > MAX_RANK:
        return f"the rank is {lora_b.shape[-1]}, the kernel takes at most {MAX_RANK}"
    if family == "core" and rows is not None and not rows[:1].is_contiguous():
        return f"one slot's part of rows is not contiguous (strides {rows.stride()})"
    return None


def modulated_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> Tensor:
    """The public function on inputs that `cannot_triton` accepts; NaN for a slot out of range."""
    rank = 0 if lora_b is None else lora_b.shape[-1]
    config = choose(facts(x), x, weight, lora_a, family, splits, epilogue, rank)
    return run_config(
        config, x, weight, bias, lora_a, lora_b, rows, slots, family, splits, epilogue
    )


def run_config(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> Tensor:
    """The call in one configuration; what measuring them needs."""
    if config.way == "vendor" and lora_b is None and epilogue == "none":
        return F.linear(x, weight, bias)
    columns = weight.shape[0] // (1 if epilogue == "none" else 2)
    y = x.new_empty(x.shape[0], columns)
    low: Tensor | None = None
    if lora_a is not None and lora_b is not None:
        rank = lora_b.shape[-1]
        if config.way == "vendor" or not in_loop(x, family, epilogue, rank):
            low = _shrink(x, lora_a, rows, slots, family, len(splits), rank)
    if config.way == "vendor":
        base = F.linear(x, weight, bias)
        _expand(y, base, low, lora_b, slots, family, splits, epilogue)
    else:
        _fused(
            config, y, x, weight, bias, lora_a, lora_b, rows, slots, low, family, splits, epilogue
        )
    return y


def _fused(
    config: Config,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    low: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> None:
    num_tokens, in_features = x.shape
    paired = epilogue != "none"
    tiles_t, tiles_n = _tiles(num_tokens, splits, paired, config.block_t, config.block_n)
    num_tiles = tiles_t * tiles_n
    partial = counter = None
    if config.split_k > 1:
        parts = config.split_k * (2 if paired else 1)
        partial = x.new_empty(parts, *y.shape, dtype=torch.float32)
        counter = counters(num_tiles, x.device)
    launch(
        modulated_linear_kernel,
        (num_tiles, config.split_k),
        {
            "y_ptr": y,
            "partial_ptr": partial,
            "counter_ptr": counter,
            "x_ptr": x,
            "weight_ptr": weight,
            "weight_up_ptr": weight[splits[0] :] if paired else None,
            "bias_ptr": bias,
            "lora_a_ptr": lora_a,
            "rows_ptr": rows,
            "num_tokens": num_tokens,
            "in_features": in_features,
            "num_tiles_t": tiles_t,
            "num_tiles_n": tiles_n,
            "stride_x": x.stride(0),
            "stride_w": weight.stride(0),
            "stride_a": 0 if lora_a is None else lora_a.stride(-2),
            "stride_u": 0 if rows is None else rows.stride(0),
            "PRECISION": _precision(x),
            "SPLIT_K": config.split_k,
            "SWAP": config.swap,
            "EVEN_K": in_features % config.block_k == 0,
            "BLOCK_T": config.block_t,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            **_low_rank(y, x, low, lora_b, rows, slots, family, splits, epilogue),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _expand(
    y: Tensor,
    base: Tensor,
    low: Tensor | None,
    lora_b: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> None:
    # Without tensor cores a tile's products are kept apart, which takes registers.
    block_t, block_n = (16, 32) if base.dtype == torch.float32 else (64, 64)
    if family == "factors":
        block_n = 32
    tiles_t, tiles_n = _tiles(base.shape[0], splits, epilogue != "none", block_t, block_n)
    launch(
        expand_kernel,
        (tiles_t * tiles_n,),
        {
            "y_ptr": y,
            "base_ptr": base,
            "num_tokens": base.shape[0],
            "num_tiles_t": tiles_t,
            "num_tiles_n": tiles_n,
            "stride_base": base.stride(0),
            "BLOCK_T": block_t,
            "BLOCK_N": block_n,
            **_low_rank(y, base, low, lora_b, None, slots, family, splits, epilogue),
        },
    )


def _low_rank(
    y: Tensor,
    x: Tensor,
    low: Tensor | None,
    lora_b: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
) -> dict[str, Any]:
    """What the kernels that add the term have in common."""
    own = family == "factors" and lora_b is not None
    num_users = rows.shape[0] if rows is not None else 0
    if own:
        assert lora_b is not None
        num_users = lora_b.shape[0]
    ends = [sum(splits[: s + 1]) for s in range(len(splits))]
    ends += [ends[-1]] * (MAX_PROJECTIONS - len(ends))
    kind = "none" if lora_b is None else ("loop" if low is None else "given")
    rank = 0 if lora_b is None else lora_b.shape[-1]
    return {
        "lora_b_ptr": lora_b,
        "low_ptr": low,
        "slots_ptr": slots,
        "out_columns": y.shape[1],
        "rank": rank,
        "num_users": num_users,
        "end_0": ends[0],
        "end_1": ends[1],
        "end_2": ends[2],
        "end_3": ends[3],
        "stride_low": 0 if low is None else low.stride(0),
        "stride_b": 0 if lora_b is None else lora_b.stride(-2),
        "stride_b_user": lora_b.stride(0) if own and lora_b is not None else 0,
        "FAMILY": family,
        "LOW": kind,
        "EPILOGUE": epilogue,
        "LOW_PRECISION": _precision(x),
        "S": len(splits),
        "BLOCK_R": padded_rank(rank),
    }


def _shrink(
    x: Tensor,
    lora_a: Tensor,
    rows: Tensor | None,
    slots: Tensor | None,
    family: str,
    num_splits: int,
    rank: int,
) -> Tensor:
    """The modulated u [T, S*R] in fp32."""
    num_tokens, in_features = x.shape
    low = x.new_empty(num_tokens, num_splits * rank, dtype=torch.float32)
    shared = {
        "low_ptr": low,
        "x_ptr": x,
        "lora_a_ptr": lora_a,
        "slots_ptr": slots,
        "in_features": in_features,
        "rank": rank,
        "stride_low": low.stride(0),
        "stride_x": x.stride(0),
        "stride_a": lora_a.stride(-2),
        "BLOCK_R": padded_rank(rank),
    }
    if family == "factors":
        launch(
            shrink_rows_kernel,
            (num_tokens, num_splits),
            {
                **shared,
                "num_users": lora_a.shape[0],
                "stride_a_user": lora_a.stride(0),
                "BLOCK_K": 256,
            },
        )
        return low
    block_t = 16
    launch(
        shrink_kernel,
        (triton.cdiv(num_tokens, block_t), num_splits),
        {
            **shared,
            "rows_ptr": rows,
            "num_tokens": num_tokens,
            "num_users": 0 if rows is None else rows.shape[0],
            "stride_u": 0 if rows is None else rows.stride(0),
            "FAMILY": family,
            "PRECISION": _precision(x),
            "BLOCK_T": block_t,
            "BLOCK_K": 64 if x.dtype == torch.float32 or rank > 32 else 128,
        },
    )
    return low


def _tiles(
    num_tokens: int, splits: Sequence[int], paired: bool, block_t: int, block_n: int
) -> tuple[int, int]:
    sizes = splits[:1] if paired else splits
    return triton.cdiv(num_tokens, block_t), sum(triton.cdiv(size, block_n) for size in sizes)


def _precision(x: Tensor) -> str:
    """Of products in fp32: without tf32 for fp32 x, as in torch.

    For x in half precision u B^T takes tf32, which keeps three bits more of u than bf16 would.
    """
    return "ieee" if x.dtype == torch.float32 else "tf32"
