"""Policies that know nobody, or one kind of users, or read choices in the prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.models.packed import PackedOptions
from fssa_runtime.training.data import (
    Preference,
    PreferenceData,
    read_preferences,
    rows_of_mode,
)
from fssa_runtime.training.policy import CONDITIONING_DIR, train_policy
from fssa_runtime.training.policy_options import answer_logprobs
from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.population import PopulationConfig, build_preferences, write_preferences
from fssa_runtime.training.prompted import prompt_with_choices, prompted_scores

from .conditioned import small_model
from .test_policy_training import recipe

RECORDS = [
    {
        "prompt": f"Tell {n}",
        "answer": " ".join(f"w{word}" for word in range(length)),
        "finish_reason": "stop",
    }
    for n in range(12)
    for length in (4, 9, 16)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return small_model(tmp_path_factory.mktemp("baselines") / "model")


def population(folder: Path, **changes: Any) -> None:
    """Users who like long answers, and users who like short ones, and it is known which."""
    settings: dict[str, Any] = {
        "tastes": ("length",),
        "num_users": 16,
        "choices_per_user": 12,
        "strength": 30.0,
        "pure": 1.0,
        "name_modes": True,
    }
    preferences, _ = build_preferences(RECORDS, PopulationConfig(**{**settings, **changes}))
    write_preferences(preferences, folder / "choices.jsonl")


def config(model: LanguageModel, folder: Path, **changes: Any) -> PolicyConfig:
    settings = recipe(model, folder).model_dump()
    evaluation = {"contexts": [0], "num_tasks": 24, "num_targets": 2}
    settings |= {"method": "dpo", "encoder": None, "evaluation": evaluation}
    settings["tasks"] |= {"context_min": 0, "context_max": 0}
    data = settings["data"] | changes.pop("data", {})
    return PolicyConfig.model_validate({**settings, "data": data, **changes})


def test_one_policy_for_all_and_one_for_each_kind(model: LanguageModel, tmp_path: Path) -> None:
    population(tmp_path)
    mixed = train_policy(config(model, tmp_path), model).metrics["heldout"]["contexts"]["0"]
    assert set(mixed["modes"]) == {"length+", "length-"}
    # What one kind chooses the other rejects: nobody can please both.
    assert mixed["worst_accuracy"] <= 0.6
    assert 0.3 <= mixed["accuracy"] <= 0.7
    for kind in ("length+", "length-"):
        folder = tmp_path / kind
        folder.mkdir()
        population(folder)
        result = train_policy(config(model, folder, data={"mode": kind}), model)
        measured = result.metrics["heldout"]["contexts"]["0"]
        assert list(measured["modes"]) == [kind]
        assert measured["accuracy"] >= 0.9
        assert (folder / "run" / CONDITIONING_DIR).is_dir()


def test_the_kind_of_users_is_written_down_only_if_asked_for(tmp_path: Path) -> None:
    population(tmp_path)
    data = read_preferences(tmp_path / "choices.jsonl")
    rows = rows_of_mode(data, data.rows_by_user["user0000"], data.mode_of_user["user0000"])
    assert len(rows) == 12
    with pytest.raises(
        ValueError, match=r"mode: expected one of \['length\+', 'length-'\], got 'l'"
    ):
        rows_of_mode(data, rows, "l")
    population(tmp_path, name_modes=False)
    assert set(read_preferences(tmp_path / "choices.jsonl").mode_of_user.values()) == {""}


@pytest.mark.parametrize("several", [False, True])
def test_choices_in_the_prompt(model: LanguageModel, tmp_path: Path, several: bool) -> None:
    population(tmp_path)
    data = read_preferences(tmp_path / "choices.jsonl")
    if several:
        third = ("a third", "a fourth")
        data = PreferenceData(
            tuple(
                replace(p, also_rejected=third[: number % 3])
                for number, p in enumerate(data.preferences)
            )
        )
    score = prompted_scores(model, data, beta=0.5)
    batch = {
        "context_rows": torch.tensor([[0, 1], [0, 0]]),
        "context_mask": torch.tensor([[True, True], [False, False]]),
        "target_rows": torch.tensor([[2, 3], [4, 0]]),
        "target_mask": torch.tensor([[True, True], [True, False]]),
    }
    log_probs = score(batch).log_probs
    assert log_probs.shape[-1] == (4 if several else 2)
    for user, place, target in ((0, 0, 2), (0, 1, 3), (1, 0, 4)):
        wanted = data.preferences[target]
        context = list(data.preferences[:2]) if user == 0 else []
        rewards = []
        for answer in (wanted.chosen, *wanted.all_rejected):
            options = [
                model.option_tokens(prompt, answer)
                for prompt in (prompt_with_choices(context, wanted.prompt), wanted.prompt)
            ]
            with torch.no_grad():
                packed = PackedOptions.pack(options, torch.device("cpu"))
                told, plain = answer_logprobs(model.decoder, packed)
            rewards.append(0.5 * float(told - plain))
        assert len(rewards) == (2 + target % 3 if several else 2)
        expected = torch.tensor(rewards).log_softmax(0)
        found = log_probs[user, place]
        torch.testing.assert_close(found[: len(rewards)], expected, atol=1e-4, rtol=0)
        assert bool((found[len(rewards) :] == -torch.inf).all())
    known = 4 % 3 + 2 if several else 2
    assert (
        float(log_probs[1, 0, :known].exp().sub(1 / known).abs().max()) < 1e-6
    )  # nothing is known


def test_the_prompt_says_what_was_liked_and_what_was_not(tmp_path: Path) -> None:
    choices = [Preference("u", "Why?", "So.", "No.", "", ("Hm.", "Ah."))]
    system, asked = prompt_with_choices(choices, "What?")
    assert system["role"] == "system"
    assert "between several answers" in system["content"]
    order = [
        "Question: Why?",
        "Liked answer: So.",
        *(f"Disliked answer: {a}" for a in ("No.", "Hm.", "Ah.")),
    ]
    assert system["content"].endswith("\n".join(order))
    assert asked == {"role": "user", "content": "What?"}
    pair = prompt_with_choices([replace(choices[0], also_rejected=())], "What?")
    assert "between two answers" in pair[0]["content"]


def test_nothing_is_trained_for_prompts(model: LanguageModel, tmp_path: Path) -> None:
    population(tmp_path)
    evaluation = {"contexts": [0, 1], "num_tasks": 4, "num_targets": 1}
    settings = config(model, tmp_path, method="prompt", modulator=None, evaluation=evaluation)
    result = train_policy(settings, model)
    assert result.conditioning is None
    assert result.fit is None
    contexts = result.metrics["heldout"]["contexts"]
    assert contexts["0"]["accuracy"] == 0.5
    assert set(contexts) == {"0", "1"}


NP_DPO = {"method": "np-dpo", "tasks": {"context_max": 2}}


def of(*families: str) -> dict:
    return {
        "latent_dim": 2,
        "families": [
            {"family": name, "sites": [site], "rank": 2}
            for name, site in zip(families, ("o", "down"), strict=False)
        ],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(modulator=None), "modulator: expected one for method 'dpo'"),
        (dict(method="prompt"), "modulator: expected none for method 'prompt'"),
        (dict(freeze_encoder=True), "expected none for method 'dpo', which infers nobody"),
        (dict(tasks={"context_max": 3}), "expected 0 for method 'dpo'"),
        (dict(evaluation={"contexts": [0, 1]}), r"expected \[0\] for method 'dpo'"),
        (dict(evaluation={"contexts": []}), "contexts"),
        (dict(evaluation={"contexts": [-2]}), "contexts"),
        (dict(modulator=of("static"), strength=0.5), "no 'static' .* acts on everybody alike"),
        (dict(NP_DPO, modulator=of("gated", "static"), nobody_is_base=True), "no 'static'"),
        (dict(NP_DPO, modulator=of("factors")), "no 'factors', which are not trained"),
    ],
)
def test_what_a_method_has_no_use_for(
    model: LanguageModel, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(model, tmp_path, **changes)
