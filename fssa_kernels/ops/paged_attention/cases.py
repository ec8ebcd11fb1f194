"""Cases of paged_attention: decode, prefill, chunks of one, windows, grouped and plain heads."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fssa_kernels.testing import Inputs, OpCase, normal, num_bytes


@dataclass(frozen=True)
class _Sizes:
    """Sizes of one case: every request is (queries, cached length, its queries included)."""

    requests: tuple[tuple[int, int], ...]
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 8
    page_size: int = 4
    window: int = 0

    def make(self, g: torch.Generator, dtype: torch.dtype) -> Inputs:
        num_pages = [-(-kv_len // self.page_size) for _, kv_len in self.requests]
        num_spare = 2
        order = torch.randperm(sum(num_pages) + num_spare, generator=g).tolist()
        # Unused entries point at a page that holds NaN, as does the unused end of a last page.
        poison = order[-1]
        block_tables = torch.full(
            (len(self.requests), max([*num_pages, 0]) + 1), poison, dtype=torch.int32
        )
        cache_shape = (len(order), self.page_size, self.num_kv_heads, self.head_dim)
        k_cache = torch.full(cache_shape, float("nan"), dtype=dtype)
        v_cache = torch.full(cache_shape, float("nan"), dtype=dtype)
        for b, (_, kv_len) in enumerate(self.requests):
            pages = [order.pop(0) for _ in range(num_pages[b])]
            block_tables[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            for j in range(kv_len):
                page, offset = pages[j // self.page_size], j % self.page_size
                k_cache[page, offset] = normal(g, *cache_shape[2:], dtype=dtype)
                v_cache[page, offset] = normal(g, *cache_shape[2:], dtype=dtype)
        counts = torch.tensor([0, *(num_queries for num_queries, _ in self.requests)])
        num_tokens = int(counts.sum())
        return {
            "q": normal(g, num_tokens, self.num_heads, self.head_dim, dtype=dtype),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_tables": block_tables,
            "kv_lens": torch.tensor([kv_len for _, kv_len in self.requests], dtype=torch.int32),
            "q_indptr": counts.cumsum(0).int(),
            "scale": self.head_dim**-0.5,
            "window": self.window,
        }


def _work(inputs: Inputs) -> tuple[int, int]:
    q, k_cache, window = inputs["q"], inputs["k_cache"], inputs["window"]
    num_keys = num_pairs = 0
    counts = inputs["q_indptr"].diff().tolist()
    for num_queries, kv_len in zip(counts, inputs["kv_lens"].tolist(), strict=True):
        seen = [min(kv_len - num_queries + i + 1, window or kv_len) for i in range(num_queries)]
        num_pairs += sum(seen)
        num_keys += min(kv_len, window + num_queries - 1 if window else kv_len) if seen else 0
    total = 2 * num_bytes(q) + 2 * num_keys * num_bytes(k_cache[0, 0])
    return total, 4 * num_pairs * q.shape[1] * q.shape[2]


_CASES = {
    "decode": _Sizes(((1, 9), (1, 1), (1, 12))),
    "prefill": _Sizes(((7, 7), (4, 4))),
    "chunks-and-decode": _Sizes(((3, 10), (1, 6), (5, 5))),
    "window": _Sizes(((3, 14), (1, 11), (6, 6)), window=4),
    "window-of-one": _Sizes(((2, 9), (1, 3)), window=1),
    "window-wider-than-all": _Sizes(((3, 10), (1, 6)), window=100),
    "one-group": _Sizes(((3, 10), (1, 6)), num_heads=2),
    "one-kv-head": _Sizes(((3, 10), (1, 6)), num_kv_heads=1, head_dim=5),
    "page-of-one": _Sizes(((3, 10), (1, 6)), page_size=1),
    "idle-requests": _Sizes(((0, 0), (2, 5), (0, 6), (1, 8), (0, 0))),
    "no-queries": _Sizes(((0, 3), (0, 0))),
    "no-requests": _Sizes(()),
}


def cases() -> Iterator[OpCase]:
    """Every case of paged_attention."""
    tensors = ("q", "k_cache", "v_cache")
    for name, sizes in _CASES.items():
        yield OpCase("paged_attention", name, sizes.make, _work, tensors)
