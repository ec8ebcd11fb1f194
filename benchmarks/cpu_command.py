"""What the commands that measure a CPU share: their options, and what a result was measured on."""

from __future__ import annotations

import argparse
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fssa_kernels.native import MISSING, NATIVE
from fssa_runtime.models.pull import DEFAULT_MODEL


def parser(name: str, documentation: str | None, *, written: str) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks.<name>``, which is for what its documentation's first
    line says: ``--batch``, ``--threads``, ``--model`` and ``--json``, which is written ``written``.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(documentation or "").splitlines()[0]
    )
    made.add_argument(
        "--batch", type=numbers(1), default="1,8,32", help="comma-separated batch sizes (1,8,32)"
    )
    made.add_argument("--threads", type=int, default=None, help="default: physical cores")
    made.add_argument("--model", default=DEFAULT_MODEL)
    made.add_argument("--json", type=Path, help=f"where the result goes, {written}")
    return made


def numbers(least: int) -> Callable[[str], list[int]]:
    """The type of an option with numbers, separated by commas, none below ``least``."""

    def read(text: str) -> list[int]:
        try:
            found = [int(number) for number in text.split(",")]
        except ValueError:
            found = []
        if not found or min(found) < least:
            raise argparse.ArgumentTypeError(f"expected numbers from {least} on, got {text!r}")
        return found

    return read


def kernels_are_built(console: Console) -> bool:
    """Whether there are native kernels to measure; says why not."""
    if NATIVE is None:
        console.print(f"nothing to measure, the native kernels are not built: {MISSING}")
    return NATIVE is not None


def machine() -> dict[str, Any]:
    """What a result was measured on, and from which commit."""
    assert NATIVE is not None
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": NATIVE.instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
    }
