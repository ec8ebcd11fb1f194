"""The benchmark of learning one more choice times what it says, of a latent that is right."""

from __future__ import annotations

import pytest

from benchmarks.user_updates import measure, sampled_choices
from fssa_runtime import LLM
from fssa_runtime.users.registry import Users

from ..runtime.conditioned import CHOICES, random_conditioning, small_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    model = small_model(tmp_path_factory.mktemp("user_updates") / "model")
    return LLM(model, random_conditioning(model, "gated"))


def test_every_part_is_timed(llm: LLM) -> None:
    found = measure(llm, CHOICES)
    assert set(found) == {"one_more_ms", "without_reading_ms", "all_anew_ms"}
    assert min(found.values()) > 0
    assert len(llm.users["somebody"].choices) == len(CHOICES)


def test_a_choice_that_was_not_learnt_is_no_measurement(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Users, "add_choices", lambda self, name, choices: self[name])
    with pytest.raises(ValueError, match=r"2 choices: the latent of one more .* differ by"):
        measure(llm, CHOICES[:2])


def test_choices_are_between_answers_to_different_prompts() -> None:
    choices = sampled_choices(40)
    assert len({choice.prompt for choice in choices}) == 40
    assert all(choice.chosen != choice.rejected for choice in choices)
    with pytest.raises(ValueError, match="expected prompts for 9999 choices"):
        sampled_choices(9999)
