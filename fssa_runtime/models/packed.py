"""Whole sequences laid end to end: the batch that scoring, embedding and training run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..conditioning.modulation import Modulation
from .attention import PackedAttention
from .decoder import Decoder


@dataclass(frozen=True)
class PackedOptions:
    """m options (prompt and answer tokens) as one flat batch of T tokens.

    ``tokens``, ``positions``: ``[T]`` int32. ``lengths``: tokens of each option.
    ``answer_lengths``: how many of those, at the end, are the answer.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]

    @classmethod
    def pack(
        cls, options: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
    ) -> PackedOptions:
        """From (prompt tokens, answer tokens) pairs, neither empty."""
        lengths = tuple(len(prompt) + len(answer) for prompt, answer in options)
        flat = [token for prompt, answer in options for token in (*prompt, *answer)]
        positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
        return cls(
            torch.tensor(flat, dtype=torch.int32, device=device),
            positions.to(device),
            lengths,
            tuple(len(answer) for _, answer in options),
        )

    def per_token(self, per_option: torch.Tensor) -> torch.Tensor:
        """``[m] -> [T]``: an option's value (its user's slot, say) for each of its tokens."""
        return per_option.repeat_interleave(self._tensor(self.lengths))

    def answer_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the answers' tokens lie in the flat batch ``[A]``, and whose they are ``[A]``."""
        index, owner, end = [], [], 0
        for option, (length, answer) in enumerate(
            zip(self.lengths, self.answer_lengths, strict=True)
        ):
            end += length
            index.append(torch.arange(end - answer, end))
            owner.append(torch.full((answer,), option))
        device = self.tokens.device
        return torch.cat(index).to(device), torch.cat(owner).to(device)

    def hidden(self, decoder: Decoder, modulation: Modulation | None = None) -> torch.Tensor:
        """Final hidden states ``[T, C]``; ``modulation.slots`` are per token."""
        attention = PackedAttention(self.lengths)
        return decoder(self.tokens, self.positions, attention, modulation)

    def _tensor(self, values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, device=self.tokens.device)


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that each group has at most ``max_tokens`` tokens (or one member)."""
    batch: list[int] = []
    total = 0
    for index, length in enumerate(lengths):
        if batch and total + length > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += length
    if batch:
        yield batch
