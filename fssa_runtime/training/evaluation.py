"""How well choices are predicted after n context choices, and whether the latent is used.

Works for anything that gives a probability to every option of a target choice: a reward model, a
policy's implicit reward, or the best predictor there can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fssa_runtime.conditioning.encoder import real_choices

# A unit counts as active when its mean varies over users with at least this variance (the
# criterion of Burda et al., arXiv 1509.00519, section 5).
ACTIVE_UNIT_VARIANCE = 1e-2

# Bins of the confidence, of equal width, for the calibration error.
CALIBRATION_BINS = 20

Batch = dict[str, Tensor]


class Scores(NamedTuple):
    """Log-probabilities of the options of every target [U, m, K], the chosen one first and -inf
    where there is no option; latent means [U, Z], None if there is no latent."""

    log_probs: Tensor
    latents: Tensor | None


def spread(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities [M, K] of the real targets of a mask [U, m], in order, as [U, m, K]; 0
    elsewhere."""
    every = log_probs.new_zeros(*mask.shape, log_probs.shape[-1])
    every[mask.to(log_probs.device)] = log_probs
    return every


def active_latent_units(latents: Tensor, threshold: float = ACTIVE_UNIT_VARIANCE) -> int:
    """Number of latent units whose variance over the users, [U, Z] → Z, exceeds `threshold`.

    0 with fewer than two users.
    """
    if latents.shape[0] < 2:
        return 0
    return int((latents.double().var(dim=0) > threshold).sum())


def evaluate(
    score: Callable[[Batch], Scores],
    tasks_by_n: Mapping[int, Dataset[Any]],
    *,
    collate: Callable[[list[Any]], Batch],
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda _more: None,
) -> dict[str, Any]:
    """Accuracy, negative log-likelihood and calibration of the targets for each context length.

        accuracy = mean_j [the chosen option is the likeliest] (1/t where t options tie for it)
        NLL = mean_j -log p(chosen_j)
        calibration error = Σ_bins |Σ_j in bin (right_j - confidence_j)| / number of targets,
            confidence_j the probability of the likeliest option, in bins of width 1/20

    score: batch → `Scores`, called without gradients. tasks_by_n: context length n → map-style
    data set of tasks with `user` and `mode`; collate: list of tasks → batch with "target_mask"
    [U, m] or, for choices among several, [U, m, R]. progress: told how many more tasks are done.

    Returns a dict ready for JSON: {"contexts": {str(n): entry}}; an entry has `accuracy`, `nll`
    (nats) and their standard errors `accuracy_se`, `nll_se`, `calibration_error`, `num_users`,
    `num_tasks`, `num_targets`, `active_latent_units` and `latent_dim` (null without a latent),
    `modes` {mode: accuracy, nll, their errors and the counts}, `worst_mode` and `worst_accuracy`.
    Standard errors take users as the independent units and modes as strata; null when a mode has a
    single user. ValueError without tasks or targets, FloatingPointError when a score is NaN.
    """
    return {
        "contexts": {
            str(n): _evaluate_one(score, tasks, collate, batch_size, torch.device(device), progress)
            for n, tasks in sorted(tasks_by_n.items())
        }
    }


def _evaluate_one(
    score: Callable[[Batch], Scores],
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Batch],
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("tasks_by_n: expected at least one task for each n, got none")
    users: list[str] = []
    modes: list[str] = []
    sums: list[Tensor] = []
    bins = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    latents: list[Tensor] = []
    for tasks in DataLoader(dataset, batch_size, collate_fn=list):
        batch = {name: value.to(device) for name, value in collate(tasks).items()}
        with torch.no_grad():
            scores = score(batch)
        mask = real_choices(batch["target_mask"]).cpu()
        right, confidence, nll = _per_target(scores.log_probs.cpu(), mask)
        counts = mask.sum(dim=1).double()
        sums.append(torch.stack([right.sum(dim=1), nll.sum(dim=1), counts], dim=1))
        which = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        bins.index_add_(0, which[mask], (right - confidence)[mask])
        users.extend(task.user for task in tasks)
        modes.extend(task.mode for task in tasks)
        if scores.latents is not None:
            latents.append(scores.latents.float().cpu())
        progress(len(tasks))
    totals = torch.cat(sums)
    num_targets = int(totals[:, 2].sum())
    if not num_targets:
        raise ValueError("tasks_by_n: expected at least one target for each n, got none")
    return {
        **_summarise(np.asarray(users), np.asarray(modes), totals.numpy()),
        "calibration_error": float(bins.abs().sum()) / num_targets,
        "active_latent_units": active_latent_units(torch.cat(latents)) if latents else None,
        "latent_dim": latents[0].shape[1] if latents else None,
    }


def _per_target(log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right (0..1), confidence and NLL of every target, [U, m] float64, 0 where masked out."""
    log_probs = log_probs.double()
    if bool((log_probs.isnan().any(dim=-1) & mask).any()):
        raise FloatingPointError("log_probs: expected numbers, got NaN")
    log_probs = log_probs.masked_fill(~mask[..., None], 0.0)
    best = log_probs.max(dim=-1, keepdim=True).values
    ties = (log_probs == best).double()
    right = ties[..., 0] / ties.sum(dim=-1)
    zero = torch.zeros((), dtype=torch.float64)
    values = (right, best[..., 0].exp(), -log_probs[..., 0])
    right, confidence, nll = (torch.where(mask, value, zero) for value in values)
    return right, confidence, nll


def _summarise(users: np.ndarray, modes: np.ndarray, sums: np.ndarray) -> dict[str, Any]:
    by_mode: dict[str, dict[str, Any]] = {}
    for mode in np.unique(modes[sums[:, 2] > 0]):
        inside = modes == mode
        by_mode[str(mode)] = _stratum(users[inside], sums[inside])
    total = sums[:, 2].sum()
    shares = [entry["num_targets"] / total for entry in by_mode.values()]
    entry: dict[str, Any] = {}
    for name in ("accuracy", "nll"):
        values = [e[name] for e in by_mode.values()]
        errors = [e[f"{name}_se"] for e in by_mode.values()]
        entry[name] = math.fsum(w * v for w, v in zip(shares, values, strict=True))
        entry[f"{name}_se"] = _combine(shares, errors)
    worst = min(by_mode, key=lambda mode: by_mode[mode]["accuracy"])
    return {
        **entry,
        "num_users": len(np.unique(users)),
        "num_tasks": len(users),
        "num_targets": int(total),
        "modes": by_mode,
        "worst_mode": worst,
        "worst_accuracy": by_mode[worst]["accuracy"],
    }


def _combine(shares: Sequence[float], errors: Sequence[float | None]) -> float | None:
    """Standard error of Σ share_h · value_h from those of the independent strata."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(shares, known, strict=True)))


def _stratum(users: np.ndarray, sums: np.ndarray) -> dict[str, Any]:
    """Means over targets with the standard error of a ratio, users being the clusters."""
    _, cluster = np.unique(users, return_inverse=True)
    num_clusters = int(cluster.max()) + 1
    per_user = np.zeros((num_clusters, 3))
    np.add.at(per_user, cluster, sums)
    targets = per_user[:, 2].sum()
    entry: dict[str, Any] = {}
    for column, name in enumerate(("accuracy", "nll")):
        mean = per_user[:, column].sum() / targets
        residual = per_user[:, column] - mean * per_user[:, 2]
        spread = math.inf
        if num_clusters > 1:
            spread = np.square(residual).sum() * num_clusters / (num_clusters - 1)
        error = math.sqrt(spread) / targets
        entry[name] = float(mean)
        entry[f"{name}_se"] = error if math.isfinite(error) else None
    return {
        **entry,
        "num_users": num_clusters,
        "num_tasks": len(users),
        "num_targets": int(targets),
    }
