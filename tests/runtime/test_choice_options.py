"""What a choice holds, and how the options of several become tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fssa_runtime.conditioning.choices import Choice, arranged, checked_choices, options_of
from fssa_runtime.errors import InputError
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("p", "a", "b"), Choice("p", "a", "b")),
        (["p", "a", "b"], Choice("p", "a", "b")),
        ({"rejected": "b", "chosen": "a", "prompt": "p"}, Choice("p", "a", "b")),
        (("p", "a", ["b", "c"]), Choice("p", "a", ("b", "c"))),
        (("p", "a", ["b"]), Choice("p", "a", "b")),
        (Choice("p", HI, HO), Choice("p", HI, HO)),
        (("p", "a", [HI, HO]), Choice("p", "a", (HI, HO))),
    ],
)
def test_a_choice_may_be_written_in_several_ways(given: Any, expected: Choice) -> None:
    assert checked_choices([given]) == (expected,)


PARTS: list[Any] = [{"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"expected \(prompt, chosen, rejected\) or a mapping"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "user": "u"}, "expected .prompt, chosen"),
        ("pab", r"expected \(prompt, chosen, rejected\) or a mapping .* got 'pab'"),
        (None, "expected .prompt, chosen, rejected. or a mapping .* got None"),
        (("p", None, "b"), "chosen: expected text or chat messages, got None"),
        (("p", ["a", "b"], "c"), "chosen: expected text or chat messages, got"),
        (("p", [{"role": "assistant"}], "b"), "chosen: expected text or chat messages, got"),
        ((7, "a", "b"), "prompt: expected text or chat messages, got 7"),
        (("p", "a", {"role": "assistant", "content": "b"}), "rejected: expected text or chat"),
        (("p", "a", None), "rejected: expected text or chat messages, got None"),
        (("p", "a", ["b", 7]), "rejected: expected text or chat messages, got 7"),
        (("p", "a", [{"role": "assistant", "content": None}]), "rejected: message 0: content: "),
        (("p", "a", []), "expected at least one rejected answer, got none"),
        ((" ", "a", "b"), "expected words as prompt, got ' '"),
        (("p", [("assistant", "")], "b"), "expected words as chosen, got ''"),
        (("p", "Hi.", HI), "chosen and rejected are the same"),
        (("p", "a", [HI, PARTS]), "an answer was rejected twice"),
    ],
)
def test_what_is_no_choice_is_named(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"choice 1: {message}"):
        checked_choices([("p", "a", "b"), given])


def test_choices_are_a_list() -> None:
    with pytest.raises(InputError, match=r"choices: expected a list of .* got 7"):
        checked_choices(7)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"choice 0: expected .* got 'p'"):
        checked_choices(("p", "a", "b"))  # type: ignore[arg-type]


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
