"""Continuous batching: many requests, each of its own user, one step of the model at a time.

``schedule`` admits waiting requests while rows and pages last; ``_run`` computes every running
request's new tokens (a whole prompt, or one token) in one pass of the model; ``_publish`` chooses
the next tokens and retires what is finished. Prompts and single tokens share a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..conditioning.modulation import Modulation
from ..errors import InputError
from ..models.attention import PagedAttention
from ..models.decoder import Decoder
from ..request import Completion, FinishReason, Request
from .kv_cache import KVCache
from .sampler import choose


@dataclass
class _Running:
    """A request in flight. ``num_computed`` of its tokens have keys and values in the cache."""

    index: int
    request: Request
    pages: list[int]
    generator: torch.Generator | None
    num_computed: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def pending(self) -> list[int]:
        """Tokens not computed yet: the prompt at first, then the last token chosen."""
        return list(self.request.prompt_tokens) if self.num_computed == 0 else self.tokens[-1:]


class Engine:
    """Runs requests on a decoder.

    Args:
        decoder: the frozen model.
        stop_tokens: tokens that end an answer.
        max_batch_size: requests in flight at most.
        max_batch_tokens: tokens of one step at most; a longer prompt runs in a step of its own.
        max_kv_tokens: tokens the key-value cache holds.
        page_size: tokens of a page, P.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop_tokens: frozenset[int],
        *,
        max_batch_size: int = 32,
        max_batch_tokens: int = 2048,
        max_kv_tokens: int = 16384,
        page_size: int = 16,
    ) -> None:
        self.decoder = decoder
        self.stop_tokens = stop_tokens
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.cache = KVCache(
            decoder.config, -(-max_kv_tokens // page_size), page_size, decoder.dtype, decoder.device
        )

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        modulation: Modulation | None = None,
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
            self._check(index, request, modulation)
        waiting = deque(enumerate(requests))
        running: list[_Running] = []
        done: dict[int, Completion] = {}
        try:
            while waiting or running:
                self._schedule(waiting, running)
                logits = self._run(running, modulation)
                for state, row in zip(list(running), logits, strict=True):
                    completion = self._publish(state, row)
                    if on_token is not None:
                        on_token(state.index, state.tokens[-1])
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

    def _check(self, index: int, request: Request, modulation: Modulation | None) -> None:
        where = f"request {index}"
        if not request.prompt_tokens:
            raise InputError(f"{where}: the prompt is empty")
        vocab_size = self.decoder.config.vocab_size
        if not all(0 <= token < vocab_size for token in request.prompt_tokens):
            raise InputError(f"{where}: prompt tokens must be in 0..{vocab_size - 1}")
        if request.forced_tokens is not None and not request.forced_tokens:
            raise InputError(f"{where}: forced_tokens must be None or hold at least one token")
        if request.slot and modulation is None:
            raise InputError(f"{where}: slot {request.slot} but no modulation was given")
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
        """Admit in order of arrival while there are rows, step tokens and pages."""
        budget = self.max_batch_tokens - len(running)
        while waiting and len(running) < self.max_batch_size:
            index, request = waiting[0]
            fits = len(request.prompt_tokens) <= budget
            if not fits and running:
                return
            pages = self.cache.allocate(len(request.prompt_tokens) + self._max_new(request))
            if pages is None:
                return
            waiting.popleft()
            generator = None
            if request.sampling.temperature > 0:
                generator = torch.Generator()
                seed = request.sampling.seed
                generator.manual_seed(seed) if seed is not None else generator.seed()
            running.append(_Running(index, request, pages, generator))
            budget -= len(request.prompt_tokens)
            if budget <= 0:
                return

    def _run(self, running: list[_Running], modulation: Modulation | None) -> torch.Tensor:
        """Logits ``[len(running), V]`` (float32, host) of every running request's next token."""
        device, page_size = self.decoder.device, self.cache.page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        kv_slots: list[int] = []
        kv_lens: list[int] = []
        q_indptr = [0]
        for state in running:
            pending = state.pending()
            span = range(state.num_computed, state.num_computed + len(pending))
            tokens += pending
            positions += span
            slots += [state.request.slot] * len(pending)
            kv_slots += [state.pages[p // page_size] * page_size + p % page_size for p in span]
            state.num_computed = span.stop
            kv_lens.append(span.stop)
            q_indptr.append(len(tokens))
        width = max(len(state.pages) for state in running)
        tables = [state.pages + [0] * (width - len(state.pages)) for state in running]

        def ints(values: list[int] | list[list[int]]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        attention = PagedAttention(
            self.cache.k,
            self.cache.v,
            ints(kv_slots),
            ints(tables),
            ints(kv_lens),
            ints(q_indptr),
        )
        step = None if modulation is None else modulation.with_slots(ints(slots))
        hidden = self.decoder(ints(tokens), ints(positions), attention, step)
        last = torch.tensor(q_indptr[1:], device=device) - 1
        return self.decoder.logits(hidden[last]).float().cpu()

    def _publish(self, state: _Running, logits: torch.Tensor) -> Completion | None:
        """Add a token to ``state``; its completion if that was the last."""
        request = state.request
        if request.forced_tokens is not None:
            token = request.forced_tokens[len(state.tokens)]
        else:
            token = choose(logits, request.sampling, state.generator)
        state.tokens.append(token)
        state.logprobs.append(float(logits[token] - logits.logsumexp(-1)))
        reason: FinishReason
        if request.forced_tokens is None and token in self.stop_tokens:
            reason = "stop"
        elif len(state.tokens) == self._max_new(request):
            reason = "length"
        else:
            return None
        return Completion(state.tokens, state.logprobs, reason)
