"""Recipes for reward models and the run that trains one (NP-BTL, METHOD.md section 3).

The network, its loss and its checkpoint are in `reward_model`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback
from typing_extensions import Self

from fssa_runtime.conditioning.embedding import EmbeddingConfig
from fssa_runtime.conditioning.encoder import EncoderSettings
from fssa_runtime.files import write_atomically
from fssa_runtime.training.data import (
    Content,
    PreferenceData,
    read_preferences,
    split_preferences,
)
from fssa_runtime.training.evaluation import Scores, evaluate
from fssa_runtime.training.reward_model import (
    RewardModel,
    RewardModelConfig,
    RewardObjective,
    load_reward,
    save_reward,
)
from fssa_runtime.training.synthetic import Population, PopulationName, SyntheticTasks
from fssa_runtime.training.tasks import (
    EVALUATION,
    EmbeddedTaskDataset,
    OptionTask,
    TaskConfig,
    TaskDataset,
    TooFewChoicesError,
    collate_options,
)
from fssa_runtime.training.trainer import FitResult, TrainSettings, cpu_threads, fit

__all__ = [
    "Embed",
    "EvaluationSettings",
    "PreferenceFiles",
    "RewardConfig",
    "RewardModel",
    "RewardResult",
    "SyntheticData",
    "TextOptions",
    "embed_preferences",
    "load_reward",
    "save_reward",
    "train_reward",
]

METRICS_FILE = "metrics.json"
EMBEDDINGS_FILE = "embeddings.safetensors"

Embed = Callable[[list[tuple[Content, Content]]], Tensor]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SyntheticData(_Strict):
    """Tasks drawn afresh from a synthetic population (`synthetic.Population`)."""

    kind: Literal["synthetic"]
    population: PopulationName = "interval"
    rho: float = 0.0

    @model_validator(mode="after")
    def _population_exists(self) -> Self:
        Population(self.population, self.rho)
        return self


class PreferenceFiles(_Strict):
    """Recorded preferences (`data.read_preferences`), split by user and by prompt."""

    kind: Literal["preferences"]
    files: tuple[Path, ...] = Field(min_length=1)
    heldout_users: float = Field(default=0.2, gt=0, lt=1)
    heldout_prompts: float = Field(default=0.2, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)


class TextOptions(_Strict):
    """How text options become vectors: the base model whose hidden states are read, and which."""

    model: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    embedding: EmbeddingConfig = EmbeddingConfig()


class EvaluationSettings(_Strict):
    """Fresh tasks for each context length, measured after training."""

    contexts: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 3, 5, 10), min_length=1
    )
    num_tasks: int = Field(default=2000, ge=2)
    num_targets: int = Field(default=20, ge=1)
    batch_size: int = Field(default=250, ge=1)


class RewardConfig(_Strict):
    """A recipe for a reward model, as read from YAML by `trainer.load_config`.

    `encoder` may be left out (its defaults apply) and must be for model "btl"; kl_weight (1 if
    left out) weighs the KL term of a stochastic encoder and is for that only. `options` says how
    text becomes vectors, for data.kind "preferences"; a caller of `train_reward` with an `embed`
    of its own leaves it out.
    """

    model: Literal["np-btl", "btl"] = "np-btl"
    data: Annotated[SyntheticData | PreferenceFiles, Field(discriminator="kind")]
    options: TextOptions | None = None
    tasks: TaskConfig = TaskConfig()
    encoder: EncoderSettings | None = None
    hidden_dim: int = Field(default=256, ge=1)
    kl_weight: float | None = Field(default=None, ge=0)
    train: TrainSettings
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.model == "btl" and self.encoder is not None:
            raise ValueError("encoder: expected none for model 'btl', which is not conditioned")
        stochastic = self.encoder is not None and self.encoder.stochastic
        if self.kl_weight is not None and not stochastic:
            raise ValueError("kl_weight: expected none unless encoder.stochastic is true")
        if self.data.kind == "synthetic" and self.options is not None:
            raise ValueError("options: expected none for synthetic data, which has no text")
        if self.data.kind == "synthetic" and self.tasks.disjoint_by == "prompt":
            raise ValueError(
                "tasks.disjoint_by: expected 'pair' for synthetic data, which has no prompts"
            )
        return self

    def model_for(self, option_dim: int) -> RewardModelConfig:
        """The network this recipe asks for, for options of size `option_dim`."""
        encoder = None if self.model == "btl" else self.encoder or EncoderSettings()
        return RewardModelConfig(option_dim=option_dim, hidden_dim=self.hidden_dim, encoder=encoder)


@dataclass(frozen=True)
class RewardResult:
    """A trained reward: the model, what was measured, and what the run did."""

    model: RewardModel
    metrics: dict[str, Any]
    fit: FitResult


def train_reward(
    config: RewardConfig,
    *,
    embed: Embed | None = None,
    embed_fingerprint: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RewardResult:
    """Train a reward model by `config`, evaluate it, and write both to train.output_dir.

    embed: needed for data.kind "preferences": a list of m (prompt, completion) → [m, E] float.
    It is called once for every distinct option. embed_fingerprint: names what embeds (model,
    layer, template); if given, embeddings are kept in output_dir and reused by later runs with
    the same fingerprint and options. Files written: reward_model.safetensors, reward_config.json,
    metrics.json. Deterministic from config.train.seed on the CPU. ValueError on data or settings
    that do not fit, errors of `fit` and `read_preferences` besides.
    """
    source = _source(config, embed, embed_fingerprint)
    torch.manual_seed(config.train.seed)
    model = RewardModel(config.model_for(source.option_dim))
    model.scaler.fit(source.scaling_sample)
    outcome = fit(
        RewardObjective(model, kl_weight=1.0 if config.kl_weight is None else config.kl_weight),
        source.training,
        config.train,
        collate=collate_options,
        callbacks=callbacks,
    )
    with cpu_threads(config.train.cpu_threads):
        measured = evaluate_reward(model, source, config.evaluation)
    metrics = {
        "recipe": config.model_dump(mode="json"),
        "train_seconds": outcome.seconds,
        **measured,
    }
    folder = config.train.output_dir
    save_reward(model, folder)
    write_atomically(folder / METRICS_FILE, (json.dumps(metrics, indent=2) + "\n").encode())
    return RewardResult(model, metrics, outcome)


@dataclass(frozen=True)
class RewardSource:
    """Where tasks come from: training tasks, options to take the scale from [M, E], and
    evaluation tasks for n context choices by split (None: no user has that many)."""

    option_dim: int
    training: Dataset[OptionTask]
    scaling_sample: Tensor
    heldout: Callable[[int], dict[str, Dataset[OptionTask] | None]]
    population: Population | None = None


def evaluate_reward(
    model: RewardModel, source: RewardSource, settings: EvaluationSettings
) -> dict[str, Any]:
    """`evaluate` of the model on every evaluation split, by split name.

    `skipped_contexts` lists the n for which no user of the split has enough choices.
    For a synthetic population each entry also has the limits: `bayes_accuracy`, `bayes_nll` on
    average, and `bayes_accuracy_same_tasks` of the best predictor on exactly these tasks.
    """
    by_split: dict[str, dict[int, Dataset[OptionTask]]] = {}
    skipped: dict[str, list[int]] = {}
    for n in settings.contexts:
        for name, tasks in source.heldout(n).items():
            if tasks is None:
                skipped.setdefault(name, []).append(n)
            else:
                by_split.setdefault(name, {})[n] = tasks
    was_training = model.training
    model.eval()
    metrics: dict[str, Any] = {}
    for name, tasks_by_n in by_split.items():
        metrics[name] = evaluate(
            model,
            tasks_by_n,
            collate=collate_options,
            batch_size=settings.batch_size,
            device=model.head_out.weight.device,
        )
        metrics[name]["skipped_contexts"] = skipped.get(name, [])
        if source.population is not None:
            _add_limits(metrics[name], source.population, tasks_by_n, settings)
    model.train(was_training)
    return metrics


def _add_limits(
    metrics: dict[str, Any],
    population: Population,
    tasks_by_n: dict[int, Dataset[OptionTask]],
    settings: EvaluationSettings,
) -> None:
    best = evaluate(
        lambda batch: Scores(population.bayes_margin(batch), None),
        tasks_by_n,
        collate=collate_options,
        batch_size=settings.batch_size,
    )
    for n in tasks_by_n:
        entry = metrics["contexts"][str(n)]
        entry["bayes_accuracy"] = population.bayes_accuracy(n)
        entry["bayes_nll"] = population.bayes_nll(n)
        entry["bayes_accuracy_same_tasks"] = best["contexts"][str(n)]["accuracy"]


def _source(
    config: RewardConfig, embed: Embed | None, embed_fingerprint: str | None
) -> RewardSource:
    if isinstance(config.data, SyntheticData):
        return _synthetic_source(config, config.data)
    if embed is None:
        raise ValueError("embed: expected a function for data.kind 'preferences', got None")
    return _preference_source(config, config.data, embed, embed_fingerprint)


def _synthetic_source(config: RewardConfig, data: SyntheticData) -> RewardSource:
    population = Population(data.population, data.rho)
    seed, settings = config.train.seed, config.evaluation
    training = SyntheticTasks(population, config.tasks, num_tasks=config.train.num_tasks, seed=seed)
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
            )
        }

    sample = [training[i].target_chosen for i in range(min(1000, len(training)))]
    others = [training[i].target_rejected for i in range(min(1000, len(training)))]
    return RewardSource(
        population.option_dim, training, torch.cat(sample + others), heldout, population
    )


def _preference_source(
    config: RewardConfig, files: PreferenceFiles, embed: Embed, fingerprint: str | None
) -> RewardSource:
    data = read_preferences(files.files)
    split = split_preferences(
        data,
        heldout_users=files.heldout_users,
        heldout_prompts=files.heldout_prompts,
        seed=files.split_seed,
    )
    seed, settings = config.train.seed, config.evaluation
    cache = None if fingerprint is None else config.train.output_dir / EMBEDDINGS_FILE
    chosen, rejected = embed_preferences(data, embed, cache=cache, fingerprint=fingerprint or "")
    tasks = TaskDataset(
        data, split.train, config.tasks, num_tasks=config.train.num_tasks, seed=seed
    )

    def heldout(n: int) -> dict[str, Dataset[OptionTask] | None]:
        wanted = config.tasks.model_copy(
            update={"context_min": n, "context_max": n, "num_targets": settings.num_targets}
        )
        found: dict[str, Dataset[OptionTask] | None] = {}
        for name in ("heldout", "known_users_new_prompts", "new_users_known_prompts"):
            try:
                rows = TaskDataset(
                    data,
                    getattr(split, name),
                    wanted,
                    num_tasks=settings.num_tasks,
                    seed=seed,
                    stream=EVALUATION,
                )
            except TooFewChoicesError:
                found[name] = None
            else:
                found[name] = EmbeddedTaskDataset(rows, chosen, rejected)
        return found

    return RewardSource(
        chosen.shape[1],
        EmbeddedTaskDataset(tasks, chosen, rejected),
        torch.cat([chosen[split.train], rejected[split.train]]),
        heldout,
    )


def embed_preferences(
    data: PreferenceData,
    embed: Embed,
    *,
    cache: Path | None = None,
    fingerprint: str = "",
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Embeddings of the chosen and of the rejected options, each [N, E] float32, N = len(data).

    Every distinct (prompt, completion) is embedded once, `batch_size` at a time, in order of
    first appearance. With `cache`, a file written by an earlier call with the same options and
    fingerprint is read instead, and else (re)written. ValueError when `embed` returns another
    shape than [m, E] with the same E throughout, or NaN or infinity.
    """
    index: dict[tuple[Content, Content], int] = {}
    chosen = [index.setdefault((p.prompt, p.chosen), len(index)) for p in data.preferences]
    rejected = [index.setdefault((p.prompt, p.rejected), len(index)) for p in data.preferences]
    options = list(index)
    key = hashlib.sha256(json.dumps([fingerprint, options]).encode()).hexdigest()
    table = _read_embeddings(cache, key)
    if table is None:
        parts: list[Tensor] = []
        for start in range(0, len(options), batch_size):
            asked = options[start : start + batch_size]
            part = embed(asked)
            width = parts[0].shape[1] if parts else part.shape[-1]
            if part.shape != (len(asked), width):
                raise ValueError(
                    f"embed: expected [{len(asked)}, {width}], got {tuple(part.shape)}"
                )
            parts.append(part.detach().float().cpu())
        table = torch.cat(parts)
        if not torch.isfinite(table).all():
            raise ValueError("embed: expected finite embeddings, got NaN or infinity")
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, save({"options": table}, metadata={"key": key}))
    return table[chosen], table[rejected]


def _read_embeddings(cache: Path | None, key: str) -> Tensor | None:
    if cache is None or not cache.is_file():
        return None
    with safe_open(str(cache), framework="pt") as file:
        if (file.metadata() or {}).get("key") != key:
            return None
        return file.get_tensor("options")
