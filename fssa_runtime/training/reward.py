"""The run that trains a reward model by a recipe and measures it (NP-BTL, METHOD.md section 3).

Recipes are in `reward_recipe`, where tasks come from in `reward_sources`, the network in
`reward_model`, its losses in `reward_objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from fssa_runtime.conditioning.encoder import antithetic_noise
from fssa_runtime.env import process
from fssa_runtime.training.evaluation import Scores, evaluate
from fssa_runtime.training.reward_model import (
    RewardModel,
    TextReading,
    load_reward,
    save_reward,
)
from fssa_runtime.training.reward_objective import RewardObjective
from fssa_runtime.training.reward_recipe import (
    EvaluationSettings,
    PreferenceFiles,
    RewardConfig,
    SyntheticData,
    TextOptions,
)
from fssa_runtime.training.reward_sources import (
    Embed,
    RewardSource,
    embed_preferences,
    reward_source,
)
from fssa_runtime.training.synthetic import Population, SyntheticTasks
from fssa_runtime.training.tasks import OptionTask, collate_options
from fssa_runtime.training.trainer import (
    FitResult,
    cpu_threads,
    fit,
    forget_metrics,
    write_metrics,
)

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
    "evaluate_reward",
    "load_reward",
    "save_reward",
    "train_reward",
]

# Of the noise that the predictive distribution is taken over; the same in every evaluation.
NOISE_SEED = 0


@dataclass(frozen=True)
class RewardResult:
    """A trained reward: the model, on the CPU, what was measured (by the main one of several
    processes, empty elsewhere), and what the run did."""

    model: RewardModel
    metrics: dict[str, Any]
    fit: FitResult


def train_reward(
    config: RewardConfig,
    *,
    embed: Embed | None = None,
    embed_fingerprint: str | None = None,
    base_fingerprint: str | None = None,
    on_embedded: Callable[[int, int], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RewardResult:
    """Train a reward model by `config`, write it to train.output_dir, evaluate it, write that too.

    embed: needed for data.kind "preferences": a list of m (prompt, completion) → [m, E] float.
    It is called once for every distinct option. embed_fingerprint: names what embeds (model,
    layer, template); if given, embeddings are kept in output_dir and reused by later runs with
    the same fingerprint and options. base_fingerprint: of the weights of config.options.model, if
    embed reads options as config.options says; the reward then is a `TextReward`, which
    `Users.suggest_next_pair` can ask. on_embedded is told how many options are embedded, of how
    many. Files written: reward_model.safetensors, reward_config.json,
    metrics.json. Deterministic from config.train.seed on the CPU. ValueError on data or settings
    that do not fit, errors of `fit` and `read_preferences` besides.
    """
    source = reward_source(config, embed, embed_fingerprint, on_embedded)
    torch.manual_seed(config.train.seed)
    model = RewardModel(config.model_for(source.option_dim))
    model.scaler.fit(source.scaling_sample)
    outcome = fit(
        RewardObjective(
            model,
            objective=config.objective or "elbo",
            kl_weight=1.0 if config.kl_weight is None else config.kl_weight,
            num_samples=config.num_samples or 16,
        ),
        source.training,
        config.train,
        collate=collate_options,
        recipe=config.decisive(),
        callbacks=callbacks,
    )
    metrics: dict[str, Any] = {}
    if process().is_main:
        folder = config.train.output_dir
        reading = None
        if config.options is not None and base_fingerprint is not None:
            reading = TextReading(
                base_model=config.options.model,
                base_fingerprint=base_fingerprint,
                embedding=config.options.embedding,
            )
        forget_metrics(folder)
        save_reward(model, folder, reading)  # before it is measured, which may fail
        with cpu_threads(config.train.cpu_threads):
            measured = evaluate_reward(model, source, config.evaluation)
        metrics = {
            "recipe": config.model_dump(mode="json"),
            "train_seconds": outcome.seconds,
            **measured,
        }
        write_metrics(folder, metrics)
    return RewardResult(model.cpu(), metrics, outcome)


def evaluate_reward(
    model: RewardModel, source: RewardSource, settings: EvaluationSettings
) -> dict[str, Any]:
    """`evaluate` of the model on every evaluation split, by split name.

    `skipped_contexts` lists the n for which no user of the split has enough choices.
    For a synthetic population each entry also has the limits of the best predictor:
    `bayes_accuracy_same_tasks`, `bayes_nll_same_tasks` on exactly these tasks, and, for pairs of
    users of both kinds, `bayes_accuracy` and `bayes_nll` on average. With
    settings.identification also `identification_error` and its limit `bayes_identification_error`.
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
    device = next(model.parameters()).device
    noise = None
    if settings.num_samples:
        assert model.config.encoder is not None
        latent_dim = model.config.encoder.latent_dim
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise = antithetic_noise((latent_dim,), settings.num_samples, generator).to(device)

    def score(batch: dict[str, Tensor]) -> Scores:
        return model(batch, noise)

    metrics: dict[str, Any] = {
        name: {"contexts": {}, "skipped_contexts": every_n}
        for name, every_n in skipped.items()
        if name not in by_split
    }
    for name, tasks_by_n in by_split.items():
        metrics[name] = evaluate(
            score,
            tasks_by_n,
            collate=collate_options,
            batch_size=settings.batch_size,
            device=device,
        )
        metrics[name]["skipped_contexts"] = skipped.get(name, [])
        if source.population is not None:
            _add_limits(metrics[name], source.population, tasks_by_n, settings)
            if settings.identification:
                _add_identification(
                    metrics[name], source.population, tasks_by_n, settings, score, device
                )
    model.train(was_training)
    return metrics


def _add_limits(
    metrics: dict[str, Any],
    population: Population,
    tasks_by_n: dict[int, Dataset[OptionTask]],
    settings: EvaluationSettings,
) -> None:
    best = evaluate(
        lambda batch: Scores(population.bayes_log_probs(batch), None),
        tasks_by_n,
        collate=collate_options,
        batch_size=settings.batch_size,
    )
    for n, tasks in tasks_by_n.items():
        assert isinstance(tasks, SyntheticTasks)
        entry, limit = metrics["contexts"][str(n)], best["contexts"][str(n)]
        if tasks.num_options == 2 and tasks.mode is None:
            entry["bayes_accuracy"] = population.bayes_accuracy(n)
            entry["bayes_nll"] = population.bayes_nll(n)
        entry["bayes_accuracy_same_tasks"] = limit["accuracy"]
        entry["bayes_nll_same_tasks"] = limit["nll"]


def _add_identification(
    metrics: dict[str, Any],
    population: Population,
    tasks_by_n: dict[int, Dataset[OptionTask]],
    settings: EvaluationSettings,
    score: Callable[[dict[str, Tensor]], Scores],
    device: torch.device,
) -> None:
    """The error on targets where the two kinds choose differently: there, to predict the choice is
    to name the kind."""

    def collate_conflicts(tasks: list[OptionTask]) -> dict[str, Tensor]:
        batch = collate_options(tasks)
        batch["target_mask"] &= population.conflicts(
            batch["target_chosen"], batch["target_rejected"]
        )
        return batch

    measured = evaluate(
        score,
        tasks_by_n,
        collate=collate_conflicts,
        batch_size=settings.batch_size,
        device=device,
    )
    for n in tasks_by_n:
        entry, found = metrics["contexts"][str(n)], measured["contexts"][str(n)]
        entry["identification_error"] = 1 - found["accuracy"]
        entry["identification_error_se"] = found["accuracy_se"]
        entry["bayes_identification_error"] = population.identification_error(n)
