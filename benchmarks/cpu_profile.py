"""Where a decode step on a CPU spends its time, op by op, base only and modulated.

    python -m benchmarks.cpu_profile --batch 1,8,32 --json FILE

The recorded step of `benchmarks.cpu_decode`, timed inside the native call, and what passes between
two of them while the engine decodes; the two sides in turn, and after them the machine's limits:
what the cores multiply and add a second with everything in registers, which the products are held
against, what they read from memory, and how long a barrier takes.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cpu_command
from benchmarks.decode_sides import PAGE, Limits, Ours
from benchmarks.modulated import RANK
from fssa_kernels.native import NATIVE
from fssa_runtime.engine.step_inputs import Row
from fssa_runtime.models.language_model import LanguageModel
from fssa_runtime.request import SamplingParams
from fssa_runtime.threads import set_threads

ROWS = ("base only", "all distinct")
LINEARS = ("qkv", "o", "gate_up", "down")
REGISTER_STEPS = 5_000_000  # tens of milliseconds
PROMPT = [100] * PAGE
DECODED = 32  # steps that are timed for what is between them


def parts(names: Sequence[str]) -> list[str]:
    """What each call of a step is called here: linears by what they compute."""
    linears = [index for index, name in enumerate(names) if name == "modulated_linear"]
    labels = {index: LINEARS[place % 4] for place, index in enumerate(linears[:-1])}
    labels[linears[-1]] = "head"
    return [labels.get(index, name) for index, name in enumerate(names)]


def fill_caches(ours: Ours) -> None:
    """Writes to all keys and values: memory that nobody wrote to is read from one page of zeros."""
    for engine in ours.engines.values():
        for memory in (engine.cache.k, engine.cache.v):
            memory.normal_(generator=torch.Generator().manual_seed(0))


def profile(ours: Ours, row: str, batch: int, keys: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one step by part, with ``keys`` keys in every row."""
    runner, slots = ours.engines[row].runner, ours.engines["all distinct"].slots
    assert slots is not None
    graph = runner._graph
    assert graph is not None
    pages = -(-keys // PAGE)
    runner.run(
        [
            Row(
                [100 + b],
                keys - 1,
                list(range(b * pages, (b + 1) * pages)),
                0 if row == "base only" else slots.acquire(ours.users[b]),
                SamplingParams(),
            )
            for b in range(batch)
        ]
    )
    seconds = graph.profile(repeats, tokens=batch, sequences=batch)
    result: dict[str, float] = {}
    for part, value in zip(parts(graph.names), seconds, strict=True):
        result[part] = result.get(part, 0.0) + 1e3 * value
    return result


def between_steps(ours: Ours, row: str, batch: int) -> float:
    """Milliseconds a decoded step takes besides the native call it is in: what was chosen is handed
    out, the next steps are planned and written into the buffers."""
    graph = ours.engines[row].runner._graph
    assert graph is not None
    replay, repeat, inside = graph.replay, graph.repeat, 0.0

    def timed_replay(**rows: int) -> None:
        nonlocal inside
        start = time.perf_counter()
        replay(**rows)
        if rows["tokens"] == batch:  # not the prompts
            inside += time.perf_counter() - start

    def timed_repeat(rows: Mapping[str, int], times: int, seconds: float = math.inf) -> int:
        nonlocal inside
        start = time.perf_counter()
        done = repeat(rows, times, seconds)
        inside += time.perf_counter() - start
        return done

    graph.replay = timed_replay  # type: ignore[method-assign]
    graph.repeat = timed_repeat  # type: ignore[method-assign]
    try:
        seconds = batch * DECODED / ours.decode(row, batch, prompt=PROMPT, new=DECODED)
    finally:
        del graph.replay, graph.repeat  # the class's own again
    return 1e3 * (seconds - inside) / DECODED


def products_rate(ours: Ours, row: str, batch: int, step: dict[str, float]) -> float:
    """FLOP a second of one step's linears and vocabulary head."""
    seconds = sum(step[part] for part in (*LINEARS, "head")) / 1e3
    return batch * ours.token_flop(row, 0) / seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the profile."""
    parser = cpu_command.parser("cpu_profile", __doc__, written="in the end")
    parser.add_argument("--keys", type=int, default=80, help="keys of every row (80)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--instruction-set", help="of the kernels: avx2 or portable, say (default: the best here)"
    )
    options = parser.parse_args(arguments)
    console = Console()
    if not cpu_command.kernels_are_built(console):
        return 1
    assert NATIVE is not None
    if min(options.keys, options.rounds) < 1:
        parser.error("keys and rounds must be at least 1")
    if options.instruction_set is not None:
        try:
            NATIVE.set_instruction_set(options.instruction_set)
        except ValueError as error:
            parser.error(f"--instruction-set: {error}")
    set_threads(options.threads)
    model = LanguageModel.load(options.model, dtype="bfloat16")
    most = model.decoder.config.max_positions
    if options.keys > most:
        parser.error(f"--keys: expected at most the model's {most} positions, got {options.keys}")
    ours = Ours(model, max(options.batch), 512, max(256, options.keys))
    fill_caches(ours)
    limits = Limits()
    result: dict[str, Any] = {
        "machine": cpu_command.machine(),
        "model": options.model,
        "rank": RANK,
        "keys": options.keys,
        "steps": {},
        "fraction_of_multiply_add": {},
        "multiply_add_flop_per_s": {},
        "stream_bytes_per_s": {},
        "barrier_s": {},
        "between_steps": {},
        "raw": {},
    }
    for batch in options.batch:
        raw: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
        between: dict[str, list[float]] = {row: [] for row in ROWS}
        rates: list[float] = []
        streams: list[float] = []
        barriers: list[float] = []
        for _ in range(options.rounds):
            for row in ROWS:
                raw[row].append(profile(ours, row, batch, options.keys, 4))
                between[row].append(between_steps(ours, row, batch))
            rates.append(NATIVE.multiply_add_rate(REGISTER_STEPS, torch.get_num_threads()))
            streams.append(limits.stream(0.1))
            barriers.append(limits.barrier())
        steps = {
            row: {part: statistics.median(r[part] for r in rounds) for part in rounds[0]}
            for row, rounds in raw.items()
        }
        fractions = {
            row: statistics.median(
                products_rate(ours, row, batch, step) / rate
                for step, rate in zip(raw[row], rates, strict=True)
            )
            for row in ROWS
        }
        result["raw"][str(batch)], result["steps"][str(batch)] = raw, steps
        result["multiply_add_flop_per_s"][str(batch)] = rates
        result["stream_bytes_per_s"][str(batch)] = streams
        result["barrier_s"][str(batch)] = barriers
        result["between_steps"][str(batch)] = between
        result["fraction_of_multiply_add"][str(batch)] = fractions
        table = Table(title=f"batch {batch}, ms a step", title_justify="left")
        for column in ("", *ROWS):
            table.add_column(column, justify="right" if column else "left")
        for part in steps[ROWS[0]]:
            table.add_row(part, *(f"{steps[row][part]:.3f}" for row in ROWS))
        table.add_row("sum", *(f"{sum(steps[row].values()):.3f}" for row in ROWS))
        table.add_row("between two", *(f"{statistics.median(between[row]):.3f}" for row in ROWS))
        table.add_row("products ÷ registers", *(f"{fractions[row]:.2f}" for row in ROWS))
        console.print(table)
        console.print(
            f"memory {statistics.median(streams) / 1e9:.0f} GB/s, "
            f"a barrier {statistics.median(barriers) * 1e9:.0f} ns"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
