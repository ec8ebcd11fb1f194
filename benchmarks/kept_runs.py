"""Runs that experiments keep in folders: what is finished is read and not repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.reward_recipe import RewardConfig
from fssa_runtime.training.trainer import METRICS_FILE, NOT_DECISIVE

Recipe = RewardConfig | PolicyConfig


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """Metrics of the run in the recipe's folder, if it came to its end and was by this recipe."""
    path = recipe.train.output_dir / METRICS_FILE
    if not path.is_file():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics if same_run(metrics["recipe"], recipe) else None


def same_run(recorded: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a recorded recipe is this one in all that decides a run's result; where the run is
    kept and its data lie does not."""
    return _decisive(type(recipe).model_validate(recorded)) == _decisive(recipe)


def without_folder(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as they go into a result file, which should not depend on where runs were kept."""
    return {**metrics, "recipe": without_paths(metrics["recipe"])}


def without_paths(recorded: Mapping[str, Any]) -> dict[str, Any]:
    train = {k: v for k, v in recorded["train"].items() if k != "output_dir"}
    data = {k: v for k, v in recorded["data"].items() if k != "files"}
    return {**recorded, "train": train, "data": data}


def _decisive(recipe: Recipe) -> dict[str, Any]:
    found = without_paths(recipe.model_dump(mode="json"))
    return {**found, "train": {k: v for k, v in found["train"].items() if k not in NOT_DECISIVE}}
