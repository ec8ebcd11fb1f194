"""Which kernels serve a modulated linear on a GPU, and in what shape.

There are three ways: `fused` (all in one kernel), `vendor` (the library's product, then one kernel
that adds the term and takes the epilogue), and outside this op the extended product, see
`extended.py`. A measured table per device class decides where it has an entry
(`fssa_kernels/gpu/tuned.py`); elsewhere the rules below do, which are reasoned and not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fssa_kernels.gpu.device import Device
from fssa_kernels.gpu.tuned import lookup


@dataclass(frozen=True)
class Config:
    """How one call is served: `way`, and the shape of the fused kernel's programs.

    block_t, block_n, block_k: rows, output columns and input columns of a tile. split_k: programs
    that share a tile. swap: W on the instruction's M side.
    """

    way: str = "fused"
    block_t: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    swap: bool = False
    num_warps: int = 4
    num_stages: int = 4


# From this many rows on a product is limited by arithmetic, where the library is hard to beat.
VENDOR_FROM_ROWS = 257


# What decides the order of a row's sums is measured with so many rows, for all below that number.
ALIKE = ("way", "swap", "block_k", "split_k")
ALIKE_ROWS = 16


def problem_key(
    x: Tensor, family: str, splits: Sequence[int], epilogue: str, rank: int, num_tokens: int
) -> str:
    """The name of a problem in the tuned tables; rows count as the next power of two."""
    rows = 1 << max(0, num_tokens - 1).bit_length()
    sizes = "+".join(str(size) for size in splits)
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{dtype} {family} r{rank} {epilogue} {sizes}x{x.shape[1]} m{rows}"


def alike(config: Config, measured: Config) -> Config:
    """`config`, so that a row is computed as by what was measured with `ALIKE_ROWS` rows."""
    return replace(config, **{name: getattr(measured, name) for name in ALIKE})


def choose(
    device: Device,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
    rank: int,
) -> Config:
    """The measured configuration of this problem on this device, or the heuristic's.

    Below `VENDOR_FROM_ROWS` rows either is `alike` what was measured with `ALIKE_ROWS` rows, and
    the heuristic's where that was not: a row's bits do not depend on how many others there are.
    What was not measured as it is, or with an A of x's dtype, is made to `fit`.
    """

    def measured(num_tokens: int) -> Config | None:
        key = problem_key(x, family, splits, epilogue, rank, num_tokens)
        found = lookup("modulated_linear", device.name, key)
        return None if found is None else Config(**found)

    own = measured(len(x))
    model = measured(ALIKE_ROWS) if len(x) < VENDOR_FROM_ROWS else own
    config = own if model is not None else None
    if config is None:
        config = heuristic(device, x, weight, lora_a, family, splits, epilogue, rank)
    if model is None:
        return config
    config = alike(config, model)
    if config == own and (lora_a is None or lora_a.dtype == x.dtype):
        return config
    return fit(config, device, x, lora_a, epilogue != "none", rank)


def heuristic(
    device: Device,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    family: str,
    splits: Sequence[int],
    epilogue: str,
    rank: int,
) -> Config:
    """A configuration from sizes alone.

    Few rows: the product streams W, so the tiles only have to keep every multiprocessor loading;
    where there are too few of them, several programs share one along K. Nothing but the height of
    the tile depends on the number of rows, so that a row is computed alike in every such batch.
    """
    num_tokens, in_features = x.shape
    paired = epilogue != "none"
    if num_tokens >= VENDOR_FROM_ROWS:
        return Config(way="vendor")
    wide = x.dtype == torch.float32
    # The instruction that reads both sides from shared memory is 64 wide on one of them.
    swap = device.capability in (90, 100, 103, 110) and not wide
    block_n = 64 if swap else 32
    block_t = min(64, max(16, 1 << max(0, num_tokens - 1).bit_length()))
    block_k = 64 if paired or wide or rank > 32 else 128
    # What follows keeps registers from spilling, which compiling for every target has shown.
    if family == "core" and in_loop(x, family, epilogue, rank):
        block_t = 16
    elif family == "core" and rank > 16:
        block_t = min(block_t, 32)
    if wide:
        block_t = min(block_t, 16)
        if paired and rank > 16:
            block_n, block_k = 16, 32
    sizes = splits[:1] if paired else splits
    tiles = sum(-(-size // block_n) for size in sizes)
    split_k = 1
    while tiles * split_k < device.num_sms and split_k < 8 and in_features >= 1024 * split_k:
        split_k *= 2
    config = Config("fused", block_t, block_n, block_k, split_k, swap, 4, 4)
    return fit(config, device, x, lora_a, paired, rank)


def fit(
    config: Config, device: Device, x: Tensor, lora_a: Tensor | None, paired: bool, rank: int
) -> Config:
    """The same with as many stages as the device's shared memory holds."""
    tiles = 2 if paired else 1
    row_bytes = (config.block_t + tiles * config.block_n) * x.element_size()
    row_bytes += tiles * padded_rank(rank) * (x if lora_a is None else lora_a).element_size()
    stage_bytes = row_bytes * config.block_k
    # A sixteenth is left to what the compiler keeps there besides the stages.
    stages = max(1, min(config.num_stages, device.shared_bytes * 15 // 16 // stage_bytes))
    return Config(**{**config.__dict__, "num_stages": stages})


def in_loop(x: Tensor, family: str, epilogue: str, rank: int) -> bool:
    """Whether the fused kernel makes the low-rank input beside its product, for any rows of x.

    For core it holds the M of every row in registers, which a large M, a second sum and products
    without tensor cores leave no room for.
    """
    if family != "core":
        return family in ("static", "gated")
    return rank <= 16 and epilogue == "none" and x.dtype != torch.float32


def padded_rank(rank: int) -> int:
    """Columns of the low-rank tile: a power of two of at least 16."""
    return max(16, 1 << max(0, rank - 1).bit_length())
