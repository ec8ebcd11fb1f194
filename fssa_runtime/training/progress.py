"""What a training shows while it runs: a line every few steps, and a bar where somebody watches."""

from __future__ import annotations

import sys
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

Progress = Literal["bar", "log", "off"]

# What the trainer logs that says nothing of how the training goes: its epoch is the whole run.
_NOT_SHOWN = {"epoch", "total_flos"}


def shown_by(progress: Progress) -> TrainerCallback | None:
    """What shows a training: "bar" is a bar over lines in a terminal and lines elsewhere, since a
    bar in a file or pipe is a thousand fragments of one; "log" lines; "off" nothing."""
    if progress == "off":
        return None
    return StepBar() if progress == "bar" and sys.stderr.isatty() else StepLines()


def step_line(step: int, num_steps: int, logs: dict[str, Any]) -> str:
    """``step 50/300  loss 0.4849  accuracy 0.7858  …``"""
    values = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in logs.items()
        if name not in _NOT_SHOWN and isinstance(value, int | float)
    ]
    return "  ".join([f"step {step}/{num_steps}", *values])


class StepLines(TrainerCallback):
    """A line on standard output for everything that is logged, at once even into a pipe, where
    Python would keep lines back until it has thousands of characters."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_others: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(step_line(state.global_step, state.max_steps, logs), flush=True)


class StepBar(ProgressCallback):
    """The same lines above the library's bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_others: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.write(step_line(state.global_step, state.max_steps, logs))
