"""Active questions against random ones on the synthetic task: choices needed for the same accuracy.

    python -m benchmarks.questions --json benchmarks/results/cpu/questions.json

The rewards are those of `python -m benchmarks.rewards synthetic`, trained first if they are not in
the folder of runs. Every simulated user, equally many of both kinds, answers question after
question; each is taken from a fresh pool of random pairs, the same pool for both ways of asking:
the pair of largest expected information gain, or the first of the pool. After every answer the
prediction of fresh pairs is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.rewards import ROOT, SYNTHETIC, folder_of, mean_and_error, trained
from fssa_runtime.conditioning.encoder import antithetic_noise
from fssa_runtime.conditioning.questions import information_of_questions
from fssa_runtime.training.reward import RewardModel, load_reward
from fssa_runtime.training.synthetic import Population

# The way up from what is known of nobody in particular to what is known of a kind, of which the
# share is to be reached.
SHARE_OF_CEILING = 0.9
CEILING = 1.0  # both kinds choose without noise
ASKED_AT_ONCE = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--pool", type=int, default=20, help="candidates for every question")
    parser.add_argument("--targets", type=int, default=40, help="pairs predicted after each answer")
    parser.add_argument("--samples", type=int, default=64, help="latents drawn from a posterior")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "rewards")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    runs = []
    for seed in seeds:
        file, data = SYNTHETIC["NP-BTL"]
        trained(file, data, seed, arguments.runs)
        model = load_reward(folder_of(file, data, seed, arguments.runs))
        curves = {way: ask(model, way == "active", seed, arguments) for way in ("active", "random")}
        needed = {way: choices_needed(curve) for way, curve in curves.items()}
        runs.append({"seed": seed, "accuracy": curves, "choices_needed": needed})
        print(json.dumps(runs[-1]), flush=True)
    ratios = [
        None
        if None in run["choices_needed"].values()
        else run["choices_needed"]["active"] / run["choices_needed"]["random"]
        for run in runs
    ]
    result = {
        "users": arguments.users,
        "pool": arguments.pool,
        "targets": arguments.targets,
        "samples": arguments.samples,
        "share_of_ceiling": SHARE_OF_CEILING,
        "mean": {
            "accuracy": {
                way: [
                    mean_and_error([run["accuracy"][way][n] for run in runs])
                    for n in range(arguments.questions + 1)
                ]
                for way in ("active", "random")
            },
            "choices_needed": {
                way: mean_and_error([run["choices_needed"][way] for run in runs])
                for way in ("active", "random")
            },
            "active_over_random": mean_and_error(ratios),
        },
        "runs": runs,
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def choices_needed(accuracy: Sequence[float]) -> float | None:
    """Choices after which the share of the way to the ceiling is reached, linear between whole
    numbers; None if it never is."""
    wanted = accuracy[0] + SHARE_OF_CEILING * (CEILING - accuracy[0])
    for n in range(1, len(accuracy)):
        if accuracy[n] >= wanted:
            return n - (accuracy[n] - wanted) / (accuracy[n] - accuracy[n - 1])
    return None


@torch.no_grad()
def ask(model: RewardModel, active: bool, seed: int, arguments: argparse.Namespace) -> list[float]:
    """Accuracy on fresh pairs after 0, 1, 2, ... answers, the mean over all users."""
    totals = np.zeros(arguments.questions + 1)
    assert model.config.encoder is not None
    noise = antithetic_noise(
        (model.config.encoder.latent_dim,),
        arguments.samples,
        torch.Generator().manual_seed(0),
    )
    for start in range(0, arguments.users, ASKED_AT_ONCE):
        count = min(ASKED_AT_ONCE, arguments.users - start)
        # Not the streams of training and evaluation.
        rng = np.random.default_rng((seed, 2, start))
        kinds = torch.arange(start, start + count) % 2
        context = torch.zeros(count, 0, 2, 1)
        for n in range(arguments.questions + 1):
            totals[n] += accuracy(model, context, kinds, noise, rng, arguments.targets) * count
            pool = pairs(rng, (count, arguments.pool))
            asked = torch.zeros(count, dtype=torch.long)
            if active:
                latent = model.encode(*as_choices(context))
                assert latent is not None
                asked = information_of_questions(
                    model, latent, pool[:, :, 0], pool[:, :, 1], num_samples=arguments.samples
                ).argmax(dim=1)
            answered = chosen_first(pool[torch.arange(count), asked][:, None], kinds)
            context = torch.cat([context, answered], dim=1)
    return list(totals / arguments.users)


def accuracy(
    model: RewardModel,
    context: Tensor,
    kinds: Tensor,
    noise: Tensor,
    rng: np.random.Generator,
    num_targets: int,
) -> float:
    targets = chosen_first(pairs(rng, (len(kinds), num_targets)), kinds)
    names = ("chosen", "rejected", "mask")
    batch = {
        f"{kind}_{name}": value
        for kind, options in (("context", context), ("target", targets))
        for name, value in zip(names, as_choices(options), strict=True)
    }
    p = model(batch, noise).log_probs.exp()
    right = (p[..., 0] > p[..., 1]).double() + 0.5 * (p[..., 0] == p[..., 1])
    return float(right.mean())


def pairs(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Random pairs of options [*shape, 2, E]."""
    return torch.from_numpy(Population().sample_options(rng, (*shape, 2)))


def chosen_first(options: Tensor, kinds: Tensor) -> Tensor:
    """Pairs [U, m, 2, E] with the one that each user prefers in front."""
    rewards = Population().rewards(options)[torch.arange(len(kinds)), ..., kinds]
    swap = (rewards[..., 1] > rewards[..., 0])[..., None, None]
    return torch.where(swap, options.flip(2), options)


def as_choices(options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """chosen, rejected [U, n, E] and their mask, of pairs [U, n, 2, E] with the chosen in front."""
    mask = torch.ones(options.shape[:2], dtype=torch.bool)
    return options[:, :, 0], options[:, :, 1], mask


if __name__ == "__main__":
    sys.exit(main())
