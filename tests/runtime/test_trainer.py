"""The training loop: order of tasks, schedule, a stop at the first number that is not finite."""

from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from fssa_runtime.training.trainer import TrainSettings, fit


class Numbers(Dataset):
    """Items 0, 1, 2, ... so that a module can record what it was given."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index


def collate_numbers(items):
    return {"numbers": torch.tensor(items)}


class Recorder(nn.Module):
    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []
        self.fail_at = fail_at

    def forward(self, numbers):
        self.seen.append(numbers.tolist())
        loss = self.weight * numbers.float().mean()
        if self.fail_at in numbers.tolist():
            loss = loss * float("nan")
        return {"loss": loss, "largest": numbers.max()}


def settings(folder, **changes):
    options = {
        "output_dir": folder,
        "steps": 3,
        "tasks_per_batch": 2,
        "save_every": 0,
        "log_every": 3,
        "progress": "off",
        "tensorboard": False,
    }
    return TrainSettings(**{**options, **changes})


def test_tasks_come_in_order_once_and_scalars_are_logged(tmp_path):
    module = Recorder()
    result = fit(module, Numbers(100), settings(tmp_path), collate=collate_numbers)
    assert module.seen == [[0, 1], [2, 3], [4, 5]]
    assert [entry["largest"] for entry in result.history] == [pytest.approx(3.0)]
    assert result.steps == 3


def test_optimiser_schedule_and_clipping(tmp_path):
    """Gradient accumulation, warm-up and decay by hand on one weight, with Adam's ±lr steps."""
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(model.weight.item())

    chosen = settings(
        tmp_path,
        steps=4,
        warmup_steps=2,
        schedule="linear",
        learning_rate=0.1,
        gradient_accumulation=2,
    )
    fit(Recorder(), Numbers(16), chosen, collate=collate_numbers, callbacks=[Watch()])
    # Gradients are clipped to norm 1, so that each is the same and Adam moves by the rate.
    rates = [0.0, 0.05, 0.1, 0.05]
    assert weights == pytest.approx([1 - sum(rates[: i + 1]) for i in range(4)], abs=1e-4)


def test_a_non_finite_loss_stops_the_run_and_names_the_batch(tmp_path):
    module = Recorder(fail_at=3)
    expected = (
        r"loss: expected a finite number, got nan in step 2 \(items 2..3 of the data set; on its "
        r"own not finite: item 3\)"
    )
    with pytest.raises(FloatingPointError, match=expected):
        fit(module, Numbers(6), settings(tmp_path), collate=collate_numbers)
    assert torch.isfinite(module.weight)


class Person(NamedTuple):
    user: str
    number: int


class People(Numbers):
    def __getitem__(self, index):
        return Person(f"u{index}", index)


def test_the_users_of_an_offending_batch_are_named(tmp_path):
    with pytest.raises(FloatingPointError, match=r"items 4..7 .* item 5 \(user 'u5'\)\)"):
        fit(
            Recorder(fail_at=5),
            People(8),
            settings(tmp_path, gradient_accumulation=2, steps=2),
            collate=lambda items: collate_numbers([person.number for person in items]),
        )


class SteepRoot(nn.Module):
    """A finite loss whose gradient is infinite where the number is 2: the root of 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, numbers):
        return {"loss": ((numbers - 2).float() * self.weight).abs().sqrt().sum()}


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    module, before = SteepRoot(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            before.append(model.weight.item())

    with pytest.raises(FloatingPointError, match=r"gradient: .* in step 2 \(items 2..3"):
        fit(module, Numbers(6), settings(tmp_path), collate=collate_numbers, callbacks=[Watch()])
    assert module.weight.item() == before[0]


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_a_gradient_that_overflows_by_its_scale_is_passed_over(tmp_path, monkeypatch, scale):
    """As in fp16, whose scaler a CPU has as well."""
    made = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    module, numbers = SteepRoot(), Numbers(6)
    if scale == 1:  # there is no less
        with pytest.raises(FloatingPointError, match=r"gradient: .* in step 2"):
            fit(module, numbers, settings(tmp_path), collate=collate_numbers)
    else:
        assert fit(module, numbers, settings(tmp_path), collate=collate_numbers).steps == 3
        assert torch.isfinite(module.weight)


def test_too_few_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected at least 6 tasks for 3 steps, got 5"):
        fit(Recorder(), Numbers(5), settings(tmp_path), collate=collate_numbers)


def test_tensorboard_has_every_logged_scalar(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wanted = settings(tmp_path, tensorboard=True, log_every=1)
    result = fit(Recorder(), Numbers(6), wanted, collate=collate_numbers)
    (events,) = tmp_path.glob("runs/*/events.out.tfevents.*")
    logged = accumulator.EventAccumulator(str(events))
    logged.Reload()
    for name in ("loss", "largest"):
        values = [event.value for event in logged.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in result.history])


def test_tensorboard_that_is_wanted_and_absent_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("fssa_runtime.training.trainer._has_tensorboard", lambda: False)
    with pytest.raises(ValueError, match="tensorboard: expected it to be installed"):
        fit(Recorder(), Numbers(6), settings(tmp_path, tensorboard=True), collate=collate_numbers)
    fit(Recorder(), Numbers(6), settings(tmp_path, tensorboard=None), collate=collate_numbers)
    assert not (tmp_path / "runs").exists()
