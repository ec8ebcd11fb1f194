"""Inputs of every op at the sizes of real models, built where they are wanted ("meta" as well).

A problem knows the op it is for, the bytes a kernel must move at least and the operations of its
products. Everything is random, nothing is zero but the row of the user that nobody is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_suite.shapes import LinearShape
from fssa_kernels.testing import Inputs


class Random:
    """Random tensors on one device; on "meta" there is nothing to draw."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self._generator = None
        if self.device.type != "meta":
            self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self._generator).mul_(
            std
        )

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device, generator=self._generator)

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(
            low, high, shape, dtype=torch.int32, device=self.device, generator=self._generator
        )

    def order(self, count: int) -> Tensor:
        """0..count-1, shuffled."""
        if self._generator is None:
            return torch.empty(count, dtype=torch.int32, device=self.device)
        return torch.randperm(count, device=self.device, generator=self._generator).int()

    def users(self, num_tokens: int, num_users: int, num_rows: int) -> Tensor:
        """Slots in [1, num_rows) of `num_users` users, each with as many tokens, shuffled."""
        order = self.order(num_tokens)
        stride = max(1, (num_rows - 1) // max(1, num_users))
        return (order % num_users) * stride + 1


@dataclass(frozen=True)
class LinearProblem:
    """`modulated_linear` on `num_tokens` tokens of `num_users` users; 0 rows: just enough."""

    shape: LinearShape
    num_tokens: int
    family: str = "none"
    rank: int = 0
    num_users: int = 1
    num_rows: int = 0
    op: str = "modulated_linear"

    def base(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """The inputs that have nothing to do with users."""
        random, shape = Random(device, seed), self.shape
        k, n = shape.in_features, shape.num_columns
        return {
            "x": random.normal(self.num_tokens, k, dtype=dtype),
            "weight": random.normal(n, k, dtype=dtype, std=k**-0.5),
            "bias": random.normal(n, dtype=dtype) if shape.bias else None,
            "splits": list(shape.splits) if len(shape.splits) > 1 else None,
            "epilogue": shape.epilogue,
        }

    def term(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """The inputs of the low-rank term."""
        if self.family == "none":
            return {"family": "none"}
        random, shape, rank = Random(device, seed + 1_000_000), self.shape, self.rank
        num_rows = self.num_rows or self.num_users + 1
        num_splits, k = len(shape.splits), shape.in_features
        users = (num_rows,) if self.family == "factors" else ()
        inputs: Inputs = {
            "family": self.family,
            "lora_a": random.normal(*users, num_splits * rank, k, dtype=dtype, std=k**-0.5),
            "lora_b": random.normal(*users, shape.num_columns, rank, dtype=dtype, std=rank**-0.5),
            "slots": random.users(self.num_tokens, self.num_users, num_rows),
        }
        if self.family == "factors":
            inputs["lora_b"][0] = 0.0
        if self.family in ("gated", "core"):
            one = (num_splits * rank,) if self.family == "gated" else (num_splits, rank, rank)
            inputs["rows"] = random.normal(num_rows, *one, dtype=dtype)
            inputs["rows"][0] = 0.0
        return inputs

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        return {**self.base(device, dtype, seed), **self.term(device, dtype, seed)}

    @property
    def weight_bytes(self) -> int:
        return 2 * self.shape.num_columns * self.shape.in_features

    def work(self) -> tuple[int, int]:
        """(bytes, flops) at 16 bits a number."""
        shape, rank, tokens = self.shape, self.rank, self.num_tokens
        columns, k = shape.num_columns, shape.in_features
        out = columns // (1 if shape.epilogue == "none" else 2)
        total, flops = self.weight_bytes + 2 * tokens * (k + out), 2 * tokens * columns * k
        if self.family == "none":
            return total, flops
        low = len(shape.splits) * rank * k + columns * rank
        users = min(self.num_users, tokens)
        one = {"static": 0, "gated": 1, "core": rank, "factors": 0}[self.family]
        total += 2 * low * (users if self.family == "factors" else 1)
        total += 2 * users * len(shape.splits) * rank * one
        return total, flops + 2 * tokens * low


def few_rows(inputs: Inputs, count: int = 16) -> tuple[Tensor, Inputs]:
    """Numbers of some tokens, first and last included, and `modulated_linear`'s inputs there."""
    num_tokens = len(inputs["x"])
    index = torch.linspace(0, num_tokens - 1, min(count, num_tokens)).long()
    index = index.to(inputs["x"].device)
    picked = {**inputs, "x": inputs["x"][index]}
    if inputs.get("slots") is not None:
        picked["slots"] = inputs["slots"][index]
    return index, picked


@dataclass(frozen=True)
class NormProblem:
    """`residual_film_rms_norm`, with FiLM, or with the next linear's low-rank input."""

    num_tokens: int
    hidden: int
    film: bool = False
    low_rank: int = 0
    op: str = "residual_film_rms_norm"

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        random, shape = Random(device, seed), (self.num_tokens, self.hidden)
        inputs: Inputs = {
            "x": random.normal(*shape, dtype=dtype),
            "residual": random.normal(*shape, dtype=dtype),
            "weight": random.normal(self.hidden, dtype=dtype),
            "eps": 1e-5,
        }
        users = min(self.num_tokens, 256)
        if self.film:
            inputs["rows"] = random.normal(users + 1, 2, self.hidden, dtype=dtype)
        if self.low_rank:
            std = self.hidden**-0.5
            inputs["lora_a"] = random.normal(self.low_rank, self.hidden, dtype=dtype, std=std)
            inputs["gates"] = random.normal(users + 1, self.low_rank, dtype=dtype)
        if self.film or self.low_rank:
            inputs["slots"] = random.users(self.num_tokens, users, users + 1)
        return inputs

    def work(self) -> tuple[int, int]:
        tokens, hidden = self.num_tokens, self.hidden
        total = 2 * (4 * tokens * hidden + hidden + self.low_rank * (hidden + tokens))
        total += 4 * min(tokens, 256) * hidden * self.film
        return total, 2 * tokens * hidden * self.low_rank


@dataclass(frozen=True)
class RopeProblem:
    """`rope_kv_write` of a step; one page of 16 tokens for every 16 tokens."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: bool = False
    op: str = "rope_kv_write"

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        random, tokens, dim = Random(device, seed), self.num_tokens, self.head_dim
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = random.normal(tokens, sum(heads), dim, dtype=dtype).split(heads, dim=1)
        angles = 6.28 * random.uniform(512, dim // 2)
        cache = (-(-tokens // 16), 16, self.num_kv_heads, dim)
        norms: Inputs = {}
        if self.norm:
            norms = {name: random.normal(dim, dtype=dtype) for name in ("q_norm", "k_norm")}
            norms["eps"] = 1e-6
        return {
            "q": q,
            "k": k,
            "v": v,
            "positions": random.ints(0, 512, tokens),
            "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
            "k_cache": random.normal(*cache, dtype=dtype),
            "v_cache": random.normal(*cache, dtype=dtype),
            "kv_slots": random.order(tokens),
            **norms,
        }

    def work(self) -> tuple[int, int]:
        numbers = self.num_tokens * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return 4 * numbers + 4 * self.num_tokens * self.head_dim, 0


@dataclass(frozen=True)
class AttentionProblem:
    """`paged_attention` of `batch` requests with as many queries and keys each."""

    batch: int
    num_queries: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    page_size: int = 16
    op: str = "paged_attention"

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        random, batch = Random(device, seed), self.batch
        pages = -(-self.context // self.page_size)
        cache = (batch * pages, self.page_size, self.num_kv_heads, self.head_dim)
        device = random.device
        shape = (batch * self.num_queries, self.num_heads, self.head_dim)
        return {
            "q": random.normal(*shape, dtype=dtype),
            "k_cache": random.normal(*cache, dtype=dtype),
            "v_cache": random.normal(*cache, dtype=dtype),
            "block_tables": random.order(batch * pages).view(batch, pages),
            "kv_lens": torch.full((batch,), self.context, dtype=torch.int32, device=device),
            "q_indptr": self.num_queries
            * torch.arange(batch + 1, dtype=torch.int32, device=device),
            "scale": self.head_dim**-0.5,
            "window": self.window,
        }

    def work(self) -> tuple[int, int]:
        n, heads = self.num_queries, self.num_heads * self.head_dim
        keys = self.context * self.num_kv_heads * self.head_dim
        pairs = n * self.context - n * (n - 1) // 2
        return self.batch * 4 * (keys + n * heads), 4 * self.batch * pairs * heads


@dataclass(frozen=True)
class SampleProblem:
    """`sample` of every row in one way: "greedy", "drawn", "filtered"."""

    batch: int
    vocab_size: int
    way: str
    op: str = "sample"

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        random, batch = Random(device, seed), self.batch
        filtered = self.way == "filtered"

        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=random.device)

        return {
            "logits": random.normal(batch, self.vocab_size, dtype=dtype, std=2.0),
            "temperature": full(0.0 if self.way == "greedy" else 0.8),
            "top_k": full(50 if filtered else 0, torch.int32),
            "top_p": full(0.9 if filtered else 1.0),
            "min_p": full(0.02 if filtered else 0.0),
            "uniform": random.uniform(batch),
            "forced": full(-1, torch.int32),
        }

    def work(self) -> tuple[int, int]:
        return 2 * self.batch * self.vocab_size, 0


@dataclass(frozen=True)
class TakeProblem:
    """`take_rows`: an embedding's rows."""

    num_rows: int
    width: int
    taken: int
    op: str = "take_rows"

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        random = Random(device, seed)
        return {
            "table": random.normal(self.num_rows, self.width, dtype=dtype),
            "index": random.ints(0, self.num_rows, self.taken),
        }

    def work(self) -> tuple[int, int]:
        return 4 * self.taken * self.width, 0


@dataclass(frozen=True)
class ExpandProblem:
    """`expand_modulation`: new users' latents to rows."""

    num_latents: int
    latent_dim: int
    width: int
    op: str = "expand_modulation"

    def inputs(self, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        random = Random(device, seed)
        std = self.latent_dim**-0.5
        return {
            "z": random.normal(self.num_latents, self.latent_dim, dtype=torch.float32),
            "weight": random.normal(self.width, self.latent_dim, dtype=dtype, std=std),
            "bias": random.normal(self.width, dtype=dtype),
        }

    def work(self) -> tuple[int, int]:
        total = 2 * self.width * (self.latent_dim + 1) + 4 * self.num_latents * self.width
        return total, 2 * self.num_latents * self.latent_dim * self.width


Problem = (
    LinearProblem
    | NormProblem
    | RopeProblem
    | AttentionProblem
    | SampleProblem
    | TakeProblem
    | ExpandProblem
)
