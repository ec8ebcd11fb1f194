"""Questions that are chosen against random ones: choices needed for the same accuracy.

    python -m benchmarks.questions synthetic --json benchmarks/results/cpu/questions.json
    python -m benchmarks.questions text --json benchmarks/results/cpu/questions_text.json
    python -m benchmarks.questions shipped --json benchmarks/results/cpu/questions_shipped.json

`synthetic`: the two kinds of people of `python -m benchmarks.rewards synthetic`. `text`: the four
of `recipes/text_questions`, who are asked about answers to prompts that no training saw. Rewards
are trained first if they are not in the folder of runs. `shipped`: the reward that ships, and the
people of `recipes/smollm2_135m` that no training saw, each a kind of their own; seeds are only
those of the questions.

Every simulated user, equally many of every kind, answers question after question; each is taken
from a fresh pool of random pairs, the same for both ways of asking: the pair of largest expected
information gain, or the first of the pool. No user meets a pair twice. After every answer the
prediction of other pairs is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.question_tasks import TASKS, Pairs, Task
from benchmarks.rewards import ROOT, mean_and_error
from fssa_runtime.conditioning.encoder import antithetic_noise
from fssa_runtime.conditioning.questions import information_of_questions
from fssa_runtime.training.reward import RewardModel

# The way up from what is known of nobody in particular to what is known of a kind, of which the
# share is to be reached.
SHARE_OF_CEILING = 0.9
ASKED_AT_ONCE = 50
WAYS = ("active", "random")
QUESTIONS = {"synthetic": 8, "text": 16, "shipped": 16}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--questions", type=int, help="for each user (default: 8, on texts 16)")
    parser.add_argument("--pool", type=int, default=20, help="candidates for every question")
    parser.add_argument("--targets", type=int, default=40, help="pairs predicted after each answer")
    parser.add_argument("--samples", type=int, default=64, help="latents drawn from a posterior")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    runs = []
    arguments.questions = arguments.questions or QUESTIONS[arguments.task]
    for seed in seeds:
        task = TASKS[arguments.task](seed, arguments.runs)
        curves = {way: ask(task, way == "active", seed, arguments) for way in WAYS}
        needed = {way: choices_needed(curve, task.ceiling) for way, curve in curves.items()}
        runs.append({"seed": seed, "accuracy": curves, "choices_needed": needed})
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "task": arguments.task,
        "kinds": task.kinds,
        "ceiling": task.ceiling,
        "users": arguments.users,
        "pool": arguments.pool,
        "targets": arguments.targets,
        "samples": arguments.samples,
        "share_of_ceiling": SHARE_OF_CEILING,
        "mean": over_runs(runs),
        "runs": runs,
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def over_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over the seeds: of the accuracy after every number of answers, of
    the choices needed, and of their ratio. These have no mean where one seed never gets there."""
    needed = {way: [run["choices_needed"][way] for run in runs] for way in WAYS}
    ratios = [
        None if None in pair else pair[0] / pair[1]
        for pair in zip(needed["active"], needed["random"], strict=True)
    ]

    def of_all(values: Sequence[float | None]) -> dict[str, float | None]:
        return mean_and_error([] if None in values else values)

    return {
        "accuracy": {
            way: [
                mean_and_error(column)
                for column in zip(*(run["accuracy"][way] for run in runs), strict=True)
            ]
            for way in WAYS
        },
        "choices_needed": {way: of_all(values) for way, values in needed.items()},
        "active_over_random": of_all(ratios),
    }


def choices_needed(accuracy: Sequence[float], ceiling: float) -> float | None:
    """Choices after which the share of the way to the ceiling is reached, linear between whole
    numbers; None if it never is."""
    wanted = accuracy[0] + SHARE_OF_CEILING * (ceiling - accuracy[0])
    for n in range(1, len(accuracy)):
        if accuracy[n] >= wanted:
            return n - (accuracy[n] - wanted) / (accuracy[n] - accuracy[n - 1])
    return None


@torch.no_grad()
def ask(task: Task, active: bool, seed: int, arguments: argparse.Namespace) -> list[float]:
    """Accuracy on other pairs after 0, 1, 2, ... answers, the mean over all users."""
    totals = np.zeros(arguments.questions + 1)
    assert task.model.config.encoder is not None
    noise = antithetic_noise(
        (task.model.config.encoder.latent_dim,),
        arguments.samples,
        torch.Generator().manual_seed(0),
    )
    for start in range(0, arguments.users, ASKED_AT_ONCE):
        count = min(ASKED_AT_ONCE, arguments.users - start)
        # Not the streams of training and evaluation.
        rng = np.random.default_rng((seed, 2, start))
        kinds = torch.arange(start, start + count) % len(task.kinds)
        users = torch.arange(count)
        context = torch.zeros(count, 0, 2, task.model.config.option_dim)
        known = torch.zeros(count, 0, dtype=torch.long)
        for n in range(arguments.questions + 1):
            targets = task.targets(rng, (count, arguments.targets))
            totals[n] += accuracy(task.model, context, targets, kinds, noise) * count
            pool = task.questions(rng, (count, arguments.pool))
            new = ~((pool.number[..., None] == known[:, None]) & (pool.number >= 0)[..., None]).any(
                2
            )
            worth = new.double()
            if active:
                latent = task.model.encode(*as_choices(context))
                assert latent is not None
                worth = information_of_questions(
                    task.model,
                    latent,
                    pool.options[:, :, 0],
                    pool.options[:, :, 1],
                    num_samples=arguments.samples,
                ).masked_fill(~new, -1.0)
            question = pool.of(users, worth.argmax(dim=1))
            answered = chosen_first(question, kinds, rng)
            context = torch.cat([context, answered[:, None]], dim=1)
            known = torch.cat([known, question.number[:, None]], dim=1)
    return list(totals / arguments.users)


def accuracy(
    model: RewardModel, context: Tensor, targets: Pairs, kinds: Tensor, noise: Tensor
) -> float:
    """Probability that people of these kinds [U] choose what is predicted of them, the mean over
    targets [U, m]."""
    batch = {
        f"{kind}_{name}": value
        for kind, options in (("context", context), ("target", targets.options))
        for name, value in zip(("chosen", "rejected", "mask"), as_choices(options), strict=True)
    }
    p = model(batch, noise).log_probs.exp()
    first = (p[..., 0] > p[..., 1]).double() + 0.5 * (p[..., 0] == p[..., 1])
    chosen = of_kinds(targets.prefers_first, kinds)
    return float((first * chosen + (1 - first) * (1 - chosen)).mean())


def chosen_first(question: Pairs, kinds: Tensor, rng: np.random.Generator) -> Tensor:
    """Pairs [U, 2, E] with the one in front that users of these kinds [U] chose."""
    drawn = torch.from_numpy(rng.random(len(kinds)))
    swap = drawn >= of_kinds(question.prefers_first, kinds)
    return torch.where(swap[:, None, None], question.options.flip(1), question.options)


def of_kinds(values: Tensor, kinds: Tensor) -> Tensor:
    """Each user's own of the values of all kinds [U, ..., K]: [U, ...]."""
    return values[torch.arange(len(kinds)), ..., kinds]


def as_choices(options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """chosen, rejected [U, n, E] and their mask, of pairs [U, n, 2, E] with the chosen in front."""
    mask = torch.ones(options.shape[:2], dtype=torch.bool)
    return options[:, :, 0], options[:, :, 1], mask


if __name__ == "__main__":
    sys.exit(main())
