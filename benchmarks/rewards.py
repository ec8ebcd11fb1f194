"""Rewards on the synthetic populations against their exact limits, over several seeds.

    python -m benchmarks.rewards synthetic --json benchmarks/results/cpu/synthetic.json
    python -m benchmarks.rewards identify --json benchmarks/results/cpu/identify.json

`synthetic`: NP-BTL with a distribution as latent and with a single one, BTL, DPL, and models
dedicated to one kind of users, all by recipes in `recipes/`. `identify`: the error in naming the
user's kind, for several correlations. A run that is finished in the folder of runs, by the same
recipe, is read and not repeated; seeds may therefore be trained by several calls at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import finished, without_folder
from fssa_runtime.training.commands import reward_by_recipe
from fssa_runtime.training.reward import RewardConfig
from fssa_runtime.training.trainer import load_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"

SYNTHETIC = {
    "NP-BTL": ("synthetic.yaml", {}),
    "NP-BTL, a single latent": ("synthetic_deterministic.yaml", {}),
    "BTL": ("synthetic_btl.yaml", {}),
    "DPL": ("synthetic_dpl.yaml", {}),
    "dedicated to kind 0": ("synthetic_dedicated.yaml", {}),
    "dedicated to kind 1": ("synthetic_dedicated.yaml", {"mode": 1}),
}
CORRELATIONS = (-1.0, -0.7, 0.0, 0.7)
# What is averaged over the seeds, besides differences from the limit.
AVERAGED = (
    "accuracy",
    "nll",
    "calibration_error",
    "worst_accuracy",
    "active_latent_units",
    "identification_error",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["synthetic", "identify"])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--only", help="one of the models or correlations, by its name")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "rewards")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if arguments.table == "synthetic":
        recipes: Mapping[str, tuple[str, Mapping[str, Any]]] = SYNTHETIC
    else:
        recipes = {f"{rho:g}": ("identify.yaml", {"rho": rho}) for rho in CORRELATIONS}
    if arguments.only is not None:
        if arguments.only not in recipes:
            parser.error(f"--only: expected one of {', '.join(recipes)}, got {arguments.only}")
        recipes = {arguments.only: recipes[arguments.only]}
    result: dict[str, Any] = {"table": arguments.table, "seeds": seeds, "models": {}}
    for name, (file, data) in recipes.items():
        runs = [trained(file, data, seed, arguments.runs) for seed in seeds]
        result["models"][name] = {"mean": over_seeds(runs), "runs": runs}
        for n, entry in result["models"][name]["mean"].items():
            shown = {k: f"{v['mean']:.4f}" for k, v in entry.items() if v["mean"] is not None}
            print(f"{name}, n = {n}: {shown}", flush=True)
    if len(result["models"]) == len(SYNTHETIC) and arguments.table == "synthetic":
        result["gap_closed"] = gap_closed(result["models"])
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def trained(file: str, data: Mapping[str, Any], seed: int, runs: Path) -> dict[str, Any]:
    """Metrics of the recipe with these changes to its data and this seed, from the folder of runs
    if they are there already."""
    recipe = load_config(RECIPES / file, RewardConfig)
    folder = folder_of(file, data, seed, runs)
    settings = {"output_dir": folder, "seed": seed, "progress": "off", "tensorboard": False}
    changed = recipe.model_dump() | {
        "data": recipe.data.model_dump() | dict(data),
        "train": recipe.train.model_dump() | settings | {"save_every": 0, "overwrite": True},
    }
    config = RewardConfig.model_validate(changed)
    metrics = finished(config)
    if metrics is not None:
        return without_folder(metrics)
    return without_folder(reward_by_recipe(config).metrics)


def folder_of(file: str, data: Mapping[str, Any], seed: int, runs: Path) -> Path:
    """Where a run and its checkpoint are kept."""
    changes = [f"{name}{value:g}" for name, value in data.items()]
    return runs / "_".join([Path(file).stem, *changes, f"seed{seed}"])


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By n: mean and standard error over the seeds of every measured number and of its distance
    from the limit (null for the error with one seed)."""
    found: dict[str, dict[str, Any]] = {}
    for n in runs[0]["heldout"]["contexts"]:
        entries = [run["heldout"]["contexts"][n] for run in runs]
        values = {
            name: [entry[name] for entry in entries] for name in AVERAGED if name in entries[0]
        }
        for name, limit in (("accuracy", "bayes_accuracy"), ("nll", "bayes_nll")):
            if limit in entries[0]:
                values[f"{name}_minus_bayes"] = [e[name] - e[limit] for e in entries]
            same = f"{limit}_same_tasks"
            if same in entries[0]:
                values[f"{name}_minus_bayes_same_tasks"] = [e[name] - e[same] for e in entries]
        if "identification_error" in entries[0]:
            values["identification_error_minus_bayes"] = [
                e["identification_error"] - e["bayes_identification_error"] for e in entries
            ]
        for mode in entries[0]["modes"]:
            values[f"accuracy_of_mode_{mode}"] = [e["modes"][mode]["accuracy"] for e in entries]
        found[n] = {name: mean_and_error(v) for name, v in values.items()}
    return found


def gap_closed(models: Mapping[str, Any]) -> dict[str, Any]:
    """By n: the share of the way from BTL's accuracy to that of the dedicated models which NP-BTL
    makes, of the same seed, and its mean and standard error over the seeds."""
    mixed, *dedicated = (
        [run["heldout"]["contexts"]["0"]["accuracy"] for run in models[name]["runs"]]
        for name in ("BTL", "dedicated to kind 0", "dedicated to kind 1")
    )
    ceilings = [statistics.fmean(pair) for pair in zip(*dedicated, strict=True)]
    found = {}
    for n in models["NP-BTL"]["mean"]:
        ours = [run["heldout"]["contexts"][n]["accuracy"] for run in models["NP-BTL"]["runs"]]
        found[n] = mean_and_error(
            [(a - low) / (high - low) for a, low, high in zip(ours, mixed, ceilings, strict=True)]
        )
    return found


def mean_and_error(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "standard_error": None}
    error = None if len(known) < 2 else statistics.stdev(known) / len(known) ** 0.5
    return {"mean": statistics.fmean(known), "standard_error": error}


if __name__ == "__main__":
    sys.exit(main())
