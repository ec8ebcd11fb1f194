"""A decode step of two builds of the kernels on a CPU, in turn: what a change brings.

    python -m benchmarks.cpu_compare REVISION --batch 1,8,32 --json FILE

REVISION, or the folder of a checkout whose kernels are built, is held against this checkout. A
machine that is shared with others changes within minutes by more than most changes bring, so each
build is a process of its own, both are loaded, and they take turns of some twenty milliseconds in
random order. Where a process's memory lies counts as well, so both are started again and again
(`--starts`), each first as often as the other; the standard error is that of the starts' means.

Whether the cores were near each other or apart, which on a guest of a larger machine changes too,
is told by a barrier before a round of about a second and after it: rounds in which it was neither
are left out. The file is written anew after every start, with the whole steps of every round.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cpu_command
from benchmarks.cpu_profile import ROWS
from benchmarks.decode_sides import Limits
from benchmarks.modulated import RANK
from benchmarks.worker_process import WorkerError, WorkerProcess
from fssa_kernels.native import NATIVE
from fssa_runtime.files import write_atomically
from fssa_runtime.threads import set_threads

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ROOT / "runs" / "builds"
SIDES = ("other", "this")
NEAR_SECONDS = 1e-7  # of a barrier, where the cores share a cache
TURN_SECONDS = 0.02
ROUND_SECONDS = 1.0

Times = dict[str, dict[str, dict[str, float]]]  # side, row, part: ms


class BuildError(RuntimeError):
    """A revision that is not there or does not compile."""


def built(
    other: str, console: Console, repository: Path = ROOT, builds: Path = BUILDS
) -> tuple[Path, str]:
    """The folder of a build and the name it goes by. A revision is taken out of the repository and
    compiled, once.

    Raises ``BuildError``.
    """
    if Path(other).is_dir():
        folder = Path(other).resolve()
        return folder, described(folder)
    found = _git(repository, "rev-parse", "--verify", "--quiet", f"{other}^{{commit}}")
    commit = found.stdout.decode().strip()
    if found.returncode != 0:
        raise BuildError(f"expected a revision or the folder of a checkout, got {other!r}")
    folder = builds / commit
    if any((folder / "fssa_kernels").glob("_native*.so")):
        return folder, commit
    console.print(f"building {commit[:12]} in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(_git(repository, "archive", commit).stdout)) as archive:
        archive.extractall(folder, filter="data")
    with (folder / "build.log").open("wb") as log:
        build = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", "build"],
            cwd=folder,
            env={**os.environ, "FSSA_BUILD": "cpu"},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if build.returncode != 0:
        raise BuildError(f"{commit[:12]} does not compile, see {folder / 'build.log'}")
    return folder, commit


def described(folder: Path) -> str:
    """The commit of a checkout, with a word where it has been changed; without one its name."""
    found = _git(folder, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    return found.stdout.decode().strip() or folder.name


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)


def start(side: str, folder: Path, options: argparse.Namespace) -> WorkerProcess:
    """A process with that build's packages."""
    log = BUILDS / f"{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "step_worker.py")]
    command += ["--folder", str(folder), "--model", options.model]
    command += ["--threads", str(torch.get_num_threads())]
    command += ["--batch", str(max(options.batch)), "--keys", str(options.keys)]
    if options.instruction_set is not None:
        command += ["--instruction-set", options.instruction_set]
    # Threads that have nothing to do must not spin beside the other build's.
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "passive"}
    return WorkerProcess(side, command, log=log, environment=environment)


def one_round(step: Callable[[str, str], dict[str, float]], turns: int) -> Times:
    """The medians of so many turns of each side and row, their order new each time. ``step`` takes
    both."""
    cases = [(side, row) for side in SIDES for row in ROWS]
    got: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(turns):
        random.shuffle(cases)
        for case in cases:
            times = step(*case)
            got[case].append({**times, "sum": sum(times.values())})
    return {
        side: {
            row: {
                part: statistics.median(times[part] for times in got[side, row])
                for part in got[side, row][0]
            }
            for row in ROWS
        }
        for side in SIDES
    }


def rounds_of(
    workers: Mapping[str, WorkerProcess],
    barrier: Callable[[], float],
    batch: int,
    keys: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Rounds for so long, at least one: the barrier before it and after it, and all times."""

    def step(side: str, row: str, repeats: int) -> dict[str, float]:
        request = {"op": "step", "row": row, "batch": batch, "keys": keys, "repeats": repeats}
        times: dict[str, float] = workers[side].ask(request)["ms"]
        return times

    first = [sum(step(side, row, 1).values()) for side in SIDES for row in ROWS]
    repeats = max(1, round(1e3 * TURN_SECONDS / max(first)))
    # A turn begins with a step that is not timed.
    turns = max(1, round(1e3 * ROUND_SECONDS / ((repeats + 1) * sum(first))))
    rounds: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    while not rounds or time.monotonic() < end:
        before = barrier()
        times = one_round(lambda side, row: step(side, row, repeats), turns)
        rounds.append({"barrier_s": [before, barrier()], "ms": times})
    return rounds


def state(barriers: Sequence[float]) -> str | None:
    """How the cores were to each other during a round, None where that is not sure."""
    if max(barriers) < NEAR_SECONDS:
        return "near"
    return "apart" if min(barriers) >= NEAR_SECONDS else None


def summarise(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By batch and state: milliseconds of each side and part, and what this takes of the other's
    time: the mean of the starts' means, with its standard error."""
    summary: dict[str, Any] = {}
    for batch in starts[0]["rounds"]:
        for which in ("near", "apart"):
            by_start = [
                [one["ms"] for one in begun["rounds"][batch] if state(one["barrier_s"]) == which]
                for begun in starts
                if batch in begun["rounds"]
            ]
            by_start = [rounds for rounds in by_start if rounds]
            if by_start:
                summary.setdefault(batch, {})[which] = _summary(by_start)
    return summary


def _summary(by_start: Sequence[Sequence[Times]]) -> dict[str, Any]:
    everything = [times for rounds in by_start for times in rounds]

    def mean(ratio: Callable[[Times], float]) -> dict[str, float | None]:
        means = [statistics.mean(map(ratio, rounds)) for rounds in by_start]
        error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
        return {"mean": statistics.mean(means), "standard_error": error}

    return {
        "starts": len(by_start),
        "rounds": len(everything),
        "ms": {
            side: {
                row: {
                    part: statistics.median(times[side][row][part] for times in everything)
                    for part in everything[0][side][row]
                }
                for row in ROWS
            }
            for side in SIDES
        },
        "this_over_other": {
            row: mean(lambda t, row=row: t["this"][row]["sum"] / t["other"][row]["sum"])
            for row in ROWS
        },
        "base_over_distinct": {
            side: mean(lambda t, side=side: t[side][ROWS[0]]["sum"] / t[side][ROWS[1]]["sum"])
            for side in SIDES
        },
    }


def written(result: Mapping[str, Any]) -> bytes:
    """The result as a file keeps it: the whole steps of every round, and of parts the medians."""
    starts = [
        {
            "first": begun["first"],
            "rounds": {
                batch: [
                    {
                        "barrier_s": one["barrier_s"],
                        "ms": {
                            side: {row: times["sum"] for row, times in rows.items()}
                            for side, rows in one["ms"].items()
                        },
                    }
                    for one in rounds
                ]
                for batch, rounds in begun["rounds"].items()
            },
        }
        for begun in result["starts"]
    ]
    return f"{json.dumps({**result, 'starts': starts}, indent=1)}\n".encode()


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The summary as tables."""
    for batch, states in summary.items():
        for which, values in states.items():
            many = f"{values['starts']} starts, {values['rounds']} rounds"
            table = Table(
                title=f"batch {batch}, cores {which}, {many}; ms a step", title_justify="left"
            )
            for column in ("", *SIDES, "this ÷ other"):
                table.add_column(column, justify="right" if column else "left")
            ms = values["ms"]
            for row in ROWS:
                table.add_row(
                    row,
                    *(f"{ms[side][row]['sum']:.3f}" for side in SIDES),
                    _with_error(values["this_over_other"][row]),
                )
            shares = [_with_error(values["base_over_distinct"][side]) for side in SIDES]
            table.add_row("base only ÷ all distinct", *shares, "", end_section=True)
            parts = ms["this"][ROWS[1]].keys() & ms["other"][ROWS[1]].keys() - {"sum"}
            for part in (name for name in ms["this"][ROWS[1]] if name in parts):
                other, this = (ms[side][ROWS[1]][part] for side in SIDES)
                table.add_row(f"  {part}", f"{other:.3f}", f"{this:.3f}", f"{this / other:.3f}")
            console.print(table)


def _with_error(value: Mapping[str, float | None]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cpu_command.parser("cpu_compare", __doc__, written="after every start")
    parser.add_argument("other", help="a revision, or the folder of a checkout that is built")
    parser.add_argument("--keys", type=int, default=80, help="keys of every row (80)")
    parser.add_argument("--starts", type=int, default=4, help="of both processes (4)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of a batch size, every start (30)"
    )
    parser.add_argument("--instruction-set", help="of the kernels (default: the best here)")
    options = parser.parse_args(arguments)
    if min(options.keys, options.starts) < 1 or not options.seconds > 0:
        parser.error("keys, starts and seconds must be positive")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison."""
    options = parse(arguments)
    console = Console()
    if not cpu_command.kernels_are_built(console):
        return 1
    assert NATIVE is not None
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    set_threads(options.threads)
    try:
        other, name = built(options.other, console)
    except BuildError as error:
        console.print(str(error))
        return 1
    folders = {"other": other, "this": ROOT}
    result: dict[str, Any] = {
        "machine": cpu_command.machine()
        | {"instruction_set": options.instruction_set or NATIVE.instruction_set()},
        "model": options.model,
        "rank": RANK,
        "keys": options.keys,
        "other": name,
        "this": described(ROOT),
        "starts": [],
    }
    status = 0
    try:
        for number in range(options.starts):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            begun: dict[str, Any] = {"first": order[0], "rounds": {}}
            with ExitStack() as stack:
                workers = {
                    side: stack.enter_context(start(side, folders[side], options)) for side in order
                }
                for batch in options.batch:
                    where = f"start {number + 1} of {options.starts}, batch {batch}"
                    console.print(f"{where}: {options.seconds:g} s")
                    begun["rounds"][str(batch)] = rounds_of(
                        workers, Limits.barrier, batch, options.keys, options.seconds
                    )
            result["starts"].append(begun)
            result["summary"] = summarise(result["starts"])
            if options.json is not None:
                write_atomically(options.json, written(result))
    except (KeyboardInterrupt, WorkerError) as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        done = f"ended after start {len(result['starts'])} of {options.starts}"
        console.print(f"{done}: {error}" if str(error) else done)
    if "summary" in result:
        show(result["summary"], console)
    return status


if __name__ == "__main__":
    sys.exit(main())
