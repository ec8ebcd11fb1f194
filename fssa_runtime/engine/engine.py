"""Continuous batching: many requests, each of its own user, one step of the model at a time.

``schedule → run → publish``: the scheduler says which streams compute what on which pages, the
runner computes it in one step and chooses tokens, and what was chosen goes to its requests. A
prompt in pieces, single tokens and several answers to one prompt share a step. A step is over when
`step` returns: between two of them requests may be added and aborted at will.

Where all that runs only writes, several steps may follow one another in the runner before what was
chosen is published, since Python between two of them takes time in which nothing is computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..completions import Gathering
from ..conditioning.modulation import Modulation
from ..conditioning.table import ModulationTable
from ..conditioning.user_weights import UserWeights
from ..errors import InputError
from ..models.decoder import Decoder
from ..request import Completion, FinishReason, Request, Token
from .admission import Admission
from .answer import Answer, InFlight
from .grammar import Grammar
from .kv_cache import KVCache
from .page_pool import PagePool
from .runner import Chosen, Runner
from .scheduler import Plan, Scheduler
from .slots import SlotCache, require_slots
from .stream import Stream

# Seconds, at most, for which steps that follow one another keep what they chose to themselves:
# who reads along sees ten times a second how it goes on.
MAX_SILENCE = 0.1


class Engine:
    """Runs requests on a decoder.

    On a CPU a step runs on torch's number of threads, and on no more than there were here: call
    `fssa_runtime.threads.set_threads` before.

    Args:
        decoder: the frozen model; its weights are packed for the native kernels where it can be
            (`Decoder.pack`), after which it has no gradients.
        stop_tokens: tokens that end an answer.
        modulation: what slots refer to, bound to the rows of ``table``; None if nobody is
            modulated.
        table: rows of users, at least one for each of a batch.
        tokenizer: of the `tokenizers` library; without one there is no text, and requests with
            stop strings or a grammar are refused.
        max_batch_size: answers of one step at most.
        max_batch_tokens: tokens of one step at most; longer prompts are computed in pieces.
        max_kv_tokens: tokens the key-value cache holds.
        page_size: tokens of a page, P.
        prefix_cache: use keys and values again where weights and tokens before are the same.
        max_steps: steps that follow one another at most before what they chose is published; on a
            CPU, with the native kernels. Nobody waits for it longer than `MAX_SILENCE`.
        debug: after every step, account for every page and slot and fill free pages with NaN, so
            that whoever still reads one is seen.
        clock: seconds, for deadlines.

    Attributes:
        in_use: held by the one who runs steps for as long as that takes: a call of `generate` or
            `generate_all`, or an `AsyncEngine`.
        interrupt: set by who wants something between two steps; see `runner.Interrupt`.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop_tokens: frozenset[int],
        modulation: Modulation | None = None,
        table: ModulationTable | None = None,
        *,
        tokenizer: Any = None,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_kv_tokens: int = 16384,
        page_size: int = 16,
        prefix_cache: bool = True,
        max_steps: int = 16,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batch_tokens < max_batch_size:
            raise ValueError(
                f"max_batch_tokens: expected at least max_batch_size = {max_batch_size}, "
                f"got {max_batch_tokens}"
            )
        if max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
        if (modulation is None) != (table is None):
            raise ValueError("modulation and table: expected both or neither")
        self.decoder = decoder
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
            max_steps=max_steps,
        )
        self.max_steps = max_steps
        self.interrupt = self.runner.interrupt
        self._admission = Admission(decoder, self.cache, stop_tokens, self.slots, tokenizer, clock)
        self.in_use = threading.Lock()
        self._clock = clock
        self._in_flight: dict[int, InFlight] = {}
        # Fingerprints of weights that are wanted no more, of requests in flight all of them.
        self._forgotten: set[bytes] = set()
        # Of the slots and the two above: `forget` may come from any thread.
        self._slots_lock = threading.RLock()
        self._answers: dict[Stream, Answer] = {}
        self._next_request = 0

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._in_flight)

    def __contains__(self, number: object) -> bool:
        """Whether the request of this number is not finished."""
        return number in self._in_flight

    def add(self, request: Request, grammar: Grammar | None = None) -> int:
        """Let a request wait for its turn; a number to know it by.

        ``grammar``: the request's, from `check`; without it what the request asks for is compiled.

        Raises:
            InputError: it can never run; nothing is kept of it.
        """
        self._admission.check(request)
        in_flight = InFlight(request, grammar or self._admission.grammar(request))
        number = self._next_request
        answer = self._admission.answer(number, in_flight, 0)
        self.scheduler.add(answer.stream)
        self._next_request += 1
        with self._slots_lock:
            self._in_flight[number] = in_flight
        self._keep(answer)
        return number

    def check(self, request: Request) -> Grammar | None:
        """Raise InputError if a request could never run. Its grammar, compiled, if it has one.

        May be called by other threads while a step runs, so that a grammar holds nobody up.
        """
        self._admission.check(request)
        self.scheduler.check_stream(self._admission.stream(request))
        return self._admission.grammar(request)

    def room_after(self, num_tokens: int) -> int:
        """Tokens of an answer that fit after a prompt of so many; below 1 if none does."""
        return self._admission.room_after(num_tokens)

    def abort(self, number: int) -> bool:
        """Drop a request, its pages and its slot; False if it is finished or unknown."""
        request = self._in_flight.get(number)
        if request is None:
            return False
        for answer in list(request.answers.values()):
            self._drop(answer)
        return True

    def forget(self, user: UserWeights) -> None:
        """Clear the row of weights that are wanted no more, once no request in flight has them.

        May be called by any thread, while a step runs too.
        """
        if self.slots is None:
            return
        with self._slots_lock:
            others = (in_flight.asked.user for in_flight in self._in_flight.values())
            if any(other and other.fingerprint == user.fingerprint for other in others):
                self._forgotten.add(user.fingerprint)
            else:
                self._forgotten.discard(user.fingerprint)
                self.slots.forget(user)

    @torch.inference_mode()
    def step(self, most: int = 1) -> list[Token]:
        """Compute one step; the tokens it chose, and answers that ended without one.

        With ``most`` above 1 further ones follow, where they can, until an answer ends, a deadline
        is near, `interrupt` is set, or `MAX_SILENCE` would pass.

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
            for number, chosen in enumerate(self._run(plan, most)):
                if number > 0:
                    self.scheduler.repeat(plan)
                self.scheduler.computed(plan)
                for piece, result in zip(plan.pieces, chosen, strict=True):
                    if piece.writes:
                        tokens.append(self._publish(self._answers[piece.stream], result))
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
            InputError: a request that can never run, found before any has; or another call runs
                the engine, in another thread or around this one.
        """
        if not self.in_use.acquire(blocking=False):
            raise InputError(
                "another call runs this engine: wait for it, or give both to an AsyncEngine"
            )
        try:
            return self._generate_all(requests, on_token, on_finish)
        finally:
            self.in_use.release()

    def _generate_all(
        self,
        requests: Sequence[Request],
        on_token: Callable[[int, int], None] | None,
        on_finish: Callable[[int, int, Completion], None] | None,
    ) -> list[list[Completion]]:
        numbers: dict[int, int] = {}
        gathered = [Gathering(request) for request in requests]
        num_left = len(requests)
        try:
            for index, request in enumerate(requests):
                try:
                    numbers[self.add(request)] = index
                except InputError as error:
                    raise InputError(f"request {index}: {error}") from error
            while num_left:
                for event in self.step(self.max_steps):
                    if event.request not in numbers:  # somebody else's
                        continue
                    index = numbers[event.request]
                    gathering = gathered[index]
                    gathering.take(event)
                    num_left -= gathering.done
                    if on_token is not None and event.token >= 0:
                        on_token(index, event.token)
                    if on_finish is not None and event.finish_reason is not None:
                        on_finish(index, event.answer, gathering.completion(event.answer))
        finally:
            for number in numbers:  # an exception or an interrupt: no page is lost
                self.abort(number)
        return [gathering.completions() for gathering in gathered]

    def _run(self, plan: Plan, most: int) -> list[list[Chosen]]:
        """Compute the plan's step, and up to ``most`` that follow it; for each of them and every
        piece what was chosen after its last token."""
        steps = self._num_steps(plan, min(most, self.runner.max_steps))
        self.cache.copy(plan.copies)
        rows = []
        for piece in plan.pieces:
            answer = self._answers[piece.stream]
            if answer.num_cached is None:
                answer.num_cached = piece.stream.num_cached
            if answer.slot is None:
                user = answer.asked.user
                answer.slot = 0
                if user is not None and self.slots is not None:
                    with self._slots_lock:
                        answer.slot = self.slots.acquire(user)
            rows.append(answer.row(piece, steps))
        seconds = min(MAX_SILENCE, self.scheduler.next_deadline - self._clock())
        results = self.runner.run(rows, steps, seconds)
        for piece, result in zip(plan.pieces, results[0], strict=True):
            if result.scores is not None:
                self._answers[piece.stream].take_scores(piece, result.scores)
        return results

    def _num_steps(self, plan: Plan, most: int) -> int:
        """How many steps may follow one another from the plan's."""
        if most > 1 and all(self._answers[p.stream].follows_itself for p in plan.pieces):
            return self.scheduler.look_ahead(plan, most)
        return 1

    def _publish(self, answer: Answer, chosen: Chosen) -> Token:
        """Add a token to an answer, and end it if that was the last."""
        sampling, stream, token = answer.asked.sampling, answer.stream, chosen.token
        if chosen.logprob != chosen.logprob:
            return self._fail(answer, "the model's log-probabilities are not numbers")
        prompt = answer.prompt_scores()
        is_first = answer.index == 0 and not stream.written
        answer.write(token)
        if is_first:
            self._fork(answer)
        if answer.edits is not None:
            answer.edits.accept(token)
            if answer.edits.error is not None:
                return self._fail(answer, answer.edits.error)
        may_stop = len(stream.written) >= sampling.min_tokens
        reason: FinishReason | None = None
        text = ""
        if token in answer.stop_tokens and may_stop:
            reason = "stop"
        elif answer.text is not None:
            text = answer.text.push(token, may_stop=may_stop)
            if answer.text.stopped:
                reason = "stop"
        if reason is None and answer.edits is not None and answer.edits.at_end:
            reason = "stop"
        if reason is None and len(stream.written) >= stream.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._drop(answer)
        return Token(
            answer.request,
            answer.index,
            token,
            chosen.logprob,
            reason,
            text,
            chosen.top,
            prompt,
            num_cached=answer.num_cached if is_first else None,
        )

    def _fork(self, first: Answer) -> None:
        """The prompt is computed: the other answers begin, on the same pages."""
        in_flight = self._in_flight[first.request]
        for index in range(1, first.asked.num_answers):
            answer = self._admission.answer(first.request, in_flight, index, first.stream)
            answer.stream.deadline = first.stream.deadline
            self.scheduler.add(answer.stream)
            self._keep(answer)

    def _keep(self, answer: Answer) -> None:
        self._in_flight[answer.request].answers[answer.index] = answer
        self._answers[answer.stream] = answer

    def _fail(self, answer: Answer, error: str) -> Token:
        """End an answer that cannot go on; the others of its request go on, or fail themselves."""
        if answer.index == 0 and not answer.stream.written:
            self._fork(answer)
        text = self._drop(answer)
        return Token(answer.request, answer.index, -1, 0.0, "error", text, error=error)

    def _end(self, answer: Answer, reason: FinishReason) -> list[Token]:
        """End an answer without a token, and those that were to begin when its prompt is read."""
        unread = answer.index == 0 and not answer.stream.written
        text = self._drop(answer)
        return [
            Token(answer.request, answer.index + extra, -1, 0.0, reason, text)
            for extra in range(answer.asked.num_answers if unread else 1)
        ]

    def _drop(self, answer: Answer) -> str:
        """An answer is over: its pages and its slot go back. What is left of its text."""
        self.scheduler.remove(answer.stream)
        self._give_back_slot(answer)
        del self._answers[answer.stream]
        request = self._in_flight[answer.request]
        del request.answers[answer.index]
        if not request.answers:
            user = request.asked.user
            with self._slots_lock:
                del self._in_flight[answer.request]
                if user is not None and user.fingerprint in self._forgotten:
                    self.forget(user)
        return "" if answer.text is None else answer.text.finish()

    def _give_back_slot(self, answer: Answer) -> None:
        if answer.slot and answer.asked.user is not None and self.slots is not None:
            with self._slots_lock:
                self.slots.release(answer.asked.user)
        answer.slot = None

    def _account(self) -> None:
        self.scheduler.check()
        assert set(self.scheduler.streams()) == set(self._answers), "a stream is nobody's"
        self.cache.poison(self.scheduler.pool.unused())
        if self.slots is not None:
            with self._slots_lock:
                self.slots.check()
                users = [in_flight.asked.user for in_flight in self._in_flight.values()]
                wanted = {user.fingerprint for user in users if user is not None}
                assert self._forgotten <= wanted, "weights of no request are to be forgotten"
