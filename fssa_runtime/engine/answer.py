"""One answer of a request while it is written: what of it is not the scheduler's business."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ..request import PromptToken, Request
from .edits import Edits
from .grammar import Grammar
from .scheduler import Piece
from .step_inputs import MAX_STOP_TOKENS, Row
from .stream import Stream
from .text import TextStream

# In float32 a number just below 1 would become 1, which no sum passes.
_MAX_UNIFORM = 1 - 2**-24


@dataclass(eq=False)
class InFlight:
    """A request and those of its answers that are not finished; ``grammar`` is what they obey."""

    asked: Request
    grammar: Grammar | None
    answers: dict[int, Answer] = field(default_factory=dict)


@dataclass(eq=False)
class Answer:
    """One answer being written.

    Attributes:
        request: the engine's number of the request. index: which of its answers this is.
        stop_tokens: that end it.
        slot: of its user's weights, while it runs.
        num_cached: tokens of the prompt that were found computed when it first ran. After a
            preemption it would find its own.
    """

    request: int
    index: int
    asked: Request
    stream: Stream
    stop_tokens: frozenset[int]
    edits: Edits | None = None
    text: TextStream | None = None
    slot: int | None = None
    num_cached: int | None = None
    _scores: list[PromptToken] = field(default_factory=list)

    def __post_init__(self) -> None:
        seed = self.asked.sampling.seed
        # Answers of one request differ, whatever its seed.
        key = seed if self.index == 0 or seed is None else f"{seed} {self.index}"
        self._draws = random.Random(key)
        self._drawn: list[float] = []

    @property
    def follows_itself(self) -> bool:
        """Whether a next token follows from one that was chosen without a look at it."""
        sampling = self.asked.sampling
        return (
            self.asked.forced_tokens is None
            and self.edits is None
            and not sampling.stop
            and not sampling.top_logprobs
            and len(self.stop_tokens) <= MAX_STOP_TOKENS
        )

    def write(self, token: int) -> None:
        """A token was chosen."""
        self.stream.written.append(token)
        del self._drawn[:1]

    def row(self, piece: Piece, steps: int = 1) -> Row:
        """Its part of the next step, and of those that follow it; its slot is known."""
        assert self.slot is not None
        stream, sampling = self.stream, self.asked.sampling
        start = stream.num_computed
        forced, edits, num_top = -1, None, 0
        uniforms: list[float] = []
        if piece.writes:
            num_top = sampling.top_logprobs
            if self.asked.forced_tokens is not None:
                forced = self.asked.forced_tokens[len(stream.written)]
            else:
                edits = self.edits
                if sampling.temperature > 0:
                    uniforms = self._next_draws(steps)
        scored: list[int] = []
        if self._scores_prompt:
            scored = list(stream.prompt[start + 1 : start + piece.num_tokens + 1])
        return Row(
            stream.tokens(start, start + piece.num_tokens),
            start,
            stream.pages,
            self.slot,
            sampling,
            uniforms,
            self.stop_tokens if steps > 1 else (),
            forced,
            edits,
            num_top,
            scored,
            sampling.prompt_logprobs or 0,
        )

    def _next_draws(self, count: int) -> list[float]:
        """What decides the draws of the next tokens, however often it is asked for."""
        while len(self._drawn) < count:
            self._drawn.append(min(self._draws.random(), _MAX_UNIFORM))
        return self._drawn[:count]

    def take_scores(self, piece: Piece, scores: list[PromptToken]) -> None:
        """Scores of the prompt's tokens that follow those of a piece."""
        # After a preemption the same are computed again.
        self._scores[piece.stream.num_computed :] = scores

    def prompt_scores(self) -> list[PromptToken] | None:
        """Scores of the whole prompt, when its first token is chosen; None if nobody asked."""
        if not self._scores_prompt:
            return None
        first = PromptToken(self.stream.prompt[0], None, {})
        return [first, *self._scores]

    @property
    def _scores_prompt(self) -> bool:
        asked = self.index == 0 and self.asked.sampling.prompt_logprobs is not None
        return asked and not self.stream.written
