"""NP-DPO on text with known tastes, between the model for everybody and those for one kind alone.

    python -m benchmarks.policies --json benchmarks/results/cpu/policies.json

Four kinds of people want more or less of one of two tastes (`recipes/text_study`). One DPO policy
for everybody is the floor, a DPO policy dedicated to each kind the ceiling, and choices pasted into
the prompt what costs no training. Between them stands NP-DPO, conditioned on n choices of people
and for prompts it never met, with the families of modulation at about equal numbers stored a user,
and FiLM on every block, as in the paper. A run that is finished in the folder of runs, by the same
recipe and from the same encoder, is read and not repeated, one that was cut off goes on from its
last checkpoint. What the folder lacks is taken from an earlier result if one is given
(`--earlier`), seed by seed. A seed counts once it has the floor and the ceilings, every policy by
the seeds that it was trained with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import finished, inputs_of, same_run, trained, without_folder
from benchmarks.rewards import mean_and_error, over_seeds
from benchmarks.text_population import ROOT, make_choices
from fssa_runtime.conditioning.layout import GROUPS, RowLayout
from fssa_runtime.errors import InputError
from fssa_runtime.files import write_atomically
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.threads import set_threads
from fssa_runtime.training.commands import reward_by_recipe
from fssa_runtime.training.policy import train_policy
from fssa_runtime.training.policy_recipe import PolicyConfig
from fssa_runtime.training.reward_recipe import RewardConfig
from fssa_runtime.training.trainer import load_config

RECIPES = ROOT / "recipes" / "text_study"
RUNS = Path("runs") / "text_study"
STARTED_FILE = "recipe.json"

KINDS = ("length+", "length-", "lists+", "lists-")
EVERYBODY, PROMPT = "DPO, everybody", "choices in the prompt"
SITES = ["q", "v", "o", "up", "down"]
FAMILIES: dict[str, dict[str, Any]] = {
    "NP-DPO, gated": {"family": "gated", "sites": SITES, "rank": 11},
    "NP-DPO, core": {"family": "core", "sites": SITES, "rank": 4, "layers": list(range(5, 26))},
    "NP-DPO, film, two blocks": {"family": "film", "layers": [10, 20]},
    "NP-DPO, film": {"family": "film"},
}
NOBODY: dict[str, Any] = {
    "method": "dpo",
    "init_encoder": None,
    "freeze_encoder": False,
    "nobody_is_base": False,
    "tasks": {"context_min": 0, "context_max": 0, "num_targets": 1},
}


def variants(recipe: PolicyConfig) -> dict[str, PolicyConfig]:
    """Every policy that is compared, by name."""
    base = recipe.model_dump()
    made: dict[str, dict[str, Any]] = {}
    # Every kind's choices as often as the policy dedicated to that kind has them.
    steps = {"train": base["train"] | {"steps": len(KINDS) * recipe.train.steps}}
    for name, family in FAMILIES.items():
        made[name] = steps | {"modulator": base["modulator"] | {"families": [family]}}
    floor = NOBODY | {"evaluation": base["evaluation"] | {"contexts": [0]}}
    made[EVERYBODY] = floor
    for kind in KINDS:
        made[f"DPO, {kind}"] = floor | {"data": base["data"] | {"mode": kind}}
    made[PROMPT] = {"method": "prompt", "modulator": None}
    made[PROMPT] |= {"init_encoder": None, "freeze_encoder": False, "nobody_is_base": False}
    return {name: PolicyConfig.model_validate(base | changes) for name, changes in made.items()}


def acting(name: str, stored: int) -> int:
    """How many of the numbers stored for a user act, of one of `FAMILIES`.

    A stacked matrix has an equal piece for each of its projections; what is not modulated there has
    zeros for A and B, whatever its piece says.
    """
    sites = set(FAMILIES[name].get("sites", ()))
    pieces = [linear for group in GROUPS.values() if sites & set(group) for linear in group]
    return stored * len(sites) // len(pieces) if sites else stored


def recipes_in(dtype: str | None) -> tuple[RewardConfig, PolicyConfig]:
    """Of the reward and of the policies that begin with its encoder, the base model in that dtype
    (None: the recipes' own), in which the reward has a folder of its own."""
    reward = load_config(RECIPES / "reward.yaml", RewardConfig).model_dump()
    policy = load_config(RECIPES / "policy.yaml", PolicyConfig).model_dump()
    reward["train"]["overwrite"] = True
    if dtype not in (None, policy["dtype"]):
        folder = Path(f"{reward['train']['output_dir']}_{dtype}")
        reward["train"]["output_dir"] = policy["init_encoder"] = folder
        reward["options"]["dtype"] = policy["dtype"] = dtype
    return RewardConfig.model_validate(reward), PolicyConfig.model_validate(policy)


def planned(config: PolicyConfig, folder: Path, seed: int) -> tuple[PolicyConfig, dict | None]:
    """The recipe with its folder and seed, and the metrics of a run by it that is finished there.

    A run by it that was cut off is to be resumed, one by another recipe or from another encoder to
    be overwritten.
    """
    settings = {"output_dir": folder, "seed": seed, "resume": False, "overwrite": True}
    wanted = _with_train(config, settings)
    metrics = finished(wanted)
    if metrics is None and (folder / STARTED_FILE).is_file() and same_run(_started(folder), wanted):
        wanted = _with_train(wanted, {"resume": True, "overwrite": False})
    return wanted, metrics


def train(config: PolicyConfig, model: LanguageModel) -> dict[str, Any]:
    """Metrics of what is trained by a `planned` recipe, which the folder remembers from now on."""
    folder = config.train.output_dir
    if not config.train.resume:
        folder.mkdir(parents=True, exist_ok=True)
        started = {"recipe": config.model_dump(mode="json"), "inputs": inputs_of(config)}
        write_atomically(folder / STARTED_FILE, json.dumps(started, indent=1).encode())
    inputs = _started(folder).get("inputs", {})
    return trained(config, lambda: train_policy(config, model).metrics, inputs)


def _started(folder: Path) -> dict[str, Any]:
    """The recipe and the inputs of the run that was started there; once it was the recipe alone."""
    found: dict[str, Any] = json.loads((folder / STARTED_FILE).read_text(encoding="utf-8"))
    return found if "recipe" in found else {"recipe": found}


def _with_train(config: PolicyConfig, settings: Mapping[str, Any]) -> PolicyConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def read_earlier(path: Path | None) -> tuple[dict[int, dict[str, Any]], dict[str, Any]]:
    """The runs of a result file by their seed, and its rewards by their dtype; nothing of either
    without a file.

    Raises:
        InputError: no such file, or not a result of this benchmark.
    """
    if path is None:
        return {}, {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        seeds = map(int, found["seeds"].split(","))
        return dict(zip(seeds, found["runs"], strict=True)), dict(found["rewards"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--earlier {path}: {type(error).__name__}: {error}") from error


def closed(runs: Mapping[str, Mapping[str, Any]], name: str, n: str) -> dict[str, Any]:
    """Shares of the gap between the policy for everybody and the dedicated ones, by kind and in
    all: (accuracy of the policy − everybody's) / (dedicated − everybody's)."""
    found = {}
    for kind in KINDS:
        own = runs[name]["contexts"][n]["modes"][kind]["accuracy"]
        floor = runs[EVERYBODY]["contexts"]["0"]["modes"][kind]["accuracy"]
        ceiling = runs[f"DPO, {kind}"]["contexts"]["0"]["accuracy"]
        found[kind] = {"accuracy": own, "everybody": floor, "dedicated": ceiling}
    gained = sum(entry["accuracy"] - entry["everybody"] for entry in found.values())
    gap = sum(entry["dedicated"] - entry["everybody"] for entry in found.values())
    return {"kinds": found, "share": gained / gap if gap else None}


def is_bounded(runs: Mapping[str, Any]) -> bool:
    """Whether the floor and every ceiling are among the runs of a seed."""
    return runs.keys() >= {EVERYBODY, *(f"DPO, {kind}" for kind in KINDS)}


def summary(by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """By policy: the seeds it was trained with, what was measured by n, and the share of the gap
    closed, each as its mean and standard error over these seeds.

    Seeds that lack the floor or a ceiling are passed over.
    """
    bounded = {seed: runs for seed, runs in by_seed.items() if is_bounded(runs)}
    result: dict[str, Any] = {}
    for name in dict.fromkeys(name for runs in bounded.values() for name in runs):
        trained = {seed: runs for seed, runs in bounded.items() if name in runs}
        mean = over_seeds([{"heldout": runs[name]} for runs in trained.values()])
        result[name] = {"seeds": list(trained), "mean": mean}
        if name in (*FAMILIES, PROMPT):
            result[name]["gap_closed"] = {
                n: mean_and_error([closed(runs, name, n)["share"] for runs in trained.values()])
                for n in mean
            }
    return result


def main() -> int:
    """Train what is not trained yet, compare, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument(
        "--only",
        action="append",
        help="train no other than this one, by name (several may be given)",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="FILE",
        help="a result of this benchmark: what it has of a seed is not trained again",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the base model (default: the recipes'; float32 is faster on a processor that "
        "has no bf16 products)",
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    reward_recipe, recipe = recipes_in(options.dtype)
    every = variants(recipe)
    unknown = set(options.only or ()) - set(every)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(every)}, got {', '.join(unknown)}")
    set_threads(options.threads)
    seeds = list(map(int, options.seeds.split(",")))
    try:
        earlier, rewards = read_earlier(options.earlier)
        make_choices(RECIPES, RUNS)
    except InputError as error:
        parser.error(str(error))
    conditioned = {name for name, config in every.items() if config.init_encoder is not None}
    reward = finished(reward_recipe)
    if reward is None and conditioned & set(options.only or every):
        print("the reward whose encoder they begin with", flush=True)
        reward = trained(reward_recipe, lambda: reward_by_recipe(reward_recipe).metrics)
    if reward is not None:
        rewards[recipe.dtype] = without_folder(reward)
    model = LanguageModel.load(recipe.model, dtype=recipe.dtype, show_progress=True)
    by_seed: dict[int, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for seed in seeds:
        runs = by_seed[seed] = {}
        for name, config in every.items():
            folder = RUNS / f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}"
            wanted, metrics = planned(config, folder, seed)
            is_wanted = options.only is None or name in options.only
            if metrics is None and is_wanted and name not in earlier.get(seed, {}):
                print(f"{name}, seed {seed}", flush=True)
                metrics = train(wanted, model)
            if metrics is not None:
                runs[name] = metrics["heldout"] | {
                    "train_seconds": metrics["train_seconds"],
                    "dtype": config.dtype,
                }
            elif name in earlier.get(seed, {}):
                runs[name] = earlier[seed][name]
            if name in runs:
                accuracies = {n: e["accuracy"] for n, e in runs[name]["contexts"].items()}
                print(f"{name}, seed {seed}: {accuracies}", flush=True)
            if config.method == "np-dpo" and config.modulator is not None:
                sizes[name] = RowLayout(config.modulator, model.decoder.config).generated_width
        if len(runs) < len(every):
            print(f"seed {seed}, not trained: {'; '.join(n for n in every if n not in runs)}")
        if not is_bounded(runs):
            print(f"seed {seed} is not compared: floor and ceilings are needed")
    result = {
        "seeds": options.seeds,
        "numbers_a_user": sizes,
        "rewards": rewards,
        "summary": summary(by_seed),
        "runs": list(by_seed.values()),
    }
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, entry in result["summary"].items():
        accuracies = {n: measured["accuracy"] for n, measured in entry["mean"].items()}
        print(name, entry["seeds"], accuracies, entry.get("gap_closed", ""))
    return 0 if result["summary"] or options.only else 1


if __name__ == "__main__":
    sys.exit(main())
