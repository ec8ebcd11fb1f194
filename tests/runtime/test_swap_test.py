"""Who is asked in the swap test, and what it makes of measured texts, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fssa_runtime.training.population import PopulationConfig
from fssa_runtime.training.swap_test import (
    SwapTestConfig,
    _sides,
    _swap,
    spearman,
    unmodulated_nll,
)
from fssa_runtime.training.tastes import TasteScale

from .conditioned import small_model
from .models import reference_model


def test_rank_correlation_with_the_order() -> None:
    assert spearman([0.0, 0.5, 0.6, 3.0, 9.0]) == pytest.approx(1.0)
    assert spearman([4.0, 3.0, 2.0]) == pytest.approx(-1.0)
    # 1 − 6 Σ d² / (n (n² − 1)), with two neighbours swapped.
    assert spearman([1.0, 3.0, 2.0, 4.0, 5.0]) == 0.9  # 1 - 6 * 2 / (5 * 24), exactly: a threshold
    assert spearman([2.0, 2.0, 2.0]) == 0.0
    assert spearman([1.0, 2.0, 2.0, 3.0]) == pytest.approx(np.sqrt(0.9))


@pytest.mark.parametrize(("shift", "passes"), [(1.0, True), (0.2, False), (-1.0, False)])
def test_a_taste_passes_if_more_is_surely_more(shift: float, passes: bool) -> None:
    config = SwapTestConfig.model_construct(mixtures=(0.5, 0.25))
    noise = np.array([1.0, -1.0] * 10)  # a mean of zero, and an error of 0.23
    less = np.zeros(20)
    scores = {
        ("length", "less"): less,
        ("length", "mix 0.25"): less + 0.1,
        ("length", "mix 0.5"): less + 0.05,
        ("length", "more"): less + shift + noise,
        ("length", "unmodulated"): less,
    }
    found = _swap(config, "length", scores)
    assert found["passes"] is passes
    assert found["more_minus_less"]["mean"] == pytest.approx(shift)
    assert found["means_from_less_to_more"] == pytest.approx([0.0, 0.1, 0.05, shift])
    assert not found["monotone"]


def test_who_wants_more_chose_more() -> None:
    """The latent is read off the choices: how much longer the chosen answers are."""

    def infer(_: Any, choices: list) -> torch.Tensor:
        return torch.tensor([float(sum(len(c.chosen) - len(c.rejected) for c in choices))])

    conditioning = SimpleNamespace(infer=infer, blend=lambda parts: float(parts[0][1]))
    answers = {f"question {i}": ["word " * 3, "word " * 12] for i in range(4)}
    population = PopulationConfig(tastes=("length",), num_users=1, choices_per_user=1, strength=99)
    config = SwapTestConfig.model_construct(
        population=population, users_per_side=2, num_choices=4, mixtures=(0.75, 0.5)
    )
    scale = TasteScale.fit([text for both in answers.values() for text in both], ["length"])
    llm: Any = SimpleNamespace(conditioning=conditioning, model=None)
    found = _sides(config, llm, "length", 0, answers, scale, 3)
    longer = 4 * 9 * len("word ")
    assert {c.name: list(c.users) for c in found} == {
        "less": [-longer] * 3,
        "mix 0.5": [0] * 3,
        "mix 0.75": [longer / 2] * 3,
        "more": [longer] * 3,
    }
    assert [c.weight for c in found] == [-1, 0, 0.5, 1]


def test_texts_are_measured_by_the_plain_model(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    prompts, answers = ["Why?", "a longer question", "b"], [list(b"so"), list(b"cdefg"), [7]]
    found = unmodulated_nll(model, prompts, answers)
    reference = reference_model(model.folder)
    for value, prompt, answer in zip(found, prompts, answers, strict=True):
        before = model.chat_tokens(prompt)
        with torch.no_grad():
            log_probs = reference(torch.tensor([before + answer])).logits[0].log_softmax(-1)
        expected = -sum(float(log_probs[len(before) - 1 + i, t]) for i, t in enumerate(answer))
        assert value == pytest.approx(expected, abs=1e-3)
