"""What ``fssa train``, ``fssa data`` and ``fssa evaluate`` do once their arguments are parsed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..conditioning.embedding import EmbeddingConfig, embed_options
from ..env import process
from ..errors import InputError
from ..files import check_writable, write_atomically
from ..models.language_model import LanguageModel
from ..models.messages import Content
from ..users.examples import write_users
from .answers import AnswerConfig, read_answers, read_prompts, sample_answers
from .policy import CONDITIONING_DIR, train_policy
from .policy_recipe import PolicyConfig
from .population import (
    NamedUsersConfig,
    PopulationConfig,
    build_named_users,
    build_preferences,
    known_weights_accuracy,
    user_weights,
    write_preferences,
)
from .reward import Embed, RewardConfig, RewardResult, TextOptions, train_reward
from .swap_test import SwapTestConfig, run_swap_test
from .trainer import load_config, training_device

SAY_EVERY_S = 5.0

Recipe = TypeVar("Recipe", RewardConfig, PolicyConfig)


def train_reward_command(config_file: Path, *, resume: bool, overwrite: bool) -> None:
    """Train a reward by a recipe; print where it lies and how well it predicts choices."""
    config = _with_switches(load_config(config_file, RewardConfig), resume, overwrite)
    if config.data.kind != "synthetic":
        _need_files(config_file, config.data.files)
    result = reward_by_recipe(config, where=str(config_file))
    if not process().is_main:
        return
    console = Console()
    for split, measured in result.metrics.items():
        if isinstance(measured, dict) and "contexts" in measured:
            _print_reward(console, split.replace("_", " "), measured)
    print(f"trained in {result.fit.seconds:.0f} s; written to {config.train.output_dir}")


def reward_by_recipe(config: RewardConfig, *, where: str = "recipe") -> RewardResult:
    """Train the reward of a recipe; options that are text are read by the base model it names.

    Raises:
        InputError: no such model, or none named; the message begins with ``where``.
    """
    embed, fingerprint, base = None, None, None
    if config.data.kind == "preferences":
        if config.options is None:
            raise InputError(
                f"{where}: options: expected the base model that reads the text, got none"
            )
        try:
            embed, fingerprint, base = option_reader(config.options, training_device(config.train))
        except InputError as error:
            reason = str(error).removeprefix("--model ")
            raise InputError(f"{where}: options.model: {reason}") from error
    return train_reward(
        config,
        embed=embed,
        embed_fingerprint=fingerprint,
        base_fingerprint=base,
        on_embedded=_reading_progress(),
    )


def _print_reward(console: Console, title: str, measured: dict[str, Any]) -> None:
    # Headers on two lines: without a terminal a table has 80 columns.
    table = Table("choices", "accuracy", "± s.e.", "NLL,\nnats", "calibration\nerror", title=title)
    limits = any("bayes_nll_same_tasks" in e for e in measured["contexts"].values())
    if limits:
        table.add_column("best\naccuracy")
        table.add_column("best\nNLL")
    for n, entry in measured["contexts"].items():
        cells = [n, f"{100 * entry['accuracy']:.2f} %", _percent(entry["accuracy_se"])]
        cells += [f"{entry['nll']:.4f}", _percent(entry["calibration_error"])]
        if limits:
            cells.append(_percent(entry["bayes_accuracy_same_tasks"]))
            cells.append(f"{entry['bayes_nll_same_tasks']:.4f}")
        table.add_row(*cells)
    if table.rows:
        console.print(table)
    for n in measured["skipped_contexts"]:
        print(f"{title}: not measured with {n} choices, no user made so many and one more")


def train_policy_command(config_file: Path, *, resume: bool, overwrite: bool) -> None:
    """Train a conditioning by a recipe; print where it lies and its implicit reward's accuracy."""
    config = _with_switches(load_config(config_file, PolicyConfig), resume, overwrite)
    _need_files(config_file, config.data.files)
    device = training_device(config.train)
    model = LanguageModel.load(
        config.model, dtype=config.dtype, device=device, show_progress=process().is_main
    )
    result = train_policy(config, model)
    if not process().is_main:
        return
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
        measured = _percent(entry["accuracy"]), _percent(entry["accuracy_se"])
        table.add_row(n, *measured, Text(worst))
    console.print(table)
    folder = config.train.output_dir
    if result.fit is None:
        print(f"nothing was trained; written to {folder}")
    else:
        checkpoint = folder / CONDITIONING_DIR
        print(f"trained in {result.fit.seconds:.0f} s; checkpoint: {checkpoint}")


def answers_command(
    model: str, prompts: Path, config_file: Path, output: Path, *, device: str
) -> None:
    """Sample answers to every prompt in every style; goes on where an earlier call stopped."""
    config = load_config(config_file, AnswerConfig)
    wanted = read_prompts(prompts)
    loaded = LanguageModel.load(model, dtype="bfloat16", device=device, show_progress=True)
    _make_parent(output)
    sample_answers(loaded, wanted, config, output)


def choices_command(answers: Path, config_file: Path, output: Path) -> None:
    """Let a simulated population choose between sampled answers."""
    config = load_config(config_file, PopulationConfig)
    preferences, scale = build_preferences(_read_some_answers(answers), config)
    _make_parent(output)
    write_preferences(preferences, output)
    predictable = known_weights_accuracy(preferences, user_weights(config), scale)
    print(
        f"{len(preferences)} choices of {config.num_users} users in {output}; "
        f"knowing their weights would predict {predictable:.1%}"
    )


def users_command(answers: Path, config_file: Path, output: Path) -> None:
    """Write example users: names, hidden weights, and choices on held-out prompts."""
    config = load_config(config_file, NamedUsersConfig)
    users = build_named_users(_read_some_answers(answers), config)
    _make_parent(output)
    write_users(users, output)
    print(f"{len(users)} users with {config.num_choices} choices each in {output}")


def evaluate_command(config_file: Path, output: Path, *, device: str) -> None:
    """Run the swap test; write JSON, print the summary."""
    config = load_config(config_file, SwapTestConfig)
    _make_parent(output)
    check_writable(output)
    result = run_swap_test(config, device)
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


def _need_files(config_file: Path, files: Sequence[Path]) -> None:
    """Before a base model is loaded, which takes a while."""
    for path in files:
        if not path.is_file():
            raise InputError(f"{config_file}: data.files: expected a file, found none at {path}")


def option_reader(
    options: TextOptions, device: torch.device | str = "cpu"
) -> tuple[Embed, str, str]:
    """What turns options into vectors, a name for it that changes when the vectors would, and the
    fingerprint of the base model's weights."""
    model = LanguageModel.load(
        options.model, dtype=options.dtype, device=device, show_progress=True
    )
    config: EmbeddingConfig = options.embedding

    def embed(asked: Sequence[tuple[Content, Content]]) -> torch.Tensor:
        return embed_options(model, config, asked)

    return embed, f"{model.fingerprint}/{options.dtype}/{config.pooling}", model.fingerprint


def _reading_progress() -> Callable[[int, int], None]:
    """Tells how many options were read, a line every few seconds: in a terminal, file or pipe."""
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > SAY_EVERY_S:
            last = time.monotonic()
            print(f"{done} of {total} options read by the base model", flush=True)

    return say


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
