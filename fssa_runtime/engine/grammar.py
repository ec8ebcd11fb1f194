"""Texts that obey a JSON schema, a regular expression or a grammar: which tokens may come next.

llguidance does the work; here are what it needs of a model, a cache of what it has compiled, and
its errors in words.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from ..errors import InputError

# Compiled grammars that are kept, the least recently wanted go first.
_MAX_KEPT = 64


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = np.zeros((1, -(-vocab_size // 32)), dtype=np.int32)

    def rule_out(self, logits: torch.Tensor) -> None:
        """Set the logits ``[V]`` of tokens that may not come next to minus infinity."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask, 0)
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")
        forbidden = torch.from_numpy(bits[: self._vocab_size] == 0)
        logits.masked_fill_(forbidden.to(logits.device), float("-inf"))

    def accept(self, token: int) -> str | None:
        """Go on by a token; what is wrong if the grammar has no such way, else None."""
        if self._matcher.consume_token(token):
            return None
        return f"the grammar cannot go on: {_first_line(self._matcher.get_error())}"

    @property
    def at_end(self) -> bool:
        """Whether nothing but an end may follow."""
        return self._matcher.is_stopped()


class Grammar:
    """A compiled grammar, which any number of answers begin with."""

    def __init__(self, compiled: Any, vocab_size: int) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size

    def matcher(self) -> Matcher:
        """A matcher at its beginning."""
        return Matcher(self._compiled.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles grammars for one model's tokens, and keeps them.

    Args:
        tokenizer: of the `tokenizers` library. vocab_size: columns of the logits.
        stop_tokens: tokens that may end a text.

    Safe to use from several threads: who asks for a grammar that another thread is compiling waits
    for that one, and for no other.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_tokens: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_tokens = sorted(stop_tokens)
        self._making_tokens = threading.Lock()
        self._tokens: Any = None
        self._lock = threading.Lock()  # of what is kept; nothing is compiled under it
        self._kept: OrderedDict[tuple[str, str], Future[Grammar]] = OrderedDict()

    def compiled(self, grammar: tuple[str, str]) -> Grammar:
        """A grammar, given as (kind, text).

        Raises:
            InputError: it cannot be compiled, and why.
        """
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
            else:
                mine = self._kept[grammar] = Future()
                if len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
        if found is not None:
            return found.result()
        try:
            mine.set_result(self._compile(*grammar))
        except BaseException as error:
            mine.set_exception(error)
            with self._lock:
                if self._kept.get(grammar) is mine:
                    del self._kept[grammar]
        return mine.result()

    def _compile(self, kind: str, text: str) -> Grammar:
        from llguidance import LLMatcher, LLTokenizer

        with self._making_tokens:
            if self._tokens is None:  # takes about a second: not before it is wanted
                copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
                copy.no_padding()
                copy.no_truncation()
                self._tokens = LLTokenizer(
                    copy.to_str(), n_vocab=self._vocab_size, eos_token=self._stop_tokens
                )
        make: dict[str, Callable[[str], str]] = {
            "json_schema": LLMatcher.grammar_from_json_schema,
            "regex": LLMatcher.grammar_from_regex,
            "lark": LLMatcher.grammar_from_lark,
        }
        try:
            grammar = make[kind](text)
            is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        except ValueError as error:
            raise InputError(f"{kind}: {_first_line(str(error))}") from error
        if is_wrong:
            raise InputError(f"{kind}: {_first_line(messages[0])}")
        # Errors are ours to report: by itself it writes them to standard error, too.
        return Grammar(LLMatcher(self._tokens, grammar, log_level=0), self._vocab_size)


def _first_line(message: str) -> str:
    return (message.strip().splitlines() or ["unknown error"])[0]
