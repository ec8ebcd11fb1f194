"""Pages of keys and values, and who holds them."""

from __future__ import annotations

import torch

from ..models.config import DecoderConfig


class KVCache:
    """``num_pages`` pages of ``page_size`` tokens for every layer.

    ``k``, ``v``: ``[L, num_pages, P, Hkv, D]``. Pages are handed out and taken back by number.
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
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_tokens: int) -> list[int] | None:
        """Pages for ``num_tokens`` tokens, or None when too few are free."""
        count = self.pages_for(num_tokens)
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Take pages back.

        Raises:
            ValueError: a page that is free already or does not exist.
        """
        if len(set(pages)) != len(pages) or set(pages) & set(self._free):
            raise ValueError(f"pages {pages} are freed twice")
        if not all(0 <= page < self.num_pages for page in pages):
            raise ValueError(f"pages {pages} are not all in 0..{self.num_pages - 1}")
        self._free.extend(reversed(pages))
