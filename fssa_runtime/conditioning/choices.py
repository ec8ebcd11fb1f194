"""What a user chose among answers: one preferred to another, or to several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.messages import Content, is_chat


class Choice(NamedTuple):
    """As the answer to ``prompt`` a user preferred ``chosen`` to ``rejected``: to one other, or to
    each of a list."""

    prompt: Content
    chosen: Content
    rejected: Content | Sequence[Content]

    @property
    def all_rejected(self) -> tuple[Content, ...]:
        """Every answer that was passed over."""
        if isinstance(self.rejected, str) or is_chat(self.rejected):
            return (self.rejected,)
        return tuple(self.rejected)


# A choice as callers write it.
ChoiceLike = Choice | tuple[Content, Content, Content | Sequence[Content]]


def options_of(choices: Sequence[Choice]) -> list[tuple[Content, Content]]:
    """All options as (prompt, answer): what was chosen in every choice, then what was rejected,
    choice by choice."""
    return [
        *((choice.prompt, choice.chosen) for choice in choices),
        *((choice.prompt, answer) for choice in choices for answer in choice.all_rejected),
    ]


def arranged(choices: Sequence[Choice], embedded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors ``[m, E]`` of `options_of` as the encoder takes n choices, in the same dtype.

    Pairs alone: chosen ``[n, E]``, rejected ``[n, E]``, mask ``[n]``. Choices among up to R + 1:
    rejected ``[n, R, E]``, mask ``[n, R]``. The mask says which options are real; others are 0.
    """
    counts = [len(choice.all_rejected) for choice in choices]
    chosen, rejected = embedded.split([len(choices), sum(counts)])
    if max(counts, default=1) == 1:
        return chosen, rejected, torch.ones(len(choices), dtype=torch.bool)
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    wide = embedded.new_zeros(*mask.shape, embedded.shape[1])
    wide[mask] = rejected
    return chosen, wide, mask
