"""Machines and loads that several tests of the simulator share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fssa_runtime.engine.page_pool import PagePool
from fssa_runtime.engine.scheduler import Scheduler
from fssa_runtime.planning.machine import Step
from fssa_runtime.planning.result import Objectives
from fssa_runtime.planning.simulator import Simulator
from fssa_runtime.planning.trace import Lengths, Trace

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"
SMOLLM = "smollm2-135m"


class SimpleTime:
    """10 ms a step, 1 ms a token of a prompt, 5 ms a refilled row."""

    basis = "made up"
    notes = ()

    def terms(self, step: Step) -> dict[str, float]:
        return {
            "step": 0.010,
            "prompts": 0.001 * step.prompt_tokens,
            "refills": 0.005 * step.refills,
        }


def simulator(
    *,
    max_streams: int = 8,
    max_tokens: int = 100,
    pages: int = 1000,
    slots: int = 1000,
    users: int = 1000,
    busy: int = 0,
    refills: bool = False,
) -> Simulator:
    scheduler = Scheduler(
        PagePool(pages, 16), max_streams=max_streams, max_tokens=max_tokens, max_length=10_000
    )
    made = Simulator(
        scheduler,
        SimpleTime(),
        Objectives(1.0, 0.1),
        num_slots=slots,
        num_users=users,
        num_busy=busy,
    )
    if not refills:
        made._slots.acquire = lambda user: True  # type: ignore[method-assign]
        made._slots.release = lambda user: None  # type: ignore[method-assign]
    return made


def trace(**changes: Any) -> Trace:
    options: dict[str, Any] = {
        "rate": 20.0,
        "num_requests": 500,
        "num_users": 200,
        "prompt": Lengths(60, 200),
        "output": Lengths(10, 40),
        "max_prompt": 500,
    }
    return Trace(**{**options, **changes})
