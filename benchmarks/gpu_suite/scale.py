"""How large everything is: the full suite on a GPU, or a dry run that only shows it works."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Four times the L2 of an H100, so that a weight is never found in it.
_COLD_BYTES = 200 << 20


@dataclass(frozen=True)
class Scale:
    """Sizes of every part.

    Attributes:
        device: where everything lies. dry: whether times mean nothing.
        rounds: samples of every side.
        cold_bytes: what a pass over the copies of a weight reads at least.
        workers: processes that check and compile side by side; 0 for this one.
        dtypes, cases_per_op: of the correctness part; None for all cases.
        models, linears: of the op sweeps, the most telling first. decoders: of whole-model decode.
        tokens: M of the linears, in the order of their interest. more_tokens: of the sweep only.
        ranks: R, likewise; the first is the one of the targets.
        users: besides one and all distinct.
        most_factors: users with factors of their own at most, for they take memory.
        cuda_tokens: M up to which the CUDA C++ kernels stand beside Triton's; 0 for nowhere.
        compiled_tokens, compiler: where torch.compile is measured, and its backend.
        batches, context, page_size: of decode. table_rows: users in the table.
        copy_bytes, product_size: of the two limits.
    """

    device: str
    dry: bool
    rounds: int
    cold_bytes: int
    workers: int
    dtypes: tuple[torch.dtype, ...]
    cases_per_op: int | None
    models: tuple[str, ...]
    linears: tuple[str, ...]
    decoders: tuple[str, ...]
    tokens: tuple[int, ...]
    more_tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    users: int
    most_factors: int
    cuda_tokens: int
    compiled_tokens: tuple[int, ...]
    compiler: str
    batches: tuple[int, ...]
    context: int
    page_size: int
    table_rows: tuple[int, ...]
    flat_tokens: int
    norm_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int
    copy_bytes: int
    product_size: int

    def copies(self, num_bytes: int) -> int:
        """Copies of a weight of this size that one pass goes through."""
        return max(2, min(64, -(-self.cold_bytes // num_bytes)))


FULL = Scale(
    device="cuda",
    dry=False,
    rounds=7,
    cold_bytes=_COLD_BYTES,
    workers=12,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    cases_per_op=None,
    linears=("gate_up", "o", "down", "qkv"),
    models=("llama-8b", "llama-1b", "qwen2.5-7b", "qwen2.5-1.5b"),
    decoders=("llama-8b", "llama-1b"),
    tokens=(16, 1, 128, 32, 2048, 8, 64, 8192),
    more_tokens=(4, 2, 512),
    ranks=(16, 64, 8, 32),
    users=32,
    most_factors=128,
    cuda_tokens=32,
    compiled_tokens=(1, 32, 128),
    compiler="inductor",
    batches=(1, 32, 128, 8),
    context=512,
    page_size=16,
    table_rows=(1, 1_000, 100_000, 1_000_000),
    flat_tokens=32,
    norm_tokens=(1, 32, 128, 2048),
    contexts=(512, 4096),
    prefill=2048,
    copy_bytes=2 << 30,
    product_size=8192,
)

TINY = Scale(
    device="cpu",
    dry=True,
    rounds=2,
    cold_bytes=1,
    workers=0,
    dtypes=(torch.float32,),
    cases_per_op=2,
    linears=("gate_up", "qkv"),
    models=("tiny",),
    decoders=("tiny",),
    tokens=(8,),
    more_tokens=(1,),
    ranks=(16, 64),
    users=4,
    most_factors=8,
    cuda_tokens=0,
    compiled_tokens=(3,),
    compiler="eager",
    batches=(1, 3),
    context=9,
    page_size=4,
    table_rows=(1, 10),
    flat_tokens=3,
    norm_tokens=(3,),
    contexts=(9,),
    prefill=5,
    copy_bytes=1 << 12,
    product_size=32,
)
