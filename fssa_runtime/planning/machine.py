"""Machines, and how long a step takes on one by its limits."""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import InputError
from .shapes import ModelSize


@dataclass(frozen=True)
class Machine:
    """Limits of a machine, and where they are from."""

    name: str
    bytes_per_s: float
    flop_per_s: float
    memory_bytes: float
    source: str


MACHINES = {
    "h100": Machine("H100 SXM", 3.35e12, 989e12, 80e9, "NVIDIA's H100 data sheet, dense bf16"),
    "h200": Machine("H200 SXM", 4.8e12, 989e12, 141e9, "NVIDIA's H200 data sheet, dense bf16"),
    "a100": Machine("A100 80GB SXM", 2.039e12, 312e12, 80e9, "NVIDIA's A100 data sheet, bf16"),
}


class Step(NamedTuple):
    """What a step computes.

    Attributes:
        writing: rows that compute one token and write the next.
        prompt_tokens: tokens of prompts.
        keys: whose keys and values are read, summed over the rows.
        pairs: of a query and a key it attends to.
        refills: rows of the modulation table that are computed from latents before it.
    """

    writing: int
    prompt_tokens: int
    keys: int
    pairs: int
    refills: int = 0


class StepTime(Protocol):
    """How long steps take.

    ``basis``: "measured" or "roofline". ``notes``: what it does not know, a sentence each.
    """

    @property
    def basis(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def terms(self, step: Step) -> dict[str, float]:
        """Seconds by cause; the step takes their sum."""
        ...


class Roofline:
    """Every part of a step as fast as memory or arithmetic allows: what no machine quite reaches.

    layers and head: max(weight bytes / bandwidth, FLOP / rate); attention: the same of keys and
    values; refills: rows written and the map from latents read once; and a fixed overhead.
    """

    basis = "roofline"

    def __init__(self, model: ModelSize, machine: Machine, overhead_s: float = 0.0) -> None:
        for name, value in (("bandwidth", machine.bytes_per_s), ("rate", machine.flop_per_s)):
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} of the machine: expected more than 0, got {value:g}")
        if not 0 <= overhead_s < math.inf:
            raise InputError(f"overhead of a step: expected at least 0, got {overhead_s:g}")
        self._model, self._machine, self._overhead = model, machine, overhead_s
        self.notes = (
            "roofline: every part of a step at the machine's full bandwidth or rate; "
            "real steps take longer",
        )

    def terms(self, step: Step) -> dict[str, float]:
        model, machine = self._model, self._machine
        tokens = step.writing + step.prompt_tokens
        heads = step.writing + (step.prompt_tokens > 0)
        flop = tokens * model.token_flop + heads * model.head_flop
        read, computed = model.step_bytes / machine.bytes_per_s, flop / machine.flop_per_s
        return {
            "weights": read if read >= computed else 0.0,
            "products": computed if read < computed else 0.0,
            "attention": max(
                step.keys * model.kv_token_bytes / machine.bytes_per_s,
                step.pairs * model.pair_flop / machine.flop_per_s,
            ),
            "refills": refill_seconds(model, step.refills, machine.bytes_per_s),
            "overhead": self._overhead,
        }


def refill_seconds(model: ModelSize, rows: int, bytes_per_s: float) -> float:
    """Rows are written, and the map they come from (the size of a row a latent number) is read."""
    if not rows:
        return 0.0
    return (rows * model.row_bytes + model.expand_bytes) / bytes_per_s


def this_cpu() -> Machine:
    """This machine's limits, by tests of under a second each; call `set_threads` before."""
    import torch

    from fssa_kernels.native import NATIVE

    threads = torch.get_num_threads()
    memory = torch.ones(256 * 1024 * 1024, dtype=torch.uint8)

    def read() -> None:
        if NATIVE is not None:
            NATIVE.stream_seconds(memory.data_ptr(), memory.numel(), threads)
        else:
            memory.view(torch.int64).sum()

    def product(dtype: torch.dtype) -> float:
        x, w = torch.ones(1024, 1536, dtype=dtype), torch.ones(3072, 1536, dtype=dtype)
        return 2 * x.shape[0] * w.numel() / _seconds(lambda: torch.nn.functional.linear(x, w))

    with torch.inference_mode():
        stream = memory.numel() / _seconds(read)
        if NATIVE is not None:
            what = "multiplications in registers"
            rate = statistics.median(NATIVE.multiply_add_rate(2_000_000, threads) for _ in range(7))
        else:  # a machine without bf16 products is faster in fp32
            what = "matrix product"
            rate = max(product(torch.bfloat16), product(torch.float32))
    return Machine(
        f"this CPU, {threads} threads",
        stream,
        rate,
        _system_memory(),
        f"measured here: memory stream, {what}",
    )


def _seconds(call: Any, budget_s: float = 0.4) -> float:
    call()
    taken: list[float] = []
    end = time.perf_counter() + budget_s
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _system_memory() -> float:
    """Bytes of memory, or of the cgroup's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return float(total)
