"""The answers to one request as an asynchronous caller reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from .completions import Gathering
from .engine.grammar import Grammar
from .errors import EngineError
from .request import Completion, FinishReason, PromptToken, Request, Token

if TYPE_CHECKING:
    from .async_engine import AsyncEngine


@dataclass
class Part:
    """What has come of one answer since the last part of it; see `Completion` for the fields.

    ``answer`` says which one. ``finish_reason`` is None while it goes on.
    """

    answer: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[PromptToken] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    def take(self, event: Token) -> None:
        """Add a token."""
        self.text += event.text
        if event.token >= 0:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
        if event.top is not None:
            self.top_logprobs.append(event.top)
        if event.prompt is not None:
            self.prompt_logprobs = event.prompt
        self.finish_reason, self.error = event.finish_reason, event.error

    @classmethod
    def whole(cls, answer: int, completion: Completion) -> Part:
        """All of an answer at once."""
        return cls(
            answer,
            completion.text,
            completion.tokens,
            completion.logprobs,
            completion.top_logprobs or [],
            completion.prompt_logprobs,
            completion.finish_reason,
            completion.error,
        )


@dataclass(eq=False)
class Ticket:
    """A request as the engine's thread knows it; it does not keep the caller's stream alive.

    ``deliver`` and ``fail`` may be called from any thread, and do their work in the caller's event
    loop. ``number`` is the engine's own, once it has the request.
    """

    request: Request
    grammar: Grammar | None
    request_id: str | None
    deliver: Callable[[Sequence[Token]], None]
    fail: Callable[[BaseException], None]
    number: int | None = None
    ended: bool = False


class AnswerStream:
    """The answers to one request, part by part: ``async for part in stream``.

    The request begins with the first part that is asked for, with ``async with`` or with `start`.
    It is dropped, and what it held is free again, when the task that reads it is cancelled, when
    ``async with`` is left, and when nobody refers to the stream any more.

    Who reads slowly gets fewer and longer parts: what nobody has read yet is kept as one part an
    answer, so a request takes no more memory than its answers do.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        request: Request,
        request_id: str | None,
    ) -> None:
        self.request = request
        self.request_id = request_id
        self._engine = engine
        self._gathering = Gathering(request)
        self._unread: dict[int, Part] = {}
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._over = False
        self._ticket: Ticket | None = None
        self._starting = asyncio.Lock()  # a check may wait, and a request begins only once

    async def start(self) -> None:
        """Begin, if it has neither begun nor been dropped.

        Raises:
            InputError: it can never run, or another request of its id is in flight.
            OverloadedError: there are too many requests.
            EngineError: the engine is closed.
        """
        async with self._starting:
            if self._ticket is not None or self._over:
                return
            check = self._engine.llm.engine.check
            if self.request.sampling.grammar is not None:  # may take a second to compile
                grammar = await asyncio.to_thread(check, self.request)
            else:
                grammar = check(self.request)
            if not self._over:  # it may have been dropped meanwhile
                self._ticket = self._engine.submit(self, grammar)

    def abort(self) -> None:
        """Drop the request, begun or not. Parts that have come can be read; none follow."""
        if not self._over:
            if self._ticket is not None:
                self._engine.drop(self._ticket)
            self._end(None)

    @property
    def completions(self) -> list[Completion]:
        """All answers, once they have ended; see `Gathering.completions`.

        Raises:
            EngineError: they go on, or were dropped before their end.
        """
        if not self._gathering.done:
            state = "was dropped" if self._over else "goes on"
            raise EngineError(f"the request {state}: its answers have not ended") from self._error
        return self._gathering.completions()

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> Part:
        await self.start()
        try:
            while not self._unread and not self._over:
                await self._news.wait()
                self._news.clear()
        except asyncio.CancelledError:
            self.abort()
            raise
        if self._unread:
            return self._unread.pop(next(iter(self._unread)))
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def __aenter__(self) -> AnswerStream:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        if getattr(self, "_ticket", None) is not None:
            self.abort()

    def _take(self, events: Sequence[Token]) -> None:
        """In the event loop: what a step gave."""
        for event in events:
            self._gathering.take(event)
            if self.request.best_of is None:
                self._unread.setdefault(event.answer, Part(event.answer)).take(event)
        if self._gathering.done:
            if self.request.best_of is not None:  # which ones are wanted is known only now
                for index, completion in enumerate(self._gathering.completions()):
                    self._unread[index] = Part.whole(index, completion)
            self._end(None)
        self._news.set()

    def _end(self, error: BaseException | None) -> None:
        """In the event loop: nothing will follow."""
        self._error, self._over = error, True
        if self._ticket is not None:
            self._engine.release(self._ticket)
        self._news.set()
