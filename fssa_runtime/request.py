"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .conditioning.user_weights import UserWeights
from .errors import InputError

FinishReason = Literal["stop", "length", "deadline"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; what the numbers do is written in `fssa_kernels.sample`.

    ``temperature=0`` is greedy; ``top_k=0``, ``top_p=1`` and ``min_p=0`` are off.

    ``seed`` makes a sampled answer repeatable, whatever else is in the batch.

    Raises:
        InputError: a value out of range, named.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be >= 0 (0 is off), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], got {self.min_p}")


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """One prompt of one user.

    Attributes:
        user: whose weights write the answer; None for the base model's.
        forced_tokens: written instead of choosing, through the same prefill and decode steps: that
            is how log-probabilities of one text are compared between batches.
        n: answers to write, which share the prompt's keys and values.
        priority: larger goes first. timeout: seconds after which it is no longer wanted, or None.

    Raises:
        InputError: n below 1, or a timeout that is not positive.
    """

    prompt_tokens: Sequence[int]
    user: UserWeights | None = None
    sampling: SamplingParams = GREEDY
    forced_tokens: Sequence[int] | None = None
    n: int = 1
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n must be at least 1, got {self.n}")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout must be positive, got {self.timeout}")


@dataclass(frozen=True)
class Completion:
    """An answer: its tokens (a stop token included), their log-probabilities in nats, and why it
    ended."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
