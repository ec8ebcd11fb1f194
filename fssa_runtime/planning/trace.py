"""Requests that arrive over time: who, when, how long. Seeded, and made while they are read.

The trace is open: requests come at their times whether or not earlier ones are answered, also
those that go on with a conversation.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import InputError

_CHUNK = 4096
# Conversations that may be continued; the users seen longest ago lose theirs.
_REMEMBERED = 100_000


class Arrival(NamedTuple):
    """A request. ``conversation`` names its text: the same one, the same tokens as far as it goes.

    Prompts of a conversation hold its earlier prompts and answers, in full.
    """

    time: float
    user: int
    conversation: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts with a given mean, cut at ``cap`` (the mean is that before cutting).

    ``sigma``: standard deviation of the logarithm.
    """

    mean: float
    cap: int
    sigma: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= self.cap:
            raise InputError(f"mean length: expected 1 to {self.cap} tokens, got {self.mean:g}")

    def draw(self, random: np.random.Generator, size: int) -> list[int]:
        mu = math.log(self.mean) - self.sigma**2 / 2
        drawn = np.rint(random.lognormal(mu, self.sigma, size))
        return np.clip(drawn, 1, self.cap).astype(int).tolist()


@dataclass(frozen=True)
class Trace:
    """What `arrivals` is made from.

    Attributes:
        rate: requests a second, on average.
        num_requests: where it ends.
        num_users: users are numbers below it; user u sends in proportion to 1 / (u + 1)^zipf.
        prompt, output: lengths of new text and of answers.
        max_prompt: a conversation whose next prompt would be longer begins anew.
        continued: chance that a request continues its user's latest conversation, if there is one.
        on_seconds, off_seconds: mean lengths of times with and without arrivals. Within the former
            arrivals are a Poisson process, fast enough for ``rate`` to hold on average. No time
            without arrivals makes all of it one Poisson process.
    """

    rate: float
    num_requests: int
    num_users: int
    prompt: Lengths
    output: Lengths
    max_prompt: int
    zipf: float = 1.0
    continued: float = 0.5
    on_seconds: float = 1.0
    off_seconds: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(f"rate: expected more than 0 requests a second, got {self.rate:g}")
        for name in ("num_requests", "num_users"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.continued <= 1:
            raise InputError(f"continued: expected a chance of 0 to 1, got {self.continued:g}")
        if not 0 <= self.zipf < math.inf:
            raise InputError(f"zipf: expected an exponent of at least 0, got {self.zipf:g}")
        if not (0 < self.on_seconds < math.inf and 0 <= self.off_seconds < math.inf):
            raise InputError(
                "on and off seconds: expected more than 0 and at least 0, "
                f"got {self.on_seconds:g} and {self.off_seconds:g}"
            )
        if self.prompt.cap > self.max_prompt:
            raise InputError(
                f"prompts: at most {self.max_prompt} tokens fit, the longest has {self.prompt.cap}"
            )

    def user_shares(self) -> np.ndarray:
        """Shares of the requests that come from users 0 to u, for every u."""
        weights = np.arange(1, self.num_users + 1, dtype=np.float64) ** -self.zipf
        total = np.cumsum(weights)
        return total / total[-1]

    def arrivals(self) -> Iterator[Arrival]:
        """The requests in order of time. The seed decides all but the scale of time."""
        # One stream of numbers for each subject, so that the rate changes only the times.
        streams = np.random.SeedSequence(self.seed).spawn(3)
        times = self._times(np.random.default_rng(streams[0]), np.random.default_rng(streams[1]))
        random = np.random.default_rng(streams[2])
        shares = self.user_shares()
        latest: OrderedDict[int, tuple[int, int]] = OrderedDict()
        conversations = 0
        for start in range(0, self.num_requests, _CHUNK):
            size = min(_CHUNK, self.num_requests - start)
            users = np.searchsorted(shares, random.random(size), side="right").tolist()
            prompts = self.prompt.draw(random, size)
            outputs = self.output.draw(random, size)
            goes_on = (random.random(size) < self.continued).tolist()
            for user, prompt, output, more in zip(users, prompts, outputs, goes_on, strict=True):
                conversation, told = latest.pop(user, (-1, 0)) if more else (-1, 0)
                if conversation < 0 or told + prompt > self.max_prompt:
                    conversation, told = conversations, 0
                    conversations += 1
                told += prompt
                latest[user] = conversation, told + output
                latest.move_to_end(user)
                if len(latest) > _REMEMBERED:
                    latest.popitem(last=False)
                yield Arrival(next(times), user, conversation, told, output)

    def _times(self, arrivals: np.random.Generator, phases: np.random.Generator) -> Iterator[float]:
        gap = self.on_seconds / (self.on_seconds + self.off_seconds) / self.rate
        now = 0.0
        left = phases.exponential(self.on_seconds) if self.off_seconds else math.inf
        while True:
            for passed in arrivals.exponential(gap, _CHUNK).tolist():
                while passed > left:
                    passed -= left
                    now += left + phases.exponential(self.off_seconds)
                    left = phases.exponential(self.on_seconds)
                left -= passed
                now += passed
                yield now
