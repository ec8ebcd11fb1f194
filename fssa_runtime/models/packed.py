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

    A text is a prompt and what may follow it: one answer, or several that share the prompt, none of
    which sees the others. Options are counted text by text.

    ``tokens``, ``positions``: ``[T]`` int32; every answer's positions follow its prompt's.
    ``lengths``: tokens of each text. ``answers``: tokens of each answer of each text.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @classmethod
    def pack(
        cls, options: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
    ) -> PackedOptions:
        """From (prompt tokens, answer tokens) pairs, neither empty: each a text of its own."""
        return cls.pack_texts([(prompt, (answer,)) for prompt, answer in options], device)

    @classmethod
    def pack_texts(
        cls,
        texts: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
        device: torch.device,
    ) -> PackedOptions:
        """From prompts' tokens with those of their answers, none empty."""
        flat: list[int] = []
        positions: list[int] = []
        for prompt, answers in texts:
            flat.extend(prompt)
            positions.extend(range(len(prompt)))
            for answer in answers:
                flat.extend(answer)
                positions.extend(range(len(prompt), len(prompt) + len(answer)))
        return cls(
            torch.tensor(flat, dtype=torch.int32, device=device),
            torch.tensor(positions, dtype=torch.int32, device=device),
            tuple(len(prompt) + sum(map(len, answers)) for prompt, answers in texts),
            tuple(tuple(map(len, answers)) for _, answers in texts),
        )

    @property
    def answer_lengths(self) -> tuple[int, ...]:
        """Tokens of each option's answer."""
        return tuple(length for lengths in self.answers for length in lengths)

    def per_token(self, per_text: torch.Tensor) -> torch.Tensor:
        """``[texts] -> [T]``: a text's value (its user's slot, say) for each of its tokens."""
        return per_text.repeat_interleave(self._tensor(self.lengths))

    def answer_index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the answers' tokens: where they lie ``[A]``, where what predicts them lies ``[A]``,
        and whose they are ``[A]``."""
        index: list[int] = []
        before: list[int] = []
        owner: list[int] = []
        option = end = 0
        for length, answers in zip(self.lengths, self.answers, strict=True):
            end += length
            start = end - sum(answers)
            prompt_end = start - 1
            for answer in answers:
                tokens = range(start, start + answer)
                index.extend(tokens)
                before.extend((prompt_end, *tokens[:-1]))
                owner.extend([option] * answer)
                start, option = start + answer, option + 1
        return self._tensor(index), self._tensor(before), self._tensor(owner)

    def hidden(self, decoder: Decoder, modulation: Modulation | None = None) -> torch.Tensor:
        """Final hidden states ``[T, C]``; ``modulation.slots`` are per token."""
        attention = PackedAttention(self.lengths, self.answers)
        return decoder(self.tokens, self.positions, attention, modulation)

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
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
