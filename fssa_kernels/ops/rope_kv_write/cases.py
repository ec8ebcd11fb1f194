"""Cases of rope_kv_write: full and partial rotation, strided inputs, tokens that are not stored."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.testing import Inputs, OpCase, normal, num_bytes


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one case."""

    num_tokens: int = 5
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 8
    rotary_dim: int = 8
    page_size: int = 4
    num_pages: int = 5
    num_skipped: int = 0
    strided: bool = False
    norm: bool = False

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        qkv = normal(g, self.num_tokens, sum(heads), self.head_dim, dtype=dtype)
        q, k, v = qkv.split(heads, dim=1)
        if not self.strided:
            q, k, v = (t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
        max_positions = 50
        angles = 10 * torch.rand(max_positions, self.rotary_dim // 2, generator=g)
        cache_shape = (self.num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        kv_slots = torch.randperm(self.num_pages * self.page_size, generator=g)[: self.num_tokens]
        kv_slots[: self.num_skipped] = -1
        norms: Inputs = {}
        if self.norm:
            norms = {name: normal(g, self.head_dim, dtype=dtype) for name in ("q_norm", "k_norm")}
            norms |= {"eps": 1e-6, "weight_offset": 0.5}
        return {
            "q": q,
            "k": k,
            "v": v,
            "positions": torch.randint(
                max_positions, (self.num_tokens,), generator=g, dtype=torch.int32
            ),
            "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
            "k_cache": normal(g, *cache_shape, dtype=dtype),
            "v_cache": normal(g, *cache_shape, dtype=dtype),
            "kv_slots": kv_slots.int(),
            **norms,
        }


def _work(inputs: Inputs) -> tuple[int, int]:
    q, k, cos_sin = inputs["q"], inputs["k"], inputs["cos_sin"]
    num_tokens, rotary_dim = len(q), cos_sin.shape[1]
    total = 2 * num_bytes(q, k, k) + num_tokens * rotary_dim * cos_sin.element_size()
    return total, 3 * num_tokens * (q.shape[1] + k.shape[1]) * rotary_dim


_CASES = {
    "plain": _Sizes(),
    "strided": _Sizes(strided=True),
    "partial-rotation": _Sizes(rotary_dim=6, strided=True),
    "one-head": _Sizes(
        num_heads=1, num_kv_heads=1, head_dim=2, rotary_dim=2, page_size=1, num_pages=9
    ),
    "one-row": _Sizes(num_tokens=1),
    "some-not-stored": _Sizes(num_skipped=2),
    "none-stored": _Sizes(num_skipped=5),
    "normalised": _Sizes(norm=True, strided=True),
    "normalised-wide": _Sizes(norm=True, head_dim=40, rotary_dim=36, num_skipped=1),
    "empty": _Sizes(num_tokens=0),
}


def cases() -> Iterator[OpCase]:
    """Every case of rope_kv_write."""
    for name, sizes in _CASES.items():
        yield OpCase("rope_kv_write", name, sizes.make, _work)
