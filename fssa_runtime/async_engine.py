"""The engine for asynchronous callers: answers as they are written, from one thread that steps.

The thread owns the engine. Callers leave it messages, which it reads between two steps, and it
sends what a step gave to their event loops. So a caller never waits for a step, a step never waits
for a caller, and nothing but those messages is shared.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch

from .answer_stream import AnswerStream, Ticket
from .conditioning.choices import ChoiceLike
from .conditioning.embedding import Steps
from .conditioning.questions import Candidate, Suggestion
from .engine.grammar import Grammar
from .errors import EngineError, InputError, OverloadedError
from .llm import LLM, Output
from .models.messages import Content
from .request import Request, Token
from .sampling import SamplingParams
from .users.registry import AnyReward, User, WhoseWeights

T = TypeVar("T")


class Job:
    """Work for the engine's thread, a piece between two steps."""

    def __init__(self, make: Callable[[], Steps[Any]]) -> None:
        self.future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._make = make
        self._steps: Steps[Any] | None = None
        self._dropped = False

    def drop(self) -> None:
        """From any thread: nobody waits for it any more, so that no further piece is done."""
        self._dropped = True

    def advance(self) -> bool:
        """Do a piece; whether it was the last, or nobody waits for it any more."""
        if self._dropped:
            if self._steps is not None:
                self._steps.close()
            if not self.future.cancel():  # it runs
                self.future.set_exception(concurrent.futures.CancelledError())
            return True
        if self._steps is None:
            if not self.future.set_running_or_notify_cancel():
                return True
            self._steps = self._make()
        try:
            next(self._steps)
        except StopIteration as end:
            self.future.set_result(end.value)
        except BaseException as error:
            self.future.set_exception(error)
        return self.future.done()


class AsyncEngine:
    """Serves an `LLM` to asynchronous callers.

        async with AsyncEngine(LLM("smollm2-135m-instruct")) as engine:
            await engine.infer("ana", [Choice("What is bread?", "Baked dough.", "Bread is …")])
            async for part in engine.stream("How do magnets work?", user="ana"):
                print(part.text, end="", flush=True)

    Args:
        llm: the model, its users and its engine; as long as this one is open nobody else may run
            that engine. Steps run on as many threads as torch has here, which `LLM` chose.
        max_requests: in flight at most, waiting ones included; more are refused.
        max_jobs: changes of users, and the like, that wait or are under way at most; more are
            refused.

    Methods may be called from any number of event loops.
    """

    def __init__(self, llm: LLM, *, max_requests: int = 4096, max_jobs: int = 1024) -> None:
        for name, most in (("max_requests", max_requests), ("max_jobs", max_jobs)):
            if most < 1:
                raise ValueError(f"{name}: expected at least 1, got {most}")
        if llm.served_by is not None:
            raise InputError("an AsyncEngine runs this model's engine already")
        if not llm.engine.in_use.acquire(blocking=False):
            raise InputError("a call of generate runs this model's engine: wait for it first")
        llm.served_by = self
        self.llm = llm
        self.max_requests = max_requests
        self.max_jobs = max_jobs
        self._live: set[Ticket] = set()
        self._ids: set[str] = set()
        # Of the two above; entered again where a stream is collected inside.
        self._lock = threading.RLock()
        self._running: dict[int, Ticket] = {}  # the thread's own
        self._messages: list[Callable[[], None]] = []
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()  # of the two above, and of whether it closes
        self._closing = False
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._serve, name="fssa-engine", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._live)

    def stream(
        self,
        prompt: Content,
        user: WhoseWeights = None,
        sampling: SamplingParams | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        tenant: Hashable = None,
        request_id: str | None = None,
    ) -> AnswerStream:
        """Answer a prompt, part by part; see `LLM.request` and `AnswerStream`.

        With ``best_of`` the parts come at the end, since only then it is known whose they are.

        Raises:
            InputError: an unknown user, a prompt that is neither text nor chat messages, or numbers
                out of range.
        """
        request = self.llm.request(
            prompt,
            user,
            sampling,
            n=n,
            best_of=best_of,
            priority=priority,
            timeout=timeout,
            tenant=tenant,
        )
        return self.stream_request(request, request_id=request_id)

    def stream_request(self, request: Request, *, request_id: str | None = None) -> AnswerStream:
        """Answer a request in tokens, part by part.

        ``request_id``: a name of the caller's own, which one request in flight may have at a time.
        """
        return AnswerStream(self, request, request_id)

    async def generate(
        self,
        prompt: Content,
        user: WhoseWeights = None,
        sampling: SamplingParams | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        priority: int = 0,
        timeout: float | None = None,
        tenant: Hashable = None,
        request_id: str | None = None,
    ) -> Output:
        """Answer a prompt; arguments and errors as of `stream` and `AnswerStream.start`."""
        stream = self.stream(
            prompt,
            user,
            sampling,
            n=n,
            best_of=best_of,
            priority=priority,
            timeout=timeout,
            tenant=tenant,
            request_id=request_id,
        )
        async with stream:
            async for _ in stream:
                pass
        return Output(prompt, stream.completions)

    def abort(self, request_id: str) -> bool:
        """Drop the request in flight that has this id; False if there is none."""
        with self._lock:
            found = [ticket for ticket in list(self._live) if ticket.request_id == request_id]
        for ticket in found:
            ticket.fail(EngineError(f"request {request_id!r} was aborted"))
            self.drop(ticket)
        return bool(found)

    async def infer(self, name: str, choices: Sequence[ChoiceLike]) -> User:
        """As `Users.infer`. Requests in flight keep the weights they have.

        What changes users is done in the order in which it was asked for, a piece between two
        steps: a piece reads no more text than a step does, so nobody waits long for a next token.
        It is dropped, and nothing is changed, when the task that waits for it is cancelled.

        Raises:
            InputError: as `Users.infer` does.
            OverloadedError: there are too many such changes.
            EngineError: the engine is closed.
        """
        users, most = self.llm.users, self.llm.engine.scheduler.max_tokens
        return await self._work(lambda: users.infer_steps(name, choices, most))

    async def add_choices(self, name: str, choices: Sequence[ChoiceLike]) -> User:
        """As `Users.add_choices`; see `infer`."""
        users, most = self.llm.users, self.llm.engine.scheduler.max_tokens
        return await self._work(lambda: users.add_steps(name, choices, most))

    async def suggest_next_pair(
        self, name: str, candidates: Sequence[Candidate], reward: AnyReward | None = None
    ) -> Suggestion:
        """As `Users.suggest_next_pair`, of the user as they are when their turn comes; see
        `infer`."""
        users, most = self.llm.users, self.llm.engine.scheduler.max_tokens
        return await self._work(lambda: users.suggest_steps(name, candidates, reward, most))

    async def set_latent(self, name: str, latent: torch.Tensor) -> User:
        """As `Users.set_latent`; see `infer`."""
        return await self.call(lambda: self.llm.users.set_latent(name, latent))

    async def delete(self, name: str) -> None:
        """As `Users.delete`; see `infer`."""
        await self.call(lambda: self.llm.users.delete(name))

    async def call(self, function: Callable[[], T]) -> T:
        """What ``function()`` returns, called in the engine's thread between two steps.

        Raises:
            What it raises; OverloadedError and EngineError as `infer` does.
        """

        def at_once() -> Steps[T]:
            return function()
            yield 0

        return await self._work(at_once)

    async def _work(self, make: Callable[[], Steps[T]]) -> T:
        job = Job(make)
        with self._wake:
            self._require_open()
            if len(self._jobs) >= self.max_jobs:
                raise OverloadedError(f"{self.max_jobs} changes of users wait already")
            self._jobs.append(job)
            self._knock()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.drop()
            raise

    async def close(self, *, drain: bool = False) -> None:
        """End the thread; requests in flight are finished first (``drain``) or fail.

        While it waits for them, another call without ``drain`` fails what is left.
        """
        await asyncio.to_thread(self._close, drain)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close(drain=error is None)

    def submit(self, stream: AnswerStream, grammar: Grammar | None) -> Ticket:
        """Let a request in, from the event loop that reads it; what `AnswerStream.start` calls."""
        loop = asyncio.get_running_loop()
        reader = weakref.ref(stream)

        def tell(method: str, argument: object) -> None:
            def arrive() -> None:
                listening = reader()
                if listening is not None and not listening._over:
                    getattr(listening, method)(argument)

            try:
                loop.call_soon_threadsafe(arrive)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.drop(ticket)

        ticket = Ticket(
            stream.request,
            grammar,
            stream.request_id,
            lambda events: tell("_take", events),
            lambda error: tell("_end", error),
        )
        with self._lock:
            if len(self._live) >= self.max_requests:
                raise OverloadedError(f"{self.max_requests} requests are in flight already")
            if ticket.request_id is not None:
                if ticket.request_id in self._ids:
                    raise InputError(f"request id {ticket.request_id!r} is in flight already")
                self._ids.add(ticket.request_id)
            self._live.add(ticket)
        try:
            self._send(lambda: self._add(ticket))
        except EngineError:
            self.release(ticket)
            raise
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """From any thread: drop a request."""
        self.release(ticket)
        with self._wake:
            # While it closes, too: nobody should wait for an answer that nobody wants.
            self._messages.append(lambda: self._end(ticket))
            self._knock()

    def release(self, ticket: Ticket) -> None:
        """From any thread: a request is over, its id may be used again."""
        with self._lock:
            ticket.ended = True
            if ticket in self._live:
                self._live.remove(ticket)
                if ticket.request_id is not None:
                    self._ids.remove(ticket.request_id)

    def _send(self, message: Callable[[], None]) -> None:
        with self._wake:
            self._require_open()
            self._messages.append(message)
            self._knock()

    def _knock(self) -> None:
        """With the lock held: the thread has something to look at before it goes on."""
        if self.llm.served_by is self:
            self.llm.engine.interrupt.set()
        self._wake.notify()

    def _require_open(self) -> None:
        if self._closing:
            raise EngineError("the engine is closed")

    # What follows runs in the engine's thread.

    def _serve(self) -> None:
        torch.set_num_threads(self._num_threads)  # a new thread does not inherit it
        engine = self.llm.engine
        try:
            while True:
                with self._wake:
                    while not (self._messages or self._jobs or len(engine) or self._closing):
                        self._wake.wait()
                    engine.interrupt.clear()  # whoever comes from now on sets it again
                    messages, self._messages = self._messages, []
                    if self._closing and not (messages or self._jobs or len(engine)):
                        return
                for message in messages:
                    message()
                if self._jobs and self._jobs[0].advance():
                    with self._wake:
                        self._jobs.popleft()
                if len(engine):
                    self._step()
        finally:
            with self._wake:
                self._closing = True
            self._stop(EngineError("the engine was closed"))

    def _step(self) -> None:
        try:
            engine = self.llm.engine
            # A change of users goes on between two steps.
            events = engine.step(1 if self._jobs else engine.max_steps)
        except Exception as error:
            failure = EngineError(f"a step failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail_all(failure)
            return
        heard: dict[int, list[Token]] = {}
        for event in events:
            heard.setdefault(event.request, []).append(event)
        for number, of_request in heard.items():
            ticket = self._running.get(number)
            if ticket is not None:
                ticket.deliver(of_request)
                if number not in self.llm.engine:
                    del self._running[number]

    def _add(self, ticket: Ticket) -> None:
        if ticket.ended:  # aborted before it was added
            return
        try:
            ticket.number = self.llm.engine.add(ticket.request, ticket.grammar)
        except Exception as error:
            ticket.fail(error)
            return
        self._running[ticket.number] = ticket

    def _end(self, ticket: Ticket) -> None:
        if ticket.number is not None and self._running.pop(ticket.number, None) is not None:
            self.llm.engine.abort(ticket.number)

    def _fail_all(self, error: EngineError) -> None:
        for number, ticket in self._running.items():
            self.llm.engine.abort(number)
            ticket.fail(error)
        self._running.clear()

    def _stop(self, error: EngineError) -> None:
        """Fail whatever is left to do."""
        self._fail_all(error)
        with self._lock:
            others = list(self._live)
        for ticket in others:
            ticket.fail(error)
        for job in self._jobs:
            if not job.future.done():
                job.future.set_exception(error)
        self._jobs.clear()

    def _close(self, drain: bool) -> None:
        with self._wake:
            self._closing = True
            if not drain:
                self._messages.append(lambda: self._stop(EngineError("the engine was closed")))
            self._knock()
        self._thread.join()
        with self._wake:
            if self.llm.served_by is self:
                self.llm.engine.interrupt.clear()
                self.llm.engine.in_use.release()
                self.llm.served_by = None
