"""What a user chose among answers: one preferred to another, or to several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from reprlib import repr as shortened
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..models.messages import Content, chat_messages, is_chat


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


# A choice as callers write it; a mapping has these three fields.
ChoiceLike = Choice | tuple[Content, Content, Content | Sequence[Content]] | Mapping[str, Any]


def checked_choices(choices: Iterable[ChoiceLike]) -> tuple[Choice, ...]:
    """Choices that can be learnt from; several rejected answers are a tuple.

    Raises:
        InputError: a choice that is not (prompt, chosen, rejected) or a mapping with these three;
            one of them that is neither text nor chat messages, or has no words; no rejected
            answer, or the same answer twice. The choice is named by its number, from 0.
    """
    if not isinstance(choices, Iterable):
        raise InputError(
            f"choices: expected a list of (prompt, chosen, rejected), got {shortened(choices)}"
        )
    return tuple(_checked(f"choice {number}", choice) for number, choice in enumerate(choices))


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


def _checked(name: str, given: object) -> Choice:
    choice = _as_choice(name, given)
    is_list = isinstance(choice.rejected, Sequence)
    answers = choice.all_rejected if is_list else (choice.rejected,)
    if not answers:
        raise InputError(f"{name}: expected at least one rejected answer, got none")
    _turns(name, "prompt", choice.prompt, "user")
    chosen = _turns(name, "chosen", choice.chosen, "assistant")
    rejected = {_turns(name, "rejected", answer, "assistant") for answer in answers}
    if chosen in rejected:
        raise InputError(f"{name}: chosen and rejected are the same")
    if len(rejected) < len(answers):
        raise InputError(f"{name}: an answer was rejected twice")
    return choice._replace(rejected=answers[0] if len(answers) == 1 else answers)


def _as_choice(name: str, given: object) -> Choice:
    if isinstance(given, Mapping):
        if given.keys() == set(Choice._fields):
            return Choice(**given)
    # Three letters are a sequence of three, too.
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 3:
        return Choice(*given)
    raise InputError(
        f"{name}: expected (prompt, chosen, rejected) or a mapping with these three, "
        f"got {shortened(given)}"
    )


def _turns(name: str, field: str, content: Content, role: str) -> tuple[tuple[str, str], ...]:
    """Role and words of every turn: two answers are the same if these are."""
    turns = chat_messages(f"{name}: {field}", content, role)
    for turn in turns:
        if not turn["content"].strip():
            raise InputError(f"{name}: expected words as {field}, got {shortened(turn['content'])}")
    return tuple((turn["role"], turn["content"]) for turn in turns)
