"""Find the fastest configuration of the modulated linear on this GPU, and write it down.

    python -m benchmarks.gpu_tune [--minutes 20] [--models llama-8b,llama-1b] [--out FILE]

For every problem the search starts from the heuristic's configuration and changes one thing at a
time, keeping what is faster, until nothing is. A configuration counts only if its result passed the
gate; its time is the median over rounds in which it took turns with the unmodulated product of the
vendor's library. What decides the order of a row's sums is looked for with 16 rows and kept for all
other numbers below 257, so that a row's bits do not depend on its batch. The table goes where
`fssa_kernels.gpu.tuned` reads it, each entry with its time and that product's; entries of earlier
runs that were not measured again stay.

--dry-run goes through the motions on a CPU at a tiny size, in Triton's interpreter, and writes to
--out only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.gate import judge, outputs, poisoned, widened
from benchmarks.gpu_suite.problems import LinearProblem, few_rows
from benchmarks.gpu_suite.shapes import MODELS
from benchmarks.gpu_suite.timing import Clock, Deadline, GpuClock, HostClock, calls_for, interleaved
from fssa_kernels.dispatch import lookup
from fssa_kernels.gpu.backend import is_interpreting
from fssa_kernels.gpu.device import Device
from fssa_kernels.gpu.tuned import FOLDER

TOKENS = (16, 1, 32, 64, 128, 8, 256, 512, 2048, 4, 2)
RANKS = (16, 64, 32, 8)
FAMILIES = ("gated", "none")
CHOICES: dict[str, tuple[Any, ...]] = {
    "way": ("fused", "vendor"),
    "swap": (False, True),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (32, 64, 128, 256),
    "split_k": (1, 2, 4, 8),
    "block_t": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5, 6),
}
# Less than this is noise.
GAIN = 0.01
COLD_BYTES = 200 << 20


class Search:
    """The search for one problem's configuration."""

    def __init__(self, problem: LinearProblem, clock: Clock, device: str, rounds: int) -> None:
        from fssa_kernels.ops.modulated_linear.triton_impl import run_config

        self.problem, self.clock, self.rounds = problem, clock, rounds
        self._run = run_config
        dtype = torch.bfloat16
        count = 2 if device == "cpu" else max(2, min(64, COLD_BYTES // problem.weight_bytes + 1))
        self.copies = [problem.inputs(device, dtype, seed) for seed in range(count)]
        index, few = few_rows(self.copies[0])
        self._index = index
        self._plain = outputs("modulated_linear", few, "reference")
        self._exact = outputs("modulated_linear", widened("modulated_linear", few), "reference")

    def call(self, config: Any, copy: int) -> Tensor:
        *inputs, _ = lookup("modulated_linear").prepare(**self.copies[copy])
        return self._run(config, *inputs)

    def base(self, copy: int) -> Tensor:
        """The vendor's unmodulated product."""
        inputs = self.copies[copy]
        return F.linear(inputs["x"], inputs["weight"], inputs["bias"])

    def time(self, config: Any) -> tuple[float, float] | None:
        """(its median, the base's), seconds; None where it is wrong or does not run."""
        try:
            with poisoned():
                got = (self.call(config, 0)[self._index],)
            if not judge(got, self._plain, self._exact).good:
                return None
            sides = {"ours": lambda copy: self.call(config, copy), "base": self.base}
            return self._medians(sides)
        except Exception:  # too much shared memory, too few registers: Triton has its own errors
            if self.copies[0]["x"].is_cuda:
                torch.cuda.synchronize()  # raises where nothing else would run either
            return None

    def _medians(self, sides: dict[str, Callable[[int], Tensor]]) -> tuple[float, float]:
        copies = len(self.copies)
        ready = {}
        for name, call in sides.items():
            once = self.clock.prepare(call, copies=copies, calls=copies, graph=True).sample()
            calls = calls_for(once, copies)
            ready[name] = self.clock.prepare(call, copies=copies, calls=calls, graph=True)
        samples = interleaved(ready, self.rounds, twice="")
        return statistics.median(samples["ours"]), statistics.median(samples["base"])


def neighbours(config: Any, capability: int, fixed: Collection[str]) -> Iterator[Any]:
    """Configurations that differ in one thing, none of those that are fixed."""
    for field, values in CHOICES.items():
        if field in fixed or (field == "swap" and capability < 90):
            continue
        for value in values:
            if value != getattr(config, field):
                yield dataclasses.replace(config, **{field: value})


def search(
    start: Any,
    time: Callable[[Any], tuple[float, float] | None],
    capability: int,
    deadline: Deadline,
    fixed: Collection[str] = (),
) -> dict[str, Any] | None:
    """The best configuration found from `start`, but for fields that are fixed, with its times in
    us; None if `start` fails."""
    timed = time(start)
    if timed is None:
        return None
    best, times, tried = start, timed, {start}
    first = timed
    improved = True
    while improved and not deadline.passed:
        improved = False
        for candidate in neighbours(best, capability, fixed):
            if candidate in tried or deadline.passed:
                continue
            tried.add(candidate)
            timed = time(candidate)
            # Each beside the base of its own rounds: what else the GPU does falls on both.
            if timed is not None and timed[0] / timed[1] < (1 - GAIN) * times[0] / times[1]:
                best, times, improved = candidate, timed, True
                break
    return {
        "config": dataclasses.asdict(best),
        "us": round(1e6 * times[0], 2),
        "base_us": round(1e6 * times[1], 2),
        "heuristic_us": round(1e6 * first[0], 2),
        "tried": len(tried),
    }


def problems(models: tuple[str, ...], tokens: tuple[int, ...]) -> Iterator[LinearProblem]:
    """The most telling first, and 16 rows before all others."""
    from fssa_kernels.ops.modulated_linear.triton_config import ALIKE_ROWS

    tokens = tuple(dict.fromkeys((ALIKE_ROWS, *tokens)))
    for rank in RANKS:
        for num_tokens in tokens:
            for model in models:
                for shape in MODELS[model].linears.values():
                    for family in FAMILIES:
                        if family == "none" and rank != RANKS[0]:
                            continue
                        low = rank if family != "none" else 0
                        yield LinearProblem(shape, num_tokens, family, low, num_tokens)


def tune(
    device: Device,
    clock: Clock,
    where: str,
    wanted: Iterator[LinearProblem],
    deadline: Deadline,
    write: Callable[[dict[str, Any]], None],
    rounds: int,
) -> dict[str, Any]:
    """Entries by problem, written after each so that a run cut short keeps them."""
    from fssa_kernels.ops.modulated_linear.triton_config import (
        ALIKE,
        ALIKE_ROWS,
        VENDOR_FROM_ROWS,
        Config,
        alike,
        fit,
        heuristic,
        problem_key,
    )

    console = Console()
    entries: dict[str, Any] = {}
    for problem in wanted:
        if deadline.passed:
            console.print("out of time; problems not reached keep what they had")
            break
        trial = Search(problem, clock, where, rounds)
        inputs = trial.copies[0]
        splits, rank, lora_a = list(problem.shape.splits), problem.rank, inputs.get("lora_a")
        named = (inputs["x"], problem.family, splits, inputs["epilogue"], rank)
        key = problem_key(*named, problem.num_tokens)
        start = heuristic(
            device,
            inputs["x"],
            inputs["weight"],
            lora_a,
            problem.family,
            splits,
            inputs["epilogue"],
            rank,
        )
        fixed: Collection[str] = ()
        if problem.num_tokens < VENDOR_FROM_ROWS and problem.num_tokens != ALIKE_ROWS:
            model = entries.get(problem_key(*named, ALIKE_ROWS))
            if model is None:
                continue  # what did not run with those rows is the heuristic's with these
            start, fixed = alike(start, Config(**model["config"])), ALIKE
            paired = inputs["epilogue"] != "none"
            start = fit(start, device, inputs["x"], lora_a, paired, rank)
        found = search(start, trial.time, device.capability, deadline.share(0.2), fixed)
        clock.release()
        if found is None:
            console.print(f"{key}: the heuristic's configuration does not run")
            continue
        entries[key] = found
        write(entries)
        console.print(
            f"{key}: {found['us']} us, base {found['base_us']} us, "
            f"heuristic {found['heuristic_us']} us, {found['tried']} tried"
        )
    return entries


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status."""
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_tune: no CUDA device (--dry-run goes through the motions)", file=sys.stderr)
        return 2
    if options.dry_run and not is_interpreting():
        command = [sys.executable, "-m", "benchmarks.gpu_tune", *(arguments or sys.argv[1:])]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.run(command, env=environment, check=False).returncode
    from fssa_kernels.gpu.device import NOMINAL, device_facts

    if options.dry_run:
        from fssa_kernels.gpu.interpreter import repair

        repair()
        if options.out is None:
            print("gpu_tune: --dry-run needs --out: it measures nothing", file=sys.stderr)
            return 2
        device, clock, where, rounds = NOMINAL[90], HostClock(), "cpu", 1
        wanted = iter(list(problems(("tiny",), (3,)))[:2])
    else:
        device, clock, where, rounds = device_facts(0), GpuClock(), "cuda", 7
        wanted = problems(options.models, options.tokens)
    path = options.out or FOLDER / f"{device.name}.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    table["measured on"] = _about(options.dry_run)
    kept = dict(table.get("modulated_linear", {}))

    def write(entries: dict[str, Any]) -> None:
        table["modulated_linear"] = {**kept, **entries}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")

    with torch.no_grad():
        entries = tune(device, clock, where, wanted, Deadline(60 * options.minutes), write, rounds)
    print(f"{len(entries)} problems measured, table in {path}")
    return 0 if entries else 1


def _about(dry: bool) -> dict[str, Any]:
    import triton

    name = "nothing: a dry run" if dry else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="time for all problems")
    parser.add_argument("--models", type=_models, default=("llama-8b", "llama-1b"))
    parser.add_argument("--tokens", type=_numbers, default=TOKENS, help="rows of x")
    parser.add_argument("--out", type=Path, default=None, help="the table, if not the package's")
    parser.add_argument("--dry-run", action="store_true", help="a tiny size on the CPU")
    return parser.parse_args(arguments)


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {list(MODELS)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers like 1,16,32") from error


if __name__ == "__main__":
    sys.exit(main())
