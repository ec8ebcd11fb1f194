"""What long work shows while it runs: a bar where somebody watches, a line at times elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.progress import Progress as Bar
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

Progress = Literal["bar", "log", "off"]

# What the trainer logs that says nothing of how the training goes: its epoch is the whole run.
_NOT_SHOWN = {"epoch", "total_flos"}


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how much of ``total`` is done: call what this gives with how many more are.

    A bar in a terminal; elsewhere, where a bar would only show when it is full, a line on standard
    output for every tenth.
    """
    if sys.stdout.isatty():
        with Bar() as bar:
            task = bar.add_task(what, total=total)
            yield lambda more: bar.advance(task, more)
        return
    done = 0

    def count(more: int) -> None:
        nonlocal done
        tenth = 10 * done // max(total, 1)
        done += more
        if 10 * done // max(total, 1) > tenth:
            print(f"{what}: {done} of {total}", flush=True)

    yield count


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
