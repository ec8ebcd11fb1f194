"""Runs that experiments keep in folders: what is finished is read and not repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.reward_model import WEIGHTS_FILE
from fssa_runtime.training.reward_recipe import RewardConfig, SyntheticData
from fssa_runtime.training.trainer import METRICS_FILE, NOT_DECISIVE, write_metrics

Recipe = RewardConfig | PolicyConfig
Inputs = dict[str, list[str]]


def finished(recipe: Recipe) -> dict[str, Any] | None:
    """Metrics of the run in the recipe's folder, if it came to its end and was by this recipe."""
    path = recipe.train.output_dir / METRICS_FILE
    if not path.is_file():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics if same_run(metrics, recipe) else None


def trained(
    recipe: Recipe, train: Callable[[], Mapping[str, Any]], inputs: Inputs | None = None
) -> dict[str, Any]:
    """Metrics that ``train`` gives, in the recipe's folder together with the inputs: those given (a
    run that goes on), or else those there are before it trains."""
    inputs = inputs_of(recipe) if inputs is None else inputs
    metrics = {**train(), "inputs": inputs}
    write_metrics(recipe.train.output_dir, metrics)
    return metrics


def inputs_of(recipe: Recipe) -> Inputs:
    """SHA-256 of every file that a run by the recipe begins with, as far as they are there."""
    return {
        name: [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        for name, paths in _files(recipe).items()
        if all(path.is_file() for path in paths)
    }


def same_run(recorded: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether what was recorded of a run, its ``recipe`` and its ``inputs``, is this recipe in all
    that decides a result, with the inputs there are now; where the run and its data lie does not.

    Inputs that are not known, of then or now, are taken to be the same, which is printed.
    """
    if _decisive(type(recipe).model_validate(recorded["recipe"])) != _decisive(recipe):
        return False
    then, now = recorded.get("inputs", {}), inputs_of(recipe)
    known = then.keys() & now.keys()
    if any(then[name] != now[name] for name in known):
        return False
    unknown = [name for name in _files(recipe) if name not in known]
    if unknown:
        print(
            f"{recipe.train.output_dir}: not known whether its {' and '.join(unknown)} changed, "
            "taken to be the same",
            flush=True,
        )
    return True


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


def _files(recipe: Recipe) -> dict[str, tuple[Path, ...]]:
    """What a run by the recipe begins with, by what it is."""
    found: dict[str, tuple[Path, ...]] = {}
    if not isinstance(recipe.data, SyntheticData):
        found["data"] = recipe.data.files
    if isinstance(recipe, PolicyConfig) and recipe.init_encoder is not None:
        found["initial encoder"] = (recipe.init_encoder / WEIGHTS_FILE,)
    return found
