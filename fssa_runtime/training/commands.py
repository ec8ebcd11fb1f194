"""What ``fssa train``, ``fssa data`` and ``fssa evaluate`` do once their arguments are parsed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..conditioning.embedding import EmbeddingConfig, embed_options
from ..errors import InputError
from ..files import write_atomically
from ..models.language_model import Content, LanguageModel
from ..users.examples import write_users
from .answers import AnswerConfig, read_answers, read_prompts, sample_answers
from .policy import CONDITIONING_DIR, train_policy
from .policy_recipe import PolicyConfig
from .population import (
    NamedUsersConfig,
    PopulationConfig,
    build_named_users,
    build_preferences,
    write_preferences,
)
from .reward import Embed, RewardConfig, TextOptions, train_reward
from .swap_test import SwapTestConfig, run_swap_test
from .trainer import load_config

Recipe = TypeVar("Recipe", RewardConfig, PolicyConfig)


def train_reward_command(config_file: Path, *, resume: bool, overwrite: bool) -> None:
    """Train a reward by a recipe; print where it lies and how well it predicts choices."""
    config = _with_switches(load_config(config_file, RewardConfig), resume, overwrite)
    embed, fingerprint = None, None
    if config.data.kind == "preferences":
        if config.options is None:
            raise InputError("options: expected the base model that reads the text, got none")
        embed, fingerprint = _embedder(config.options)
    result = train_reward(config, embed=embed, embed_fingerprint=fingerprint)
    console = Console()
    for split, measured in result.metrics.items():
        if not (isinstance(measured, dict) and "contexts" in measured):
            continue
        title = split.replace("_", " ")
        table = Table(
            "choices", "accuracy", "± s.e.", "NLL, nats", "calibration error", title=title
        )
        limits = any("bayes_nll_same_tasks" in e for e in measured["contexts"].values())
        if limits:
            table.add_column("best accuracy")
            table.add_column("best NLL")
        for n, entry in measured["contexts"].items():
            cells = [n, f"{100 * entry['accuracy']:.2f} %", _percent(entry["accuracy_se"])]
            cells += [f"{entry['nll']:.4f}", _percent(entry["calibration_error"])]
            if limits:
                cells.append(_percent(entry["bayes_accuracy_same_tasks"]))
                cells.append(f"{entry['bayes_nll_same_tasks']:.4f}")
            table.add_row(*cells)
        console.print(table)
    console.print(f"trained in {result.fit.seconds:.0f} s; written to {config.train.output_dir}")


def train_policy_command(config_file: Path, *, resume: bool, overwrite: bool) -> None:
    """Train a conditioning by a recipe; print where it lies and its implicit reward's accuracy."""
    config = _with_switches(load_config(config_file, PolicyConfig), resume, overwrite)
    model = LanguageModel.load(config.model, dtype=config.dtype, show_progress=True)
    result = train_policy(config, model)
    console = Console()
    table = Table(
        "choices",
        "accuracy",
        "± s.e.",
        "worst kind of users",
        title="implicit reward, new users and prompts",
    )
    for n, entry in result.metrics["heldout"]["contexts"].items():
        worst = f"{100 * entry['worst_accuracy']:.1f} % {entry['worst_mode']}"
        table.add_row(n, _percent(entry["accuracy"]), _percent(entry["accuracy_se"]), worst)
    console.print(table)
    folder = config.train.output_dir
    if result.fit is None:
        console.print(f"nothing was trained; written to {folder}")
    else:
        checkpoint = folder / CONDITIONING_DIR
        console.print(f"trained in {result.fit.seconds:.0f} s; checkpoint: {checkpoint}")


def answers_command(model: str, prompts: Path, config_file: Path, output: Path) -> None:
    """Sample answers to every prompt in every style; goes on where an earlier call stopped."""
    config = load_config(config_file, AnswerConfig)
    wanted = read_prompts(prompts)
    loaded = LanguageModel.load(model, dtype="bfloat16", show_progress=True)
    _make_parent(output)
    sample_answers(loaded, wanted, config, output)


def choices_command(answers: Path, config_file: Path, output: Path) -> None:
    """Let a simulated population choose between sampled answers."""
    config = load_config(config_file, PopulationConfig)
    preferences, _ = build_preferences(_read_some_answers(answers), config)
    _make_parent(output)
    write_preferences(preferences, output)
    Console().print(f"{len(preferences)} choices of {config.num_users} users in {output}")


def users_command(answers: Path, config_file: Path, output: Path) -> None:
    """Write example users: names, hidden weights, and choices on held-out prompts."""
    config = load_config(config_file, NamedUsersConfig)
    users = build_named_users(_read_some_answers(answers), config)
    _make_parent(output)
    write_users(users, output)
    Console().print(f"{len(users)} users with {config.num_choices} choices each in {output}")


def evaluate_command(config_file: Path, output: Path) -> None:
    """Run the swap test; write JSON, print the summary."""
    result = run_swap_test(load_config(config_file, SwapTestConfig))
    _make_parent(output)
    write_atomically(output, (json.dumps(result, indent=2, default=str) + "\n").encode())
    _print_swap_test(result)


def _print_swap_test(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("condition", *result["swap"], "words", "nll/token", "repeated", "loops")
    for name, summary in result["conditions"].items():
        tastes = [_plus_minus(summary["tastes"][taste]) for taste in result["swap"]]
        table.add_row(
            name,
            *tastes,
            _plus_minus(summary["words"]),
            f"{summary['nll_per_token']:.2f}",
            f"{summary['repeated_4_grams']:.3f}",
            f"{summary['loops']:.2f}",
        )
    console.print(table)
    for taste, swap in result["swap"].items():
        console.print(f"{taste}: more − less = {_plus_minus(swap['more_minus_less'])}")


def _with_switches(config: Recipe, resume: bool, overwrite: bool) -> Recipe:
    train = config.train.model_copy(
        update={
            "resume": resume or config.train.resume,
            "overwrite": overwrite or config.train.overwrite,
        }
    )
    return config.model_copy(update={"train": train})


def _embedder(options: TextOptions) -> tuple[Embed, str]:
    """What turns options into vectors, and a name for it that changes when the vectors would."""
    model = LanguageModel.load(options.model, dtype=options.dtype, show_progress=True)
    config: EmbeddingConfig = options.embedding
    progress = Progress()
    task = progress.add_task("embedding options", total=None)

    def embed(asked: Sequence[tuple[Content, Content]]) -> torch.Tensor:
        with progress:
            return embed_options(model, config, asked, on_done=lambda n: progress.advance(task, n))

    return embed, f"{model.fingerprint}/{options.dtype}/{config.pooling}"


def _read_some_answers(answers: Path) -> list[Mapping[str, str]]:
    records = read_answers(answers)
    if not records:
        raise InputError(f"answers {answers}: no such file, or no answer in it")
    return records


def _make_parent(output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _plus_minus(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} ± {value['standard_error']:.2f}"
