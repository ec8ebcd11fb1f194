"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .checks import require_int, require_ints, require_number
from .conditioning.user_weights import UserWeights
from .errors import InputError
from .sampling import GREEDY, SamplingParams

# stop: a stop token or string, or a grammar's end; length: as many tokens as were asked for;
# deadline: its time was over; error: it could not go on, see `Token.error`.
FinishReason = Literal["stop", "length", "deadline", "error"]

MAX_ANSWERS = 128


@dataclass(frozen=True)
class Request:
    """One prompt of one user.

    Attributes:
        user: whose weights write the answer; None for the base model's.
        forced_tokens: written instead of choosing, through the same prefill and decode steps: that
            is how log-probabilities of one text are compared between batches.
        n: answers that are wanted; they share the prompt's keys and values.
        best_of: answers that are written, of which the n likeliest are kept: those with the
            largest mean log-probability of a token. None writes n.
        priority: larger goes first. timeout: seconds after which it is no longer wanted, or None.
        tenant: whose turn it takes, of those who wait: any value that names a customer, a key, a
            session. All requests of a tenant, whosever weights they ask for, share one turn. None
            gives each user's weights a turn, and one to all requests without.

    Raises:
        InputError: n below 1, best_of below n, more than `MAX_ANSWERS`, a timeout that is not
            positive, one of them or the priority of the wrong type, or a tenant without a hash.
    """

    prompt_tokens: Sequence[int]
    user: UserWeights | None = None
    sampling: SamplingParams = GREEDY
    forced_tokens: Sequence[int] | None = None
    n: int = 1
    best_of: int | None = None
    priority: int = 0
    timeout: float | None = None
    tenant: Hashable = None

    def __post_init__(self) -> None:
        require_int("priority", self.priority)
        require_int("n", self.n)
        if not 1 <= self.n <= MAX_ANSWERS:
            raise InputError(f"n must be at least 1 and at most {MAX_ANSWERS}, got {self.n}")
        if self.best_of is not None:
            require_int("best_of", self.best_of)
            if not self.n <= self.best_of <= MAX_ANSWERS:
                raise InputError(
                    f"best_of must be at least n = {self.n} and at most {MAX_ANSWERS}, "
                    f"got {self.best_of}"
                )
        if self.timeout is not None:
            require_number("timeout", self.timeout)
            if not self.timeout > 0:
                raise InputError(f"timeout must be positive, got {self.timeout}")
        try:
            hash(self.tenant)
        except TypeError as error:
            raise InputError(f"tenant must be hashable: {error}") from error

    @property
    def num_answers(self) -> int:
        """Answers that are written."""
        return self.n if self.best_of is None else self.best_of

    def check_tokens(self, vocab_size: int) -> None:
        """Raise InputError unless all its tokens are of a vocabulary of this size."""
        named: tuple[tuple[str, Iterable[int]], ...] = (
            ("prompt tokens", self.prompt_tokens),
            ("forced tokens", self.forced_tokens or ()),
            ("tokens of logit_bias", self.sampling.logit_bias),
            ("stop_token_ids", self.sampling.stop_token_ids),
        )
        for name, tokens in named:
            require_ints(name, tokens)
            if not all(0 <= token < vocab_size for token in tokens):
                raise InputError(f"{name} must be in 0..{vocab_size - 1}")
        if self.forced_tokens is not None and not self.forced_tokens:
            raise InputError("forced_tokens must be None or hold at least one token")


class PromptToken(NamedTuple):
    """A token of the prompt, its log-probability in nats after those before it (None for the
    first), and the likeliest tokens there with theirs, the likeliest first."""

    token: int
    logprob: float | None
    top: dict[int, float]


class Token(NamedTuple):
    """A token chosen for an answer, or the end of one without a token.

    ``request`` is what `Engine.add` returned, ``answer`` which of its answers; ``token`` is -1 and
    ``logprob`` 0 where an answer ends without one. ``finish_reason`` is None while it goes on.
    ``text`` is what is now certain to come next in the answer's text: it may lag behind the tokens
    while a character is not complete or a stop string might have begun; the last event has all that
    is left. ``top`` holds the likeliest tokens, if they were asked for. With the first token of the
    first answer, once, come ``prompt``, the prompt's scores if they were asked for, and
    ``num_cached``, how many of its tokens were found computed. ``error`` says what is wrong where
    the reason is "error".
    """

    request: int
    answer: int
    token: int
    logprob: float
    finish_reason: FinishReason | None
    text: str = ""
    top: dict[int, float] | None = None
    prompt: list[PromptToken] | None = None
    error: str | None = None
    num_cached: int | None = None


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        tokens: with the stop token, if one ended it. logprobs: theirs, in nats.
        text: theirs, without stop tokens and strings; empty if the engine has no tokenizer.
        finish_reason: why it ended. error: what is wrong, if that is "error".
        top_logprobs: for each token the likeliest and their log-probabilities, if asked for.
        prompt_logprobs: scores of the prompt, if asked for.
        num_prompt_tokens: of the prompt, which the answers to it share. num_cached_tokens: those of
            them whose keys and values were found in the cache; how an answer came about is not
            compared.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str = ""
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[PromptToken] | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = field(default=0, compare=False)

    @property
    def mean_logprob(self) -> float:
        """Of a token, nats; what answers are compared by. Nothing is worse than no token."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else -math.inf


__all__ = [
    "GREEDY",
    "MAX_ANSWERS",
    "Completion",
    "FinishReason",
    "PromptToken",
    "Request",
    "SamplingParams",
    "Token",
]
