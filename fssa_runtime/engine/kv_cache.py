"""Memory of keys and values, in pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fssa_kernels import zeros_on_huge_pages

from ..models.config import DecoderConfig


class KVCache:
    """``num_pages`` pages of ``page_size`` tokens for every layer; who holds them: `PagePool`.

    ``k``, ``v``: ``[L, num_pages, P, Hkv, D]``.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.page_size = page_size
        self.num_pages = num_pages
        self.k, self.v = (_zeros(shape, dtype, device) for _ in range(2))

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages: the content of each (from, to)."""
        if pairs:
            sources, targets = (list(pages) for pages in zip(*pairs, strict=True))
            for memory in (self.k, self.v):
                memory[:, targets] = memory[:, sources]

    def poison(self, pages: Sequence[int]) -> None:
        """Fill pages with NaN, so that whoever still reads them is seen."""
        for memory in (self.k, self.v):
            memory[:, list(pages)] = float("nan")


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return zeros_on_huge_pages(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
