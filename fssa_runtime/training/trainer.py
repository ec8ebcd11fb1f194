"""Training on `transformers.Trainer`: our settings, checked, in; a trained module out.

The loop, checkpoints, schedules and progress display are the library's. This file adds what a
run here must also hold: tasks in order (so that a resumed run equals an uninterrupted one), a
stop at the first non-finite loss, and clear errors before anything is overwritten.

A checkpoint holds every parameter and buffer registered in the module. A frozen base model that
should not be saved with it must be kept out of the module's registry by the caller.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from accelerate.utils import set_seed
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fssa_runtime.env import process
from fssa_runtime.files import write_atomically
from fssa_runtime.training.progress import Progress, shown_by
from fssa_runtime.training.tasks import MAX_NAMED

METRICS_FILE = "metrics.json"  # of a run that came to its end
_SETTINGS_FILE = "train_settings.json"
# These may differ between a run and its continuation without changing the result.
NOT_DECISIVE = {
    "log_every",
    "save_every",
    "keep_checkpoints",
    "output_dir",
    "device",
    "cpu_threads",
    "progress",
    "tensorboard",
    "num_workers",
    "resume",
    "overwrite",
}
_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class TrainSettings(BaseModel):
    """How to train, whatever is trained. Relative paths are relative to the working directory.

    tasks_per_batch is per forward pass; a step sees tasks_per_batch · gradient_accumulation
    tasks. The schedule warms up linearly for `warmup_steps`, then stays constant or falls to 0.
    max_grad_norm = 0 does not clip; save_every = 0 keeps no checkpoints. AdamW with weight decay
    on all but biases and the weights of norms. cpu_threads = 0 leaves torch's number of threads as
    it is; networks of a few hundred units train fastest on one, above all on a busy machine.
    progress: "bar" (lines instead where standard error is no terminal), "log" lines, "off".
    mixed_precision: products of what is trained in that format, weights and loss in float32
    (accelerate's autocast; a base model has the dtype it was loaded in). tensorboard: logs beside
    the run; None: if it is installed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_dir: Path
    steps: int = Field(ge=1)
    tasks_per_batch: int = Field(default=64, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every: int = Field(default=50, ge=1)
    save_every: int = Field(default=500, ge=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    num_workers: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: int = Field(default=0, ge=0)
    progress: Progress = "bar"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    tensorboard: bool | None = None
    resume: bool = False
    overwrite: bool = False

    @property
    def num_tasks(self) -> int:
        """Tasks the whole run draws."""
        return self.steps * self.tasks_per_batch * self.gradient_accumulation


@dataclass(frozen=True)
class FitResult:
    """What a run did: steps at the end, where it resumed (0: fresh), seconds, logged values."""

    steps: int
    resumed_at: int
    seconds: float
    history: tuple[dict[str, float], ...]


def load_config(path: str | Path, config_type: type[ConfigT]) -> ConfigT:
    """Read a YAML file into a pydantic model.

    ValueError naming the file and, for each fault, the field, what was expected and what came;
    FileNotFoundError for a missing file.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a YAML file, got {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected fields and values, got {type(raw).__name__}")
    try:
        return config_type.model_validate(raw)
    except ValidationError as error:
        faults = "\n".join(
            f"  {'.'.join(map(str, fault['loc'])) or '(whole file)'}: {fault['msg']}"
            # Of what is missing the "input" is all that surrounds it.
            + ("" if fault["type"] == "missing" else f", got {fault['input']!r}")
            for fault in error.errors()
        )
        raise ValueError(f"{path}: not a valid {config_type.__name__}\n{faults}") from error


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """The metrics of a run that came to its end, in its folder."""
    write_atomically(folder / METRICS_FILE, (json.dumps(metrics, indent=2) + "\n").encode())


def forget_metrics(folder: Path) -> None:
    """Before a run's weights replace those that the folder's metrics, if there are any, are of."""
    (folder / METRICS_FILE).unlink(missing_ok=True)


def training_device(settings: TrainSettings) -> torch.device:
    """Where this process computes: a frozen base model has to lie there before `fit`."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", process().local_rank)


def fit(
    module: nn.Module,
    dataset: Dataset[Any],
    settings: TrainSettings,
    *,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    recipe: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FitResult:
    """Train `module` in place.

    module: forward takes the batch's entries by name and returns a dict with a scalar "loss" and
        optionally other scalars, whose means are logged. The caller seeds its initialisation.
    dataset: map-style with a length of at least settings.num_tasks; read in order, once.
    collate: list of items → dict of tensors.
    recipe: what else decides the result, as JSON has it; a run is resumed by the same one only.

    Sets torch's, numpy's and Python's global seeds. On the CPU with a fixed number of threads
    the result is reproducible bit for bit, resumed or not. The module ends on the device used.
    Checkpoints go to settings.output_dir/checkpoint-<step>; `resume` continues from the newest
    complete one (from the start if there is none).

    Under ``torchrun`` or ``accelerate launch`` the processes share every step's tasks, each on its
    own device, and average their gradients: the same step as of one process, up to rounding, where
    a loss is a mean over tasks that weigh alike, and but for random numbers drawn in forward, which
    are each process's own. The same goes for the parts of a step with gradient_accumulation. All
    of them call this and end with the same weights; logs and checkpoints are the main one's.

    Raises ValueError: data set too short, tasks_per_batch that the processes cannot share evenly,
    checkpoints present with neither `resume` nor `overwrite`, a checkpoint from other settings,
    another recipe or of another module, CUDA, its fp16 or TensorBoard wanted but absent;
    FloatingPointError: the loss or a gradient is NaN or infinite. The weights are not touched by
    that step; the error names the step, its items of the data set, their users where items have
    one, and which of them give such a loss on their own.
    """
    length = len(dataset)  # type: ignore[arg-type]
    if length < settings.num_tasks:
        raise ValueError(
            f"dataset: expected at least {settings.num_tasks} tasks for {settings.steps} steps, "
            f"got {length}"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device for 'cuda', got none")
    if settings.mixed_precision == "fp16" and training_device(settings).type == "cpu":
        raise ValueError("mixed_precision: expected 'bf16' or 'no' on a CPU, got 'fp16'")
    if settings.tensorboard and not _has_tensorboard():
        raise ValueError("tensorboard: expected it to be installed: pip install 'fssa[train]'")
    num_processes = process().world_size
    if settings.tasks_per_batch % num_processes:
        raise ValueError(
            f"tasks_per_batch: expected a multiple of {num_processes}, the number of processes, "
            f"got {settings.tasks_per_batch}"
        )
    arguments = _training_arguments(settings)
    with arguments.main_process_first(local=False, desc="making the folder ready"):
        checkpoint = _prepare_output_dir(module, settings, recipe or {})
    trainer = _TaskTrainer(
        model=module,
        args=arguments,
        data_collator=collate,
        train_dataset=dataset,
        callbacks=list(callbacks),
    )
    if num_processes > 1:  # the trainer has seeded all of them alike
        set_seed(settings.seed, device_specific=True)
    trainer.remove_callback(PrinterCallback)  # prints dicts, without the step
    shown = shown_by(settings.progress)
    if shown is not None:
        trainer.add_callback(shown)
    with cpu_threads(settings.cpu_threads):
        output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return FitResult(
        steps=output.global_step,
        resumed_at=0 if checkpoint is None else _step_of(checkpoint),
        seconds=output.metrics["train_runtime"],
        history=tuple(entry for entry in trainer.state.log_history if "loss" in entry),
    )


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run torch's CPU operations on `count` threads inside the block (0: as outside)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint folder, None if there is none.

    The trainer writes trainer_state.json last: where it is missing or ends early, the checkpoint
    was cut off.
    """
    complete = [folder for folder in _checkpoints(output_dir) if _is_complete(folder)]
    return max(complete, key=_step_of, default=None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


class _TaskTrainer(Trainer):
    """Trainer that reads tasks in order, logs every scalar and stops on a non-finite loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scalars: dict[str, list[Tensor]] = {}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        # Tasks are random already; in order, a run's stream does not depend on its length.
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss: expected a finite number, got {loss.item()} in step "
                f"{self.state.global_step + 1}{self._offending(model)}"
            )
        for name, value in outputs.items():
            if name != "loss":
                self._scalars.setdefault(name, []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        # A finite loss can have a gradient that is not: the next step would then be the one that
        # fails, with a batch that is none of the cause.
        norms = [p.grad.detach().norm() for p in model.parameters() if p.grad is not None]
        finite = not norms or bool(torch.isfinite(torch.stack(norms)).all())
        if not finite and not self._is_to_be_scaled_less():
            raise FloatingPointError(
                f"gradient: expected finite numbers, got NaN or infinity in step "
                f"{self.state.global_step + 1}{self._offending(model)}"
            )
        return loss

    def _is_to_be_scaled_less(self) -> bool:
        """In fp16 losses are multiplied by a scale that grows until gradients overflow; the step is
        then passed over and the scale halved, which is no fault unless halving has not helped."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _offending(self, model: nn.Module) -> str:
        """Which items of the data set the step read, and which of them fail on their own."""
        model = self.accelerator.unwrap_model(model)
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        per_step *= self.args.world_size
        first = self.state.global_step * per_step
        items = {i: self.train_dataset[i] for i in range(first, first + per_step)}
        alone = []
        with torch.no_grad():
            for index, item in items.items():
                batch = self._prepare_inputs(self.data_collator([item]))
                if not torch.isfinite(model(**batch)["loss"]):
                    alone.append(_name(index, item))
        named = ", ".join(alone[:MAX_NAMED]) or "none"
        more = f" and {len(alone) - MAX_NAMED} more" if len(alone) > MAX_NAMED else ""
        return (
            f" (items {first}..{first + per_step - 1} of the data set; on its own not finite: "
            f"{named}{more})"
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Every process writes its own; what says that a checkpoint is complete comes after all.
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for name, values in self._scalars.items():
                mean = torch.stack(values).float().mean()
                logs[name] = self.accelerator.reduce(mean, "mean").item()
            self._scalars = {}
        super().log(logs, *args, **kwargs)


def _name(index: int, item: Any) -> str:
    user = getattr(item, "user", None)
    return f"item {index}" if user is None else f"item {index} (user {user!r})"


def _has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def _training_arguments(settings: TrainSettings) -> TrainingArguments:
    use_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    tensorboard = _has_tensorboard() if settings.tensorboard is None else settings.tensorboard
    arguments = TrainingArguments(
        output_dir=str(settings.output_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.tasks_per_batch // process().world_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=settings.seed,
        logging_steps=settings.log_every,
        # The filter would hide the NaN that compute_loss stops at.
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        save_total_limit=settings.keep_checkpoints,
        remove_unused_columns=False,
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=not use_cpu,
        disable_tqdm=True,  # the bar, where there is one, is `progress.StepBar`
        report_to=["tensorboard"] if tensorboard else [],
        bf16=settings.mixed_precision == "bf16",
        fp16=settings.mixed_precision == "fp16",
        use_cpu=use_cpu,
    )
    if arguments.n_gpu > 1:
        # Several visible GPUs would mean nn.DataParallel, which splits a batch of tasks by its
        # first dimension and gathers scalars wrongly; one process here means one GPU.
        arguments._n_gpu = 1
    return arguments


def _prepare_output_dir(
    module: nn.Module, settings: TrainSettings, recipe: Mapping[str, Any]
) -> Path | None:
    """Make the folder ready and return the checkpoint to resume from, if any."""
    folder = settings.output_dir
    existing = _checkpoints(folder)
    decisive = settings.model_dump(mode="json", exclude=NOT_DECISIVE) | _flat(recipe)
    record = folder / _SETTINGS_FILE
    checkpoint = None
    if settings.resume:
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            if record.is_file():
                _check_same_settings(decisive, json.loads(record.read_text()), record)
            _check_same_tensors(module, checkpoint)
    elif settings.overwrite:
        for old in existing:
            shutil.rmtree(old)
    elif existing:
        raise ValueError(
            f"output_dir: expected a folder without checkpoints, got {folder} with "
            f"{existing[-1].name}; set resume: true (--resume) to continue that run, overwrite: "
            "true (--overwrite) to delete its checkpoints, or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(decisive, indent=2) + "\n")
    return checkpoint


def _flat(recipe: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """{"data": {"kind": "x"}} → {"data": "...", "data.kind": "x"}: a part that was left out, and so
    is None, differs from one that was not."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            flat[within + name] = "..."
            flat |= _flat(value, f"{within}{name}.")
        else:
            flat[within + name] = value
    return flat


def _check_same_settings(now: dict[str, Any], before: dict[str, Any], record: Path) -> None:
    # What the record does not know yet is from a version that had no such setting.
    changed = [
        f"{name} (expected {before[name]}, got {now.get(name)})"
        for name in before
        if now.get(name) != before[name]
    ]
    if changed:
        raise ValueError(
            f"resume: expected the settings recorded in {record}, but these differ: "
            + ", ".join(changed)
        )


def _check_same_tensors(module: nn.Module, checkpoint: Path) -> None:
    """The trainer itself loads whatever matches and leaves the rest as initialised."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    with safe_open(str(checkpoint / "model.safetensors"), framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    different = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if different:
        name = different[0]
        raise ValueError(
            f"resume: {checkpoint} is of another module: {len(different)} tensors differ, first "
            f"{name}: expected shape {wanted.get(name)}, got {found.get(name)}"
        )


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-", 1)[1].isdigit()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-", 1)[1])
