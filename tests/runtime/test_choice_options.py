"""What a choice holds, and how the options of several become tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fssa_runtime.conditioning.choices import Choice, arranged, options_of
from fssa_runtime.training.data import Message

HI: list[Any] = [{"role": "assistant", "content": "Hi."}]
HO: tuple[Any, ...] = (Message("assistant", "Ho."),)


@pytest.mark.parametrize(
    ("rejected", "expected"),
    [
        ("No.", ("No.",)),
        (["No."], ("No.",)),
        (["No.", "Hm."], ("No.", "Hm.")),
        (("assistant", "user"), ("assistant", "user")),  # two texts, not a message
        (HI, (HI,)),
        (HO, (HO,)),
        ([("assistant", "Hi.")], ([("assistant", "Hi.")],)),
        ([HI, HO], (HI, HO)),
        ((HO,), (HO,)),
        ([], ()),
    ],
)
def test_one_rejected_answer_is_told_from_a_list_of_them(rejected: Any, expected: tuple) -> None:
    assert Choice("Why?", "So.", rejected).all_rejected == expected


def test_options_are_arranged_choice_by_choice() -> None:
    choices = [Choice("p", "a", "b"), Choice("q", "c", ["d", "e", "f"]), Choice("r", "g", ["h"])]
    options = options_of(choices)
    assert options == [(p, x) for p, x in zip("pqrpqqqr", "acgbdefh", strict=True)]
    embedded = torch.tensor([[float(ord(answer))] for _, answer in options])
    chosen, rejected, mask = arranged(choices, embedded)
    assert chosen[:, 0].tolist() == [ord(c) for c in "acg"]
    assert mask.tolist() == [[True, False, False], [True] * 3, [True, False, False]]
    wanted = torch.tensor([[ord("b"), 0, 0], [ord(c) for c in "def"], [ord("h"), 0, 0]])
    assert torch.equal(rejected[..., 0], wanted.float())


def test_pairs_alone_stay_pairs() -> None:
    choices = [Choice("p", "a", "b"), Choice("q", "c", ["d"])]
    chosen, rejected, mask = arranged(choices, torch.arange(8.0).view(4, 2))
    assert chosen.tolist() == [[0, 1], [2, 3]]
    assert rejected.tolist() == [[4, 5], [6, 7]]
    assert mask.tolist() == [True, True]
    nothing = arranged([], torch.zeros(0, 2))
    assert [tuple(part.shape) for part in nothing] == [(0, 2), (0, 2), (0,)]
