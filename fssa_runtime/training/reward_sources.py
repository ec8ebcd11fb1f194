"""Where a reward's tasks come from: a synthetic population, texts, options given by numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset

from fssa_runtime.errors import InputError
from fssa_runtime.files import write_atomically
from fssa_runtime.training.choices import read_choices, split_users
from fssa_runtime.training.data import (
    Content,
    PreferenceData,
    read_preferences,
    rows_of_mode,
    split_preferences,
)
from fssa_runtime.training.reward_recipe import (
    ChoiceFiles,
    PreferenceFiles,
    RewardConfig,
    SyntheticData,
)
from fssa_runtime.training.synthetic import Population, SyntheticTasks
from fssa_runtime.training.tasks import (
    EVALUATION,
    ChoiceRecords,
    EmbeddedTaskDataset,
    OptionTask,
    TaskConfig,
    TaskDataset,
    TooFewChoicesError,
)

EMBEDDINGS_FILE = "embeddings.safetensors"

Embed = Callable[[list[tuple[Content, Content]]], Tensor]
OnEmbedded = Callable[[int, int], None]
HeldOut = Callable[[int], dict[str, Dataset[OptionTask] | None]]


@dataclass(frozen=True)
class RewardSource:
    """Where tasks come from: training tasks, options to take the scale from [M, E], and
    evaluation tasks for n context choices by split (None: no user has that many)."""

    option_dim: int
    training: Dataset[OptionTask]
    scaling_sample: Tensor
    heldout: HeldOut
    population: Population | None = None


def reward_source(
    config: RewardConfig,
    embed: Embed | None,
    embed_fingerprint: str | None,
    on_embedded: OnEmbedded | None = None,
) -> RewardSource:
    """The source `config.data` asks for; the rest as for `reward.train_reward`. ValueError when
    data and settings do not fit, errors of reading besides."""
    if isinstance(config.data, SyntheticData):
        return _synthetic_source(config, config.data)
    if isinstance(config.data, ChoiceFiles):
        return _choice_source(config, config.data)
    if embed is None:
        raise ValueError("embed: expected a function for data.kind 'preferences', got None")
    return _preference_source(config, config.data, embed, embed_fingerprint, on_embedded)


def _synthetic_source(config: RewardConfig, data: SyntheticData) -> RewardSource:
    population = Population(data.population, data.rho)
    seed, settings = config.train.seed, config.evaluation
    training = SyntheticTasks(
        population,
        config.tasks,
        num_tasks=config.train.num_tasks,
        seed=seed,
        num_options=data.num_options,
        mode=data.mode,
    )
    largest = max(settings.contexts)

    def heldout(n: int) -> dict[str, Dataset[OptionTask] | None]:
        tasks = TaskConfig(context_min=n, context_max=n, num_targets=settings.num_targets)
        return {
            "heldout": SyntheticTasks(
                population,
                tasks,
                num_tasks=settings.num_tasks,
                seed=seed,
                stream=EVALUATION,
                max_context=largest,
                num_options=data.num_options,
                mode=data.mode,
            )
        }

    sample = [training[i].target_chosen for i in range(min(1000, len(training)))]
    others = [training[i].target_rejected.flatten(0, -2) for i in range(min(1000, len(training)))]
    return RewardSource(
        population.option_dim, training, torch.cat(sample + others), heldout, population
    )


def _choice_source(config: RewardConfig, files: ChoiceFiles) -> RewardSource:
    data = read_choices(files.files)
    train, new_users = split_users(
        data, num_folds=files.num_folds, fold=files.fold, seed=files.split_seed
    )
    options = EmbeddedChoices(data.chosen, data.rejected, data.mask)
    offered = options.rejected[train][data.mask[train]]
    return RewardSource(
        data.chosen.shape[1],
        _training_tasks(config, data, train, options),
        torch.cat([options.chosen[train], offered]),
        _heldout_tasks(config, data, {"heldout": new_users}, options),
    )


def _preference_source(
    config: RewardConfig,
    files: PreferenceFiles,
    embed: Embed,
    fingerprint: str | None,
    on_embedded: OnEmbedded | None,
) -> RewardSource:
    data = read_preferences(files.files)
    split = split_preferences(
        data,
        heldout_users=files.heldout_users,
        heldout_prompts=files.heldout_prompts,
        seed=files.split_seed,
    )
    kept = config.options.file if config.options is not None else None
    cache = None if fingerprint is None else kept or config.train.output_dir / EMBEDDINGS_FILE
    options = embed_preferences(
        data, embed, cache=cache, fingerprint=fingerprint or "", on_done=on_embedded
    )
    train = rows_of_mode(data, split.train, files.mode)
    splits = {
        name: rows_of_mode(data, getattr(split, name), files.mode)
        for name in ("heldout", "known_users_new_prompts", "new_users_known_prompts")
    }
    rejected = options.rejected[train]
    rejected = rejected if options.mask is None else rejected[options.mask[train]]
    return RewardSource(
        options.chosen.shape[1],
        _training_tasks(config, data, train, options),
        torch.cat([options.chosen[train], rejected]),
        _heldout_tasks(config, data, splits, options),
    )


class EmbeddedChoices(NamedTuple):
    """Options of N choices as vectors: chosen [N, E]; rejected [N, E] for pairs, with mask None, or
    [N, R, E] with the mask of the real ones [N, R] bool."""

    chosen: Tensor
    rejected: Tensor
    mask: Tensor | None


def _training_tasks(
    config: RewardConfig, data: ChoiceRecords, rows: np.ndarray, options: EmbeddedChoices
) -> EmbeddedTaskDataset:
    tasks = TaskDataset(
        data, rows, config.tasks, num_tasks=config.train.num_tasks, seed=config.train.seed
    )
    tasks.say_who_is_left_out()
    return EmbeddedTaskDataset(tasks, *options)


def _heldout_tasks(
    config: RewardConfig,
    data: ChoiceRecords,
    splits: dict[str, np.ndarray],
    options: EmbeddedChoices,
) -> HeldOut:
    settings = config.evaluation

    def heldout(n: int) -> dict[str, Dataset[OptionTask] | None]:
        wanted = config.tasks.model_copy(
            update={"context_min": n, "context_max": n, "num_targets": settings.num_targets}
        )
        found: dict[str, Dataset[OptionTask] | None] = {}
        for name, rows in splits.items():
            try:
                tasks = TaskDataset(
                    data,
                    rows,
                    wanted,
                    num_tasks=settings.num_tasks,
                    seed=config.train.seed,
                    stream=EVALUATION,
                )
            except TooFewChoicesError:
                found[name] = None
            else:
                found[name] = EmbeddedTaskDataset(tasks, *options)
        return found

    return heldout


def embed_preferences(
    data: PreferenceData,
    embed: Embed,
    *,
    cache: Path | None = None,
    fingerprint: str = "",
    batch_size: int = 64,
    on_done: OnEmbedded | None = None,
) -> EmbeddedChoices:
    """Embeddings (float32) of the options of every preference, N = len(data).

    Every distinct (prompt, completion) is embedded once, `batch_size` at a time, in order of
    first appearance. With `cache`, a file written by an earlier call with the same options and
    fingerprint is read instead, and else (re)written. `on_done` is told how many are done, of how
    many. ValueError when `embed` returns another shape than [m, E] with the same E throughout, or
    NaN or infinity.
    """
    index: dict[tuple[Content, Content], int] = {}
    chosen = [index.setdefault((p.prompt, p.chosen), len(index)) for p in data.preferences]
    rejected = [
        [index.setdefault((p.prompt, option), len(index)) for option in p.all_rejected]
        for p in data.preferences
    ]
    options = list(index)
    key = hashlib.sha256(json.dumps([fingerprint, options]).encode()).hexdigest()
    table = _read_embeddings(cache, key)
    if table is None:
        parts: list[Tensor] = []
        for start in range(0, len(options), batch_size):
            asked = options[start : start + batch_size]
            part = _embedded(embed, asked, data)
            width = parts[0].shape[1] if parts else part.shape[-1]
            if part.shape != (len(asked), width):
                raise ValueError(
                    f"embed: expected [{len(asked)}, {width}], got {tuple(part.shape)}"
                )
            parts.append(part.detach().float().cpu())
            if on_done is not None:
                on_done(start + len(asked), len(options))
        table = torch.cat(parts)
        if not torch.isfinite(table).all():
            raise ValueError("embed: expected finite embeddings, got NaN or infinity")
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save({"options": table}, metadata={"key": key}))
    most = max(len(row) for row in rejected)
    if most == 1:
        return EmbeddedChoices(table[chosen], table[[row[0] for row in rejected]], None)
    mask = torch.tensor([[r < len(row) for r in range(most)] for row in rejected])
    padded = torch.tensor([row + [0] * (most - len(row)) for row in rejected])
    return EmbeddedChoices(table[chosen], table[padded] * mask[..., None], mask)


def _embedded(embed: Embed, asked: list[tuple[Content, Content]], data: PreferenceData) -> Tensor:
    """embed(asked); an option that it refuses is named by its prompt and user."""
    try:
        return embed(asked)
    except InputError:
        for option in asked:
            try:
                embed([option])
            except InputError as error:
                raise InputError(f"{data.whose(*option)}: {error}") from error
        raise


def _read_embeddings(cache: Path | None, key: str) -> Tensor | None:
    if cache is None or not cache.is_file():
        return None
    with safe_open(str(cache), framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return file.get_tensor("options")
