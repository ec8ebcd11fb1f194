"""Evaluation: accuracy, likelihood, calibration and their errors, by hand."""

import json

import numpy as np
import pytest
import torch

from fssa_runtime.training.evaluation import Scores, active_latent_units, evaluate
from fssa_runtime.training.tasks import OptionTask, collate_options


def of_margins(margins: torch.Tensor, latents: torch.Tensor | None = None) -> Scores:
    """Scores of pairs from margins r(chosen) - r(rejected) [U, m]: p = σ(margin)."""
    sides = [margins.double().sigmoid().log(), (-margins.double()).sigmoid().log()]
    return Scores(torch.stack(sides, dim=-1), latents)


def option_task(user, mode, m):
    empty, target = torch.zeros(0, 1), torch.zeros(m, 1)
    return OptionTask(user, mode, empty, empty, target, target)


def test_evaluation_by_hand():
    tasks = [option_task("a", "x", 2), option_task("b", "x", 1), option_task("c", "y", 1)]
    margins = torch.tensor([[1.0, -1.0], [2.0, 99.0], [0.0, float("nan")]])
    latents = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.05, 4.0]])
    batches = iter([slice(0, 2), slice(2, 3)])

    def score(batch):
        part = next(batches)
        return of_margins(margins[part, : batch["target_mask"].shape[1]], latents[part])

    got = evaluate(score, {4: tasks}, collate=collate_options, batch_size=2)["contexts"]["4"]
    nll = np.log1p(np.exp([-1.0, 1.0, -2.0, 0.0]))
    assert got["accuracy"] == pytest.approx(2.5 / 4)
    assert got["nll"] == pytest.approx(nll.mean())
    assert (got["num_users"], got["num_tasks"], got["num_targets"]) == (3, 3, 4)
    x, y = got["modes"]["x"], got["modes"]["y"]
    assert (x["accuracy"], y["accuracy"]) == (pytest.approx(2 / 3), 0.5)
    # Clusters a (1 of 2) and b (1 of 1) around 2/3: residuals ∓1/3.
    assert x["accuracy_se"] == pytest.approx(np.sqrt(2 * (1 / 3) ** 2 * 2 / 1) / 3)
    assert y["accuracy_se"] is None
    assert got["accuracy_se"] is None
    assert (got["worst_mode"], got["worst_accuracy"]) == ("y", 0.5)
    assert (got["active_latent_units"], got["latent_dim"]) == (1, 2)
    json.dumps(got, allow_nan=False)


def test_standard_error_matches_the_spread_of_repetitions():
    """Users answer alike within themselves, so targets are far from independent."""
    rng = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(300):
        right = rng.random(40) < 0.7
        margins = torch.tensor(np.where(right, 1.0, -1.0))[:, None].expand(-1, 5)
        tasks = [option_task(str(i // 2), "x", 5) for i in range(40)]
        margins = margins[torch.arange(40) // 2 * 2]
        entry = evaluate(
            lambda batch, m=margins: of_margins(m), {0: tasks}, collate=collate_options
        )["contexts"]["0"]
        estimates.append(entry["accuracy"])
        errors.append(entry["accuracy_se"])
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_nan_scores_are_an_error():
    with pytest.raises(FloatingPointError, match="log_probs: expected numbers, got NaN"):
        evaluate(
            lambda batch: of_margins(torch.full((1, 2), float("nan"))),
            {0: [option_task("a", "x", 2)]},
            collate=collate_options,
        )


def test_active_units_need_variance():
    latents = torch.zeros(100, 3)
    latents[:, 1] = torch.linspace(-1, 1, 100)
    latents[:, 2] = torch.linspace(-0.1, 0.1, 100)
    assert active_latent_units(latents) == 1
    assert active_latent_units(latents[:1]) == 0


def scored(log_probs, mask=None):
    """The entry of one user with these log-probabilities [m, K]."""
    log_probs = torch.tensor(log_probs)
    task = option_task("a", "x", len(log_probs))

    def collate(tasks):
        batch = collate_options(tasks)
        if mask is not None:
            batch["target_mask"] = torch.tensor([mask])
        return batch

    entries = evaluate(lambda batch: Scores(log_probs[None], None), {0: [task]}, collate=collate)
    return entries["contexts"]["0"]


def test_choices_among_several_by_hand():
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.4, 0.4, 0.2], [0.6, 0.4, 0.0]])
    with np.errstate(divide="ignore"):
        entry = scored(np.log(p), [[True, True], [True, True], [True, True], [True, False]])
    # Right, wrong, one of two that tie, right.
    assert entry["accuracy"] == pytest.approx(2.5 / 4)
    assert entry["nll"] == pytest.approx(-np.log(p[:, 0]).mean())
    # Each confidence in a bin of its own: 0.5, 0.7, 0.4 and 0.6.
    assert entry["calibration_error"] == pytest.approx((0.5 + 0.7 + 0.1 + 0.4) / 4)


def test_calibration_error_compares_shares_with_confidence():
    """Of ten answers given with 80 % eight are right: none. All right: 20 points."""
    calibrated = np.log([[0.8, 0.2]] * 8 + [[0.2, 0.8]] * 2)
    assert scored(calibrated)["calibration_error"] == pytest.approx(0, abs=1e-12)
    assert scored(np.log([[0.8, 0.2]] * 10))["calibration_error"] == pytest.approx(0.2)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="expected at least one target"):
        scored(np.log([[0.5, 0.5]]), [False])
