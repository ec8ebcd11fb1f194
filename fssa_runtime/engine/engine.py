"""Continuous batching: many requests, each of its own user, one step of the model at a time.

``_schedule`` admits waiting requests while rows and pages last; ``_step`` gives every running
request its next tokens to compute (a piece of its prompt, or one token) and runs them together;
``_publish`` keeps the chosen tokens and retires what is finished. Prompts and single tokens share
a step.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..conditioning.modulation import Modulation
from ..errors import InputError
from ..models.decoder import Decoder
from ..request import Completion, FinishReason, Request
from .kv_cache import KVCache
from .runner import Runner
from .step_inputs import Row


@dataclass
class _Running:
    """A request in flight. ``num_computed`` of its tokens have keys and values in the cache."""

    index: int
    request: Request
    pages: list[int]
    draws: random.Random
    num_computed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def in_prompt(self) -> bool:
        return self.num_computed < len(self.request.prompt_tokens)

    def row(self, budget: int) -> Row:
        """What it computes next: at most ``budget`` tokens of its prompt, or the newest one."""
        request = self.request
        tokens = self.tokens[-1:]
        if self.in_prompt:
            tokens = list(request.prompt_tokens[self.num_computed : self.num_computed + budget])
        forced, uniform = -1, 0.0
        ends = self.num_computed + len(tokens) >= len(request.prompt_tokens)
        if ends and request.forced_tokens is not None:
            forced = request.forced_tokens[len(self.tokens)]
        elif ends and request.sampling.temperature > 0:
            uniform = self.draws.random()
        return Row(
            tokens,
            self.num_computed,
            self.pages,
            request.slot,
            request.sampling,
            # In float32 a number just below 1 would become 1, which no sum passes.
            min(uniform, 1 - 2**-24),
            forced,
        )


class Engine:
    """Runs requests on a decoder.

    Args:
        decoder: the frozen model; its weights are packed for the native kernels where it can be
            (`Decoder.pack`), after which it has no gradients.
        stop_tokens: tokens that end an answer.
        modulation: what the slots of requests refer to; None if all are 0.
        max_batch_size: requests in flight at most.
        max_batch_tokens: tokens of one step at most; longer prompts are computed in pieces.
        max_kv_tokens: tokens the key-value cache holds.
        page_size: tokens of a page, P.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop_tokens: frozenset[int],
        modulation: Modulation | None = None,
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 512,
        max_kv_tokens: int = 16384,
        page_size: int = 16,
    ) -> None:
        if max_batch_tokens < max_batch_size:
            raise ValueError(
                f"max_batch_tokens: expected at least max_batch_size = {max_batch_size}, "
                f"got {max_batch_tokens}"
            )
        self.decoder = decoder
        self.stop_tokens = stop_tokens
        self.modulation = modulation
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.cache = KVCache(
            decoder.config, -(-max_kv_tokens // page_size), page_size, decoder.dtype, decoder.device
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

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_token: Callable[[int, int], None] | None = None,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Answer all requests; the result is in their order.

        ``on_token(request index, token)`` and ``on_finish(request index, completion)`` are called
        as the work goes on.

        Raises:
            InputError: a request that can never run, found before any has.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        waiting = deque(enumerate(requests))
        running: list[_Running] = []
        done: dict[int, Completion] = {}
        try:
            while waiting or running:
                self._schedule(waiting, running)
                for state, token, logprob in self._step(running):
                    completion = self._publish(state, token, logprob)
                    if on_token is not None:
                        on_token(state.index, token)
                    if completion is not None:
                        running.remove(state)
                        self.cache.free(state.pages)
                        done[state.index] = completion
                        if on_finish is not None:
                            on_finish(state.index, completion)
        finally:
            for state in running:  # an exception or an interrupt: no page is lost
                self.cache.free(state.pages)
        return [done[index] for index in range(len(requests))]

    def _check(self, index: int, request: Request) -> None:
        where = f"request {index}"
        if not request.prompt_tokens:
            raise InputError(f"{where}: the prompt is empty")
        vocab_size = self.decoder.config.vocab_size
        if not all(0 <= token < vocab_size for token in request.prompt_tokens):
            raise InputError(f"{where}: prompt tokens must be in 0..{vocab_size - 1}")
        if request.forced_tokens is not None:
            if not request.forced_tokens:
                raise InputError(f"{where}: forced_tokens must be None or hold at least one token")
            if not all(0 <= token < vocab_size for token in request.forced_tokens):
                raise InputError(f"{where}: forced tokens must be in 0..{vocab_size - 1}")
        if request.slot and self.modulation is None:
            raise InputError(f"{where}: slot {request.slot} but the engine has no modulation")
        total = len(request.prompt_tokens) + self._max_new(request)
        if total > self.decoder.config.max_positions:
            raise InputError(
                f"{where}: prompt and answer need {total} positions, "
                f"the model has {self.decoder.config.max_positions}"
            )
        if self.cache.pages_for(total) > self.cache.num_pages:
            raise InputError(
                f"{where}: prompt and answer need {total} tokens of cache, "
                f"it holds {self.cache.num_pages * self.cache.page_size}"
            )

    @staticmethod
    def _max_new(request: Request) -> int:
        if request.forced_tokens is not None:
            return len(request.forced_tokens)
        return request.sampling.max_tokens

    def _schedule(self, waiting: deque[tuple[int, Request]], running: list[_Running]) -> None:
        """Admit in order of arrival while there are rows and pages."""
        while waiting and len(running) < self.max_batch_size:
            index, request = waiting[0]
            pages = self.cache.allocate(len(request.prompt_tokens) + self._max_new(request))
            if pages is None:
                return
            waiting.popleft()
            running.append(_Running(index, request, pages, random.Random(request.sampling.seed)))

    def _step(self, running: Sequence[_Running]) -> list[tuple[_Running, int, float]]:
        """Compute one step; (request, token, log-probability) where a token was chosen."""
        # Every request in flight gets a token first; what is left goes to prompts in order.
        budget = self.max_batch_tokens - len(running)
        rows = []
        for state in running:
            row = state.row(1 + budget)
            budget -= len(row.tokens) - 1
            rows.append(row)
        tokens, logprobs = self.runner.run(rows)
        chosen = []
        for state, row, token, logprob in zip(running, rows, tokens, logprobs, strict=True):
            state.num_computed += len(row.tokens)
            if not state.in_prompt:
                chosen.append((state, token, logprob))
        return chosen

    def _publish(self, state: _Running, token: int, logprob: float) -> Completion | None:
        """Add a token to ``state``; its completion if that was the last."""
        request = state.request
        state.tokens.append(token)
        state.logprobs.append(logprob)
        reason: FinishReason
        if request.forced_tokens is None and token in self.stop_tokens:
            reason = "stop"
        elif len(state.tokens) == self._max_new(request):
            reason = "length"
        else:
            return None
        return Completion(state.tokens, state.logprobs, reason)
