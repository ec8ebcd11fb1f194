"""Everything worth measuring on a GPU, in a few minutes, from a bare checkout.

    python -m benchmarks.gpu_suite --out DIR [--minutes 8] [--only PART,...] [--dry-run]

Correctness first: what fails there is not timed. Then what the project's targets ask for, whole
models, the other ops, and a full sweep for as long as there is time. A row that was not reached,
did not fit or failed says so. DIR gets results.json (every sample), summary.md and figures.

--dry-run runs the same code at tiny sizes on a CPU, in Triton's interpreter; its figures are
marked, for they measure nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite.suite import OUT_OF_TIME, Suite, reason
from benchmarks.gpu_suite.timing import Clock, Deadline, GpuClock, HostClock

ROOT = Path(__file__).resolve().parent.parent.parent
# Part, and its share of the time left when it begins; what it leaves goes to those after it.
SHARES = {
    "limits": 0.1,
    "correctness": 0.2,
    "warm-up": 0.2,
    "linears": 0.45,
    "decode": 0.5,
    "flatness": 0.35,
    "other ops": 0.4,
    "sweep": 1.0,
}


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status."""
    options = _parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_suite: no CUDA device (--dry-run runs the code without one)", file=sys.stderr)
        return 2
    if options.dry_run:
        from fssa_kernels.gpu.backend import is_interpreting

        if not is_interpreting():
            # Triton reads the variable when a kernel is decorated: too late in this process.
            command = [sys.executable, "-m", "benchmarks.gpu_suite", *(arguments or sys.argv[1:])]
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            return subprocess.run(command, env=environment, check=False).returncode
        from fssa_kernels.gpu.interpreter import repair

        repair()
    results = run(options)
    from benchmarks.gpu_suite.report import headline

    print(headline(results))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All parts in order; files are written after each, so that a run cut short leaves some."""
    from benchmarks.gpu_suite import figures, report
    from benchmarks.gpu_suite.scale import FULL, TINY

    scale = TINY if options.dry_run else FULL
    clock: Clock = HostClock() if scale.dry else GpuClock()
    deadline = Deadline(60 * options.minutes)
    suite = Suite(scale, clock, deadline)
    results = {**about(scale.dry), "limits": suite.limits, "records": suite.records}
    for name, part in parts().items():
        if options.only and name not in options.only:
            continue
        suite.deadline = deadline.share(SHARES[name])
        before = deadline.left
        try:
            with torch.no_grad():
                if suite.deadline.passed and name in ("limits", "warm-up"):
                    suite.skip(name, {}, OUT_OF_TIME)
                else:
                    part(suite)
        except Exception as error:
            suite.skip(name, {}, reason(error))
        results["seconds"][name] = round(before - deadline.left, 1)
        print(f"{name}: {results['seconds'][name]} s", flush=True)
        report.write(options.out, results)
    results["figures"] = figures.draw(options.out, results)
    report.write(options.out, results)
    return results


def parts() -> dict[str, Callable[[Suite], None]]:
    """Every part by name, in order."""
    from benchmarks.gpu_suite import correctness, decode, limits, linears, other_ops

    return {
        "limits": limits.measure,
        "correctness": correctness.measure,
        "warm-up": linears.warm_up,
        "linears": lambda s: linears.measure(s, "linears", linears.telling(s.scale)),
        "decode": decode.measure,
        "flatness": decode.flatness,
        "other ops": other_ops.measure,
        "sweep": lambda s: linears.measure(s, "sweep", linears.sweep(s.scale)),
    }


def about(dry: bool) -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    facts: dict[str, Any] = {
        "dry_run": dry,
        "device": platform.processor() or platform.machine(),
        "capability": None,
        "driver": None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "seconds": {},
    }
    if not dry:
        query = "--query-gpu=driver_version"
        facts["device"] = torch.cuda.get_device_name()
        facts["capability"] = "sm_{}{}".format(*torch.cuda.get_device_capability())
        facts["driver"] = _said("nvidia-smi", query, "--format=csv,noheader")
        facts["cuda"] = torch.version.cuda
    return facts


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--only", type=_part_names, default=(), help=", ".join(SHARES))
    return parser.parse_args(arguments)


def _part_names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in SHARES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: expected some of {', '.join(SHARES)}"
        )
    return names


if __name__ == "__main__":
    sys.exit(main())
