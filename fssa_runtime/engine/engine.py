"""Continuous batching: many requests, each of its own user, one step of the model at a time.

``schedule → run → publish``: the scheduler says which streams compute what on which pages, the
runner computes it in one step and chooses tokens, and what was chosen goes to its requests. A
prompt in pieces, single tokens and several answers to one prompt share a step. A step is over when
`step` returns: between two of them requests may be added and aborted at will.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ..conditioning.modulation import Modulation
from ..conditioning.table import ModulationTable
from ..errors import InputError
from ..models.decoder import Decoder
from ..request import Completion, FinishReason, Request
from .kv_cache import KVCache
from .page_pool import PagePool
from .runner import Runner
from .scheduler import Piece, Plan, Scheduler
from .slots import SlotCache, require_slots
from .step_inputs import Row
from .stream import Stream


class Token(NamedTuple):
    """A token chosen for an answer, or the end of one without a token.

    ``request`` is what `Engine.add` returned, ``answer`` which of its answers; ``token`` is -1 and
    ``logprob`` 0 where an answer ends without one. ``finish_reason`` is None while it goes on.
    """

    request: int
    answer: int
    token: int
    logprob: float
    finish_reason: FinishReason | None


@dataclass(eq=False)
class _Answer:
    """One answer being written."""

    request: int
    index: int
    asked: Request
    stream: Stream
    draws: random.Random
    slot: int | None = None  # while it runs


@dataclass(eq=False)
class _InFlight:
    """A request and those of its answers that are not finished."""

    asked: Request
    answers: dict[int, _Answer] = field(default_factory=dict)


class Engine:
    """Runs requests on a decoder.

    Args:
        decoder: the frozen model; its weights are packed for the native kernels where it can be
            (`Decoder.pack`), after which it has no gradients.
        stop_tokens: tokens that end an answer.
        modulation: what slots refer to, bound to the rows of ``table``; None if nobody is
            modulated.
        table: rows of users, at least one for each of a batch.
        max_batch_size: answers of one step at most.
        max_batch_tokens: tokens of one step at most; longer prompts are computed in pieces.
        max_kv_tokens: tokens the key-value cache holds.
        page_size: tokens of a page, P.
        prefix_cache: use keys and values again where weights and tokens before are the same.
        debug: after every step, account for every page and slot and fill free pages with NaN, so
            that whoever still reads one is seen.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop_tokens: frozenset[int],
        modulation: Modulation | None = None,
        table: ModulationTable | None = None,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_kv_tokens: int = 16384,
        page_size: int = 16,
        prefix_cache: bool = True,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batch_tokens < max_batch_size:
            raise ValueError(
                f"max_batch_tokens: expected at least max_batch_size = {max_batch_size}, "
                f"got {max_batch_tokens}"
            )
        if (modulation is None) != (table is None):
            raise ValueError("modulation and table: expected both or neither")
        self.decoder = decoder
        self.stop_tokens = stop_tokens
        self.debug = debug
        self.slots = None if table is None else SlotCache(table)
        require_slots(self.slots, max_batch_size)
        self.cache = KVCache(
            decoder.config, -(-max_kv_tokens // page_size), page_size, decoder.dtype, decoder.device
        )
        self.scheduler = Scheduler(
            PagePool(self.cache.num_pages, page_size),
            max_streams=max_batch_size,
            max_tokens=max_batch_tokens,
            max_length=decoder.config.max_positions,
            reuse=prefix_cache,
        )
        if decoder.can_pack:
            decoder.pack()
            modulation = None if modulation is None else modulation.pack()
        elif decoder.device.type == "cuda" and modulation is not None:
            modulation = decoder.extend(modulation)
        self.runner = Runner(
            decoder,
            self.cache,
            modulation,
            max_tokens=max_batch_tokens,
            max_sequences=max_batch_size,
        )
        self._clock = clock
        self._in_flight: dict[int, _InFlight] = {}
        self._answers: dict[Stream, _Answer] = {}
        self._next_request = 0

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._in_flight)

    def add(self, request: Request) -> int:
        """Let a request wait for its turn; a number to know it by.

        Raises:
            InputError: it can never run; nothing is kept of it.
        """
        self._check(request)
        number = self._next_request
        answer = self._answer(number, request, 0, parent=None)
        self.scheduler.add(answer.stream)
        self._next_request += 1
        self._in_flight[number] = _InFlight(request, {0: answer})
        self._answers[answer.stream] = answer
        return number

    def abort(self, number: int) -> bool:
        """Drop a request, its pages and its slot; False if it is finished or unknown."""
        request = self._in_flight.get(number)
        if request is None:
            return False
        for answer in list(request.answers.values()):
            self._drop(answer)
        return True

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Compute one step; the tokens it chose, and answers that ended without one.

        Raises:
            Whatever the step raises. Nothing was told of it; what its requests had reserved is
            free again once they are aborted.
        """
        plan = self.scheduler.plan(self._clock())
        tokens = [
            end for stream in plan.expired for end in self._end(self._answers[stream], "deadline")
        ]
        for stream in plan.preempted:
            self._give_back_slot(self._answers[stream])
        if plan.pieces:
            chosen = self._run(plan)
            self.scheduler.computed(plan)
            for piece, token, logprob in chosen:
                tokens.append(self._publish(self._answers[piece.stream], token, logprob))
        if self.debug:
            self._account()
        return tokens

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer requests that ask for one answer each; the result is in their order.

        As `generate_all`. ``on_finish(request index, completion)`` is called as answers end.
        """
        for index, request in enumerate(requests):
            if request.n != 1:
                raise InputError(f"request {index}: n must be 1 here, got {request.n}")
        finished = None
        if on_finish is not None:
            finished = lambda request, _answer, completion: on_finish(request, completion)  # noqa: E731
        return [
            answers[0]
            for answers in self.generate_all(requests, on_token=on_token, on_finish=finished)
        ]

    def generate_all(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Answer requests, beside whatever else is in flight; their answers, in order.

        ``on_token(request index, token)`` and ``on_finish(request index, answer index,
        completion)`` are called as the work goes on.

        Raises:
            InputError: a request that can never run, found before any has.
        """
        indices: dict[int, int] = {}
        done = [[Completion([], [], "length") for _ in range(r.n)] for r in requests]
        left = sum(request.n for request in requests)
        try:
            for index, request in enumerate(requests):
                try:
                    indices[self.add(request)] = index
                except InputError as error:
                    raise InputError(f"request {index}: {error}") from error
            while left:
                for event in self.step():
                    if event.request not in indices:  # somebody else's
                        continue
                    index = indices[event.request]
                    completion = done[index][event.answer]
                    if event.token >= 0:
                        completion.tokens.append(event.token)
                        completion.logprobs.append(event.logprob)
                        if on_token is not None:
                            on_token(index, event.token)
                    if event.finish_reason is not None:
                        completion = replace(completion, finish_reason=event.finish_reason)
                        done[index][event.answer] = completion
                        left -= 1
                        if on_finish is not None:
                            on_finish(index, event.answer, completion)
        finally:
            for number in indices:  # an exception or an interrupt: no page is lost
                self.abort(number)
        return done

    def _check(self, request: Request) -> None:
        vocab_size = self.decoder.config.vocab_size
        if not all(0 <= token < vocab_size for token in request.prompt_tokens):
            raise InputError(f"prompt tokens must be in 0..{vocab_size - 1}")
        if request.forced_tokens is not None:
            if not request.forced_tokens:
                raise InputError("forced_tokens must be None or hold at least one token")
            if not all(0 <= token < vocab_size for token in request.forced_tokens):
                raise InputError(f"forced tokens must be in 0..{vocab_size - 1}")
        if request.user is not None:
            if self.slots is None:
                raise InputError("the request is a user's, but the engine has no modulation")
            self.slots.check_weights(request.user)

    def _answer(self, number: int, request: Request, index: int, parent: Stream | None) -> _Answer:
        seed = request.sampling.seed
        stream = Stream(
            request.prompt_tokens,
            _max_new(request),
            fingerprint=b"" if request.user is None else request.user.fingerprint,
            user=None if request.user is None else request.user.fingerprint,
            priority=request.priority,
            deadline=None if request.timeout is None else self._clock() + request.timeout,
            parent=parent,
        )
        # Answers of one request differ, whatever its seed.
        draws = random.Random(seed if index == 0 or seed is None else f"{seed} {index}")
        return _Answer(number, index, request, stream, draws)

    def _run(self, plan: Plan) -> list[tuple[Piece, int, float]]:
        """Compute the plan's step; (piece, token, log-probability) where a token was chosen."""
        self.cache.copy(plan.copies)
        rows = [self._row(piece) for piece in plan.pieces]
        tokens, logprobs = self.runner.run(rows)
        return [
            (piece, token, logprob)
            for piece, token, logprob in zip(plan.pieces, tokens, logprobs, strict=True)
            if piece.writes
        ]

    def _row(self, piece: Piece) -> Row:
        stream = piece.stream
        answer = self._answers[stream]
        if answer.slot is None:
            user = answer.asked.user
            answer.slot = 0
            if user is not None and self.slots is not None:
                answer.slot = self.slots.acquire(user)
        forced, uniform = -1, 0.0
        if piece.writes and answer.asked.forced_tokens is not None:
            forced = answer.asked.forced_tokens[len(stream.written)]
        elif piece.writes and answer.asked.sampling.temperature > 0:
            uniform = answer.draws.random()
        start = stream.num_computed
        return Row(
            stream.tokens(start, start + piece.count),
            start,
            stream.pages,
            answer.slot,
            answer.asked.sampling,
            # In float32 a number just below 1 would become 1, which no sum passes.
            min(uniform, 1 - 2**-24),
            forced,
        )

    def _publish(self, answer: _Answer, token: int, logprob: float) -> Token:
        """Add a token to an answer, and end it if that was the last."""
        request, stream = answer.asked, answer.stream
        stream.written.append(token)
        if answer.index == 0 and len(stream.written) == 1:
            self._fork(answer)
        reason: FinishReason | None = None
        if request.forced_tokens is None and token in self.stop_tokens:
            reason = "stop"
        elif len(stream.written) == stream.max_tokens:
            reason = "length"
        if reason is not None:
            self._drop(answer)
        return Token(answer.request, answer.index, token, logprob, reason)

    def _fork(self, first: _Answer) -> None:
        """The prompt is computed: the other answers begin, on the same pages."""
        for index in range(1, first.asked.n):
            answer = self._answer(first.request, first.asked, index, parent=first.stream)
            answer.stream.deadline = first.stream.deadline
            self.scheduler.add(answer.stream)
            self._in_flight[first.request].answers[index] = answer
            self._answers[answer.stream] = answer

    def _end(self, answer: _Answer, reason: FinishReason) -> list[Token]:
        """End an answer without a token, and those that were to begin when its prompt is read."""
        self._drop(answer)
        unread = answer.index == 0 and not answer.stream.written
        count = answer.asked.n if unread else 1
        return [
            Token(answer.request, answer.index + extra, -1, 0.0, reason) for extra in range(count)
        ]

    def _drop(self, answer: _Answer) -> None:
        """An answer is over: its pages and its slot go back."""
        self.scheduler.remove(answer.stream)
        self._give_back_slot(answer)
        del self._answers[answer.stream]
        request = self._in_flight[answer.request]
        del request.answers[answer.index]
        if not request.answers:
            del self._in_flight[answer.request]

    def _give_back_slot(self, answer: _Answer) -> None:
        if answer.slot and answer.asked.user is not None and self.slots is not None:
            self.slots.release(answer.asked.user)
        answer.slot = None

    def _account(self) -> None:
        self.scheduler.check()
        assert set(self.scheduler.streams()) == set(self._answers), "a stream is nobody's"
        self.cache.poison(self.scheduler.pool.unused())
        if self.slots is not None:
            self.slots.check()


def _max_new(request: Request) -> int:
    if request.forced_tokens is not None:
        return len(request.forced_tokens)
    return request.sampling.max_tokens
