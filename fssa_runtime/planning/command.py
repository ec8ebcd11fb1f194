"""What ``fssa plan`` does once its arguments are parsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..errors import InputError
from ..files import check_writable, write_atomically
from .capacity import Service, find_rate
from .machine import MACHINES, Machine, Roofline, StepTime, this_cpu
from .measured import read_measured
from .memory import plan_memory
from .report import describe, show
from .result import Objectives
from .shapes import ModelSize, model_size
from .trace import Lengths, Trace

_LONGEST = 8192  # tokens of a request, unless it is said
# A length beyond this many means is cut: the tail of the distribution is endless.
_CAP = 8


@dataclass(frozen=True)
class PlanOptions:
    """What is asked; None leaves it to the model, the machine, or the search for a rate."""

    model: str
    machine: str
    users: int = 1_000_000
    rate: float | None = None
    requests: int = 10_000
    prompt_tokens: float = 256
    output_tokens: float = 128
    zipf: float = 1.0
    continued: float = 0.5
    on_s: float = 1.0
    off_s: float = 0.0
    rank: int = 16
    ttft_ms: float = 1000
    itl_ms: float = 100
    max_streams: int = 256
    step_tokens: int = 1024
    max_length: int | None = None
    slots: int | None = None
    page_size: int = 16
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    tflops: float | None = None
    overhead_ms: float | None = None
    measured: Path | None = None
    seed: int = 0
    json_file: Path | None = None


def run_plan(options: PlanOptions, console: Console) -> dict[str, Any]:
    """Simulate, write and print what was found; returns it too.

    Raises:
        InputError: what is asked cannot be, with the reason.
    """
    if options.rate is not None and not options.rate > 0:
        raise InputError(f"--rate: expected more than 0 requests a second, got {options.rate:g}")
    if options.json_file is not None:
        options.json_file.parent.mkdir(parents=True, exist_ok=True)
        check_writable(options.json_file)
    model = model_size(options.model, options.rank)
    trace, max_length = _trace(options, model.max_positions)
    machine = _machine(options)
    memory = plan_memory(
        model,
        machine.memory_bytes,
        num_users=options.users,
        max_streams=options.max_streams,
        max_tokens=options.step_tokens,
        page_size=options.page_size,
        slots=options.slots,
    )
    service = Service(
        memory=memory,
        step_time=_step_time(options, model, machine),
        objectives=Objectives(options.ttft_ms / 1e3, options.itl_ms / 1e3),
        trace=trace,
        max_streams=options.max_streams,
        max_tokens=options.step_tokens,
        max_length=max_length,
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=options.requests)

        def on_run(rate: float) -> Callable[[int], None]:
            progress.reset(task, description=f"{rate:.3g} requests/s", total=options.requests)
            return lambda done: progress.update(task, completed=done)

        rate = options.rate
        if rate is None:
            rate, result = find_rate(service, on_run)
        else:
            result = service.run(rate, on_done=on_run(rate))
    searched = options.rate is None
    found = describe(model, machine, service, rate, result, searched=searched)
    if options.json_file is not None:
        write_atomically(options.json_file, (json.dumps(found, indent=2) + "\n").encode())
    show(found, console)
    return found


def _trace(options: PlanOptions, max_positions: int) -> tuple[Trace, int]:
    """The load, and tokens of its longest request."""
    longest = min(max_positions, _LONGEST) if options.max_length is None else options.max_length
    if not 2 <= longest <= max_positions:
        raise InputError(
            f"--max-length: expected 2 to {max_positions} (the model's positions), got {longest}"
        )
    for name in ("prompt_tokens", "output_tokens"):
        mean = getattr(options, name)
        if not 1 <= mean <= longest / 2:
            raise InputError(
                f"--{name.replace('_', '-')}: expected 1 to {longest // 2}, half of the longest "
                f"request, got {mean:g}"
            )
    output_cap = min(int(_CAP * options.output_tokens), longest // 2)
    prompt_cap = min(int(_CAP * options.prompt_tokens), longest - output_cap)
    trace = Trace(
        rate=options.rate or 1.0,
        num_requests=options.requests,
        num_users=options.users,
        prompt=Lengths(options.prompt_tokens, prompt_cap),
        output=Lengths(options.output_tokens, output_cap),
        max_prompt=longest - output_cap,
        zipf=options.zipf,
        continued=options.continued,
        on_seconds=options.on_s,
        off_seconds=options.off_s,
        seed=options.seed,
    )
    return trace, longest


def _step_time(options: PlanOptions, model: ModelSize, machine: Machine) -> StepTime:
    if options.measured is None:
        return Roofline(model, machine, (options.overhead_ms or 0.0) / 1e3)
    given = {"overhead-ms": options.overhead_ms}
    if options.machine != "custom":  # which is described by all of its figures
        given["tflops"] = options.tflops
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"--{name}: expected none beside --measured, which says how long steps take, "
                f"got {value:g}"
            )
    return read_measured(options.measured, model, machine, options.rank)


def _machine(options: PlanOptions) -> Machine:
    """The named machine, with what was given in place of its own figures."""
    given = {
        "memory": (options.memory_gb, 1e9),
        "bandwidth": (options.bandwidth_gb_s, 1e9),
        "rate": (options.tflops, 1e12),
    }
    for name, (value, _) in given.items():
        if value is not None and not value > 0:
            raise InputError(f"{name} of the machine: expected more than 0, got {value:g}")
    memory, bandwidth, rate = (value and value * scale for value, scale in given.values())
    if options.machine == "cpu":
        machine = this_cpu()
    elif options.machine != "custom":
        machine = MACHINES[options.machine]
    elif memory and bandwidth and rate:
        return Machine("custom", bandwidth, rate, memory, "as given")
    else:
        raise InputError("--machine custom: expected --bandwidth-gb-s, --tflops and --memory-gb")
    changed = [name for name, (value, _) in given.items() if value is not None]
    if not changed:
        return machine
    return replace(
        machine,
        bytes_per_s=bandwidth or machine.bytes_per_s,
        flop_per_s=rate or machine.flop_per_s,
        memory_bytes=memory or machine.memory_bytes,
        source=f"{machine.source}; {', '.join(changed)} as given",
    )
