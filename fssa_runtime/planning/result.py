"""What a simulation found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .sketch import Sketch


@dataclass(frozen=True)
class Objectives:
    """A request is served well if its first token came, and the others followed, this fast.

    ``itl_s`` is held against the mean time between a request's tokens.
    """

    ttft_s: float
    itl_s: float


@dataclass
class Result:
    """What happened to the requests of a trace. Times in seconds.

    Attributes:
        ttft: from arrival to the first token. itl: between tokens.
        ttft_busy, ttft_others: the former, of the busy users and of all others.
        queue: streams waiting, weighted by time. batch: streams of a step.
        prompt_tokens, reused_tokens: of prompts at their first admission; found in the pages.
        longest_wait, longest_wait_user: the largest time to a first token, and whose it was.
        within, late: requests that met the objectives, and that did not.
        host_s: what the scheduler itself took, on the machine that simulated.
    """

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    slot_lookups: int = 0
    slot_misses: int = 0
    within: int = 0
    late: int = 0
    seconds: float = 0.0
    last_arrival: float = 0.0
    longest_wait: float = 0.0
    longest_wait_user: int = -1
    fairness: float = math.nan
    stopped: bool = False
    host_s: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)
    ttft: Sketch = field(default_factory=Sketch)
    ttft_busy: Sketch = field(default_factory=Sketch)
    ttft_others: Sketch = field(default_factory=Sketch)
    itl: Sketch = field(default_factory=Sketch)
    queue: Sketch = field(default_factory=lambda: Sketch(smallest=0.5))
    batch: Sketch = field(default_factory=lambda: Sketch(smallest=0.5))


def jain_index(tokens: np.ndarray, seconds: np.ndarray) -> float:
    """Jain's index of the users' tokens for every second of waiting and being served.

    1: answers are equally fast for everybody; 1/n: for one of n users only. Users without a second
    do not count.
    """
    seen = seconds > 0
    speed = tokens[seen] / seconds[seen]
    if not len(speed):
        return math.nan
    return float(speed.sum() ** 2 / (len(speed) * (speed**2).sum()))
