"""What the engine makes of a request before it runs: whether it ever can, and its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import InputError
from ..models.decoder import Decoder
from ..request import Request
from .answer import Answer, InFlight
from .edits import Edits
from .grammar import Grammar, Grammars
from .kv_cache import KVCache
from .slots import SlotCache
from .stream import Stream
from .text import Detokenizer


class Admission:
    """Checks requests, which any thread may ask for, and makes their answers.

    Args:
        decoder, cache: what requests have to fit.
        stop_tokens: tokens that end an answer.
        slots: None if nobody is modulated.
        tokenizer: of the `tokenizers` library; None for no text.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        stop_tokens: frozenset[int],
        slots: SlotCache | None,
        tokenizer: Any,
        clock: Callable[[], float],
    ) -> None:
        config = decoder.config
        self._vocab_size = config.vocab_size
        # The last token is written but never computed.
        self._max_length = min(config.max_positions, cache.num_pages * cache.page_size + 1)
        self._stop_tokens = stop_tokens
        self._slots = slots
        self._detokenizer: Detokenizer | None = None
        self._grammars: Grammars | None = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(tokenizer)
            self._grammars = Grammars(tokenizer, config.vocab_size, stop_tokens)
        self._clock = clock

    def check(self, request: Request) -> None:
        """Raise InputError for what this engine cannot do."""
        request.check_tokens(self._vocab_size)
        if request.user is not None:
            if self._slots is None:
                raise InputError("the request is a user's, but the engine has no modulation")
            self._slots.check_weights(request.user)
        if self._grammars is None and (request.sampling.stop or request.sampling.grammar):
            raise InputError("stop strings and grammars need an engine with a tokenizer")

    def grammar(self, request: Request) -> Grammar | None:
        """The request's grammar, compiled, if it has one."""
        asked = request.sampling.grammar
        return None if asked is None or self._grammars is None else self._grammars.compiled(asked)

    def room_after(self, num_tokens: int) -> int:
        """Tokens of an answer that fit after a prompt of so many; below 1 if none does."""
        return self._max_length - num_tokens

    def stream(self, request: Request, parent: Stream | None = None) -> Stream:
        """What the scheduler knows of one answer, of the first one where there is no ``parent``."""
        fingerprint = b"" if request.user is None else request.user.fingerprint
        return Stream(
            request.prompt_tokens,
            self._max_new(request),
            fingerprint=fingerprint,
            tenant=fingerprint if request.tenant is None else request.tenant,
            priority=request.priority,
            deadline=None if request.timeout is None else self._clock() + request.timeout,
            parent=parent,
            # Scores of cached tokens are not kept: their logits are made again.
            finds=request.sampling.prompt_logprobs is None,
        )

    def answer(
        self, number: int, in_flight: InFlight, index: int, parent: Stream | None = None
    ) -> Answer:
        """Answer ``index`` to the request of that number, before its first token."""
        request, grammar = in_flight.asked, in_flight.grammar
        sampling = request.sampling
        stop_tokens = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_tokens |= self._stop_tokens
        edits = text = None
        if request.forced_tokens is not None:
            stop_tokens = frozenset()
        elif sampling.edits_logits:
            matcher = None if grammar is None else grammar.matcher()
            edits = Edits(sampling, request.prompt_tokens, stop_tokens, matcher)
        if self._detokenizer is not None:
            text = self._detokenizer.stream(sampling.stop)
        stream = self.stream(request, parent)
        return Answer(number, index, request, stream, stop_tokens, edits, text)

    def _max_new(self, request: Request) -> int:
        if request.forced_tokens is not None:
            return len(request.forced_tokens)
        if request.sampling.max_tokens is not None:
            return request.sampling.max_tokens
        return max(1, self.room_after(len(request.prompt_tokens)))
