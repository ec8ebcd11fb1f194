"""Training on a GPU: nothing that is on the CPU meets what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fssa_runtime.conditioning.beliefs import prior_belief
from fssa_runtime.conditioning.encoder import EncoderSettings
from fssa_runtime.training import policy, reward
from fssa_runtime.training.policy import PolicyResult, train_policy
from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.reward import RewardConfig, train_reward
from fssa_runtime.training.reward_model import RewardModel, RewardModelConfig, save_reward
from fssa_runtime.training.trainer import FitResult

from .conditioned import small_model
from .pretended_gpu import GPU, pretended_gpu
from .reward_recipes import small_recipe
from .test_policy_training import recipe, write_choices

CPU = torch.device("cpu")


def look_at_one_loss(device: torch.device) -> Any:
    """In place of a trainer: leaves the module on the device, with some weights of its own."""

    def fit(
        module: nn.Module, tasks: Any, *_: Any, collate: Any, recipe: Any, **__: Any
    ) -> FitResult:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_b" in name or "prior" in name:
                    parameter.normal_(std=0.1)
        module.to(device)
        batch = {name: part.to(device) for name, part in collate([tasks[0], tasks[1]]).items()}
        assert module(**batch)["loss"].device == device
        return FitResult(1, 0, 0.0, ())

    return fit


def assert_as_measured(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of the same weights, but for the order of the sums."""
    assert found["contexts"].keys() == expected["contexts"].keys()
    for n, entry in expected["contexts"].items():
        numbers = {name: value for name, value in entry.items() if isinstance(value, float)}
        assert {name: found["contexts"][n][name] for name in numbers} == pytest.approx(
            numbers, rel=1e-4
        )


def run_policy(device: torch.device, folder: Path, **changes: Any) -> PolicyResult:
    """From a reward's encoder, with several options, loops, weakened and rounded."""
    folder.mkdir()
    write_choices(folder / "choices.jsonl", several=True)
    model = small_model(folder / "model")
    torch.manual_seed(0)
    encoder = EncoderSettings(latent_dim=4, hidden_dim=16)
    width = 2 * model.decoder.config.hidden_size
    save_reward(RewardModel(RewardModelConfig(option_dim=width, encoder=encoder)), folder)
    settings = recipe(model, folder).model_dump()
    settings["modulator"]["families"] += ({"family": "film"},)
    settings["evaluation"] |= {"contexts": [2], "num_tasks": 2}
    settings |= {
        "encoder": None,
        "init_encoder": folder,
        "loop_weight": 0.1,
        "strength": 0.5,
        "save_dtype": "bfloat16",
    }
    model.decoder.to(device)
    assert model.decoder.device == device
    return train_policy(PolicyConfig.model_validate(settings | changes), model)


def test_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "fit", look_at_one_loss(CPU))
    expected = run_policy(CPU, tmp_path / "cpu")
    monkeypatch.setattr(policy, "fit", look_at_one_loss(GPU))
    with pretended_gpu():
        found = run_policy(GPU, tmp_path / "gpu")
    assert_as_measured(found.metrics["heldout"], expected.metrics["heldout"])
    assert expected.conditioning is not None
    assert found.conditioning is not None
    assert found.conditioning.fingerprint == expected.conditioning.fingerprint
    saved = [tmp_path / name / "run" / policy.CONDITIONING_DIR for name in ("cpu", "gpu")]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in saved]
    assert weights[0] == weights[1]
    # What serves it reads options, and keeps beliefs, on the CPU.
    z = prior_belief(found.conditioning.encoder).mean
    assert found.conditioning.row(z).device == CPU


def test_choices_in_the_prompt(tmp_path: Path) -> None:
    untrained = {"method": "prompt", "init_encoder": None, "modulator": None}
    expected = run_policy(CPU, tmp_path / "cpu", **untrained)
    with pretended_gpu():
        found = run_policy(GPU, tmp_path / "gpu", **untrained)
    assert_as_measured(found.metrics["heldout"], expected.metrics["heldout"])


def test_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(device: torch.device) -> dict[str, Any]:
        monkeypatch.setattr(reward, "fit", look_at_one_loss(device))
        changes = {
            "encoder": {"stochastic": True},
            "objective": "marginal",
            "evaluation": {
                "contexts": [0, 2],
                "num_tasks": 20,
                "num_samples": 4,
                "identification": True,
            },
        }
        changes["train"] = {"steps": 1, "tasks_per_batch": 4}
        config = RewardConfig.model_validate(small_recipe(tmp_path, **changes))
        result = train_reward(config)
        assert {tensor.device for tensor in result.model.state_dict().values()} == {CPU}
        heldout: dict[str, Any] = result.metrics["heldout"]
        return heldout

    expected = run(CPU)
    assert "identification_error" in expected["contexts"]["2"]
    with pretended_gpu():
        assert_as_measured(run(GPU), expected)
