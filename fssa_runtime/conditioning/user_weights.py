"""What makes answers a user's own, known by content and not by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class UserWeights:
    """A row of the modulation table that can be made when it is needed, and what tells it apart.

    A user whose latent changes has other weights, with another fingerprint; requests keep those
    they came with. Keys and values in the cache are found again by this fingerprint, so it must
    digest everything the row is made from.

    Attributes:
        fingerprint: digest of the content.
        make_row: gives the row ``[W]``.
    """

    fingerprint: bytes
    make_row: Callable[[], torch.Tensor]

    @classmethod
    def of_row(cls, row: torch.Tensor) -> UserWeights:
        """Of a row that is at hand."""
        kept = row.detach().clone()
        numbers = kept.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(str(kept.dtype).encode() + numbers).digest()
        return cls(digest, lambda: kept)
