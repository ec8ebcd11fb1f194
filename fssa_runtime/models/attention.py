"""Two ways for a layer's queries to meet keys and values: a paged cache, or whole sequences.

The decoder calls ``attend`` and does not know which it has. `PagedAttention` serves generation;
`PackedAttention` serves training and scoring, where sequences are known whole and gradients flow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from fssa_kernels import paged_attention, rope_kv_write
from fssa_kernels.ops.rope_kv_write.reference import apply_rope, head_norm


class HeadNorms(NamedTuple):
    """RMS norms of every head of q and k before the rotation; arguments of `rope_kv_write`."""

    q_norm: torch.Tensor
    k_norm: torch.Tensor
    eps: float
    weight_offset: float


class Attention(Protocol):
    """One step's attention over every layer."""

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        window: int,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """Normalise and rotate ``q [T,H,D]`` and ``k [T,Hkv,D]``, attend causally: ``[T,H,D]``."""
        ...


@dataclass(frozen=True)
class PagedAttention:
    """Attention of a step over pages of a key-value cache, which the step's keys are added to.

    ``k_cache``, ``v_cache``: ``[L, num_pages, P, Hkv, D]``; the rest as in
    `fssa_kernels.rope_kv_write` and `fssa_kernels.paged_attention`.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv_slots: torch.Tensor
    block_tables: torch.Tensor
    kv_lens: torch.Tensor
    q_indptr: torch.Tensor

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        window: int,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        settings = {} if norms is None else norms._asdict()
        rotated = rope_kv_write(
            q, k, v, positions, cos_sin, k_cache, v_cache, self.kv_slots, **settings
        )
        return paged_attention(
            rotated,
            k_cache,
            v_cache,
            self.block_tables,
            self.kv_lens,
            self.q_indptr,
            scale=q.shape[-1] ** -0.5,
            window=window,
        )


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention inside each of several whole sequences, laid end to end without padding.

    ``lengths``: tokens of each sequence, their sum is T. ``branches``: of each sequence, lengths of
    the pieces it ends in, none of which sees the others (answers to one prompt, say); one piece, or
    no ``branches`` at all, is a plain sequence. Differentiable.
    """

    lengths: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()
    _masks: dict[int, list[torch.Tensor | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        window: int,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        if norms is not None:
            q = head_norm(q, norms.q_norm, norms.eps, norms.weight_offset)
            k = head_norm(k, norms.k_norm, norms.eps, norms.weight_offset)
        q, k = apply_rope(q, positions, cos_sin), apply_rope(k, positions, cos_sin)
        if window not in self._masks:
            self._masks[window] = self._make_masks(positions, window)
        parts = zip(
            *(t.transpose(0, 1).split(self.lengths, dim=1) for t in (q, k, v)),
            self._masks[window],
            strict=True,
        )
        return torch.cat([_causal(*part) for part in parts], dim=1).transpose(0, 1)

    def _make_masks(self, positions: torch.Tensor, window: int) -> list[torch.Tensor | None]:
        """Of each sequence, what its tokens see ``[S, S]``; None where it is all that precedes."""
        branches = self.branches or ((),) * len(self.lengths)
        parts = zip(positions.split(self.lengths), branches, strict=True)
        return [_seen(places, lengths, window) for places, lengths in parts]


def _seen(positions: torch.Tensor, branches: tuple[int, ...], window: int) -> torch.Tensor | None:
    length = len(positions)
    if len(branches) < 2 and not 0 < window < length:
        return None
    index = torch.arange(length, device=positions.device)
    seen = index[:, None] >= index
    if window:
        seen &= positions[:, None] - positions < window
    if len(branches) > 1:
        sizes = torch.tensor([length - sum(branches), *branches], device=positions.device)
        # 0 is what all share.
        branch = torch.arange(len(sizes), device=positions.device).repeat_interleave(sizes)
        seen &= (branch == 0) | (branch[:, None] == branch)
    return seen


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None
) -> torch.Tensor:
    """One sequence: ``q [H,S,D]``, ``k, v [Hkv,S,D]`` -> ``[H,S,D]``."""
    # A batch of one, because the grouped-query kernels ask for four dimensions.
    out = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, is_causal=seen is None, enable_gqa=True
    )
    return out[0]
