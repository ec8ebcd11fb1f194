"""How well choices are predicted after n context choices, and whether the latent is used.

Works for anything that gives a margin r(chosen) - r(rejected) for every target: a reward model,
or a policy's implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# A unit counts as active when its mean varies over users with at least this variance (the
# criterion of Burda et al., arXiv 1509.00519, section 5).
ACTIVE_UNIT_VARIANCE = 1e-2

Batch = dict[str, Tensor]


class Scores(NamedTuple):
    """Margins r(chosen) - r(rejected) [U, m]; latent means [U, Z], None if there is no latent."""

    margins: Tensor
    latents: Tensor | None


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
) -> dict[str, Any]:
    """Accuracy and negative log-likelihood of the targets for each context length.

        accuracy = mean_j [margin_j > 0] (½ where margin_j = 0),  NLL = mean_j log(1 + e^-margin_j)

    score: batch → `Scores`, called without gradients. tasks_by_n: context length n → map-style
    data set of tasks with `user` and `mode`; collate: list of tasks → batch with "target_mask".

    Returns a dict ready for JSON: {"contexts": {str(n): entry}}; an entry has `accuracy`, `nll`
    (nats) and their standard errors `accuracy_se`, `nll_se`, `num_users`, `num_tasks`,
    `num_targets`,
    `active_latent_units` and `latent_dim` (null without a latent), `modes` {mode: the same four
    numbers and counts}, `worst_mode` and `worst_accuracy`. Standard errors take users as the
    independent units and modes as strata; null when a mode has a single user.
    """
    return {
        "contexts": {
            str(n): _evaluate_one(score, tasks, collate, batch_size, torch.device(device))
            for n, tasks in sorted(tasks_by_n.items())
        }
    }


def _evaluate_one(
    score: Callable[[Batch], Scores],
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Batch],
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("tasks_by_n: expected at least one task for each n, got none")
    users: list[str] = []
    modes: list[str] = []
    sums: list[Tensor] = []
    latents: list[Tensor] = []
    for tasks in DataLoader(dataset, batch_size, collate_fn=list):
        batch = {name: value.to(device) for name, value in collate(tasks).items()}
        with torch.no_grad():
            scores = score(batch)
        sums.append(_task_sums(scores.margins.cpu(), batch["target_mask"].cpu()))
        users.extend(task.user for task in tasks)
        modes.extend(task.mode for task in tasks)
        if scores.latents is not None:
            latents.append(scores.latents.float().cpu())
    return _summarise(
        np.asarray(users),
        np.asarray(modes),
        torch.cat(sums).numpy(),
        torch.cat(latents) if latents else None,
    )


def _task_sums(margins: Tensor, mask: Tensor) -> Tensor:
    """Per task: right answers, total NLL, number of targets; [U, 3] float64."""
    margins = margins.double()
    if bool((margins.isnan() & mask).any()):
        raise FloatingPointError("margins: expected numbers, got NaN")
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    nll = F.softplus(-margins)
    zero = torch.zeros((), dtype=torch.float64)
    per_task = [torch.where(mask, value, zero).sum(dim=1) for value in (right, nll)]
    return torch.stack([*per_task, mask.sum(dim=1).double()], dim=1)


def _summarise(
    users: np.ndarray, modes: np.ndarray, sums: np.ndarray, latents: Tensor | None
) -> dict[str, Any]:
    by_mode: dict[str, dict[str, Any]] = {}
    for mode in np.unique(modes):
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
        "active_latent_units": None if latents is None else active_latent_units(latents),
        "latent_dim": None if latents is None else latents.shape[1],
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
