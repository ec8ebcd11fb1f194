"""From the engine's tokens to answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Completion, FinishReason, PromptToken, Request, Token


@dataclass
class _Growing:
    """An answer that is being written."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None


class Gathering:
    """The answers to one request, gathered from the engine's events."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._answers = [_Growing() for _ in range(request.num_answers)]
        self._num_left = request.num_answers
        self._prompt: list[PromptToken] | None = None
        self._num_cached = 0

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return self._num_left == 0

    def take(self, event: Token) -> None:
        """Add what came; events are this request's, in the order the engine gave them."""
        answer = self._answers[event.answer]
        if event.token >= 0:
            answer.tokens.append(event.token)
            answer.logprobs.append(event.logprob)
            if event.top is not None:
                answer.top.append(event.top)
        if event.text:
            answer.text.append(event.text)
        if event.prompt is not None:
            self._prompt = event.prompt
        if event.num_cached is not None:
            self._num_cached = event.num_cached
        if event.finish_reason is not None:
            answer.finish_reason, answer.error = event.finish_reason, event.error
            self._num_left -= 1

    def completion(self, index: int) -> Completion:
        """An answer that has ended."""
        answer = self._answers[index]
        assert answer.finish_reason is not None
        return Completion(
            answer.tokens,
            answer.logprobs,
            answer.finish_reason,
            "".join(answer.text),
            answer.top if self.request.sampling.top_logprobs else None,
            self._prompt,
            answer.error,
            len(self.request.prompt_tokens),
            self._num_cached,
        )

    def completions(self) -> list[Completion]:
        """The answers that were asked for, once all have ended: the best ones, or all in order."""
        every = [self.completion(index) for index in range(self.request.num_answers)]
        if self.request.best_of is None:
            return every
        # The sort is stable: of equals the first written comes first.
        every.sort(key=lambda completion: completion.mean_logprob, reverse=True)
        return every[: self.request.n]
