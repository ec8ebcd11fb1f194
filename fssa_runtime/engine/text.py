"""The text of an answer as its tokens come, and the strings that end it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

# A byte-level vocabulary writes each byte as a character: itself where it can be seen, and one from
# 256 on where not (spaces, control characters, halves of others).
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_NUMBERS = count(256)
_BYTE_OF_CHARACTER = {chr(byte if byte in _SEEN else next(_NUMBERS)): byte for byte in range(256)}


class _Decoder(Protocol):
    """Characters of one text, token by token."""

    def push(self, token: int) -> str:
        """Add a token; characters that are complete now."""

    def finish(self) -> str:
        """What is left when no token follows."""


class Detokenizer:
    """Makes the `TextStream` of every answer.

    Args:
        tokenizer: of the `tokenizers` library, used by this only.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import decoders

        self._tokenizer = tokenizer
        self._is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._bytes: dict[int, bytes] = {}

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """The text of a new answer, which strings may end."""
        decoder = _Bytes(self) if self._is_bytes else _Any(self._tokenizer)
        return TextStream(decoder, stop)

    def bytes_of(self, token: int) -> bytes:
        """What a token of a byte-level vocabulary stands for; special ones for nothing."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._look_up(token)
        return known

    def _look_up(self, token: int) -> bytes:
        written = self._tokenizer.id_to_token(token)
        added = self._tokenizer.get_added_tokens_decoder().get(token)
        if written is None or (added is not None and added.special):
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in written)
        except KeyError:  # added to the vocabulary as it is
            return written.encode()


class _Bytes:
    """Of a byte-level vocabulary, where tokens are bytes and nothing depends on their neighbours.

    Every token of every answer comes through here: a dictionary and the standard library's decoder
    do less than `_Any`, which decodes some tokens anew each time.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._bytes_of = detokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Any:
    """Of any vocabulary. Bytes that are no characters may come out otherwise than all at once: what
    such a byte makes of those before it, which have been given out, is left out."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._num_given = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        self._num_given += len(text)
        return text

    def finish(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)[self._num_given :]


class TextStream:
    """Text of one answer, given out as soon as nothing that may follow can change it.

    A token may hold part of a character, or the beginning of what turns out to be a stop string:
    such text is held back until it is certain. What was given out, put together, is the text of all
    tokens as the tokenizer decodes them at once, special tokens left out, up to the first stop
    string.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, decoder: _Decoder, stop: Sequence[str]) -> None:
        self.stopped = False
        self._decoder = decoder
        self._stop = stop
        self._held = ""

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; the text that is certain now. ``may_stop``: whether a string may end it."""
        text = self._decoder.push(token)
        return self._settle(self._held + text, may_stop) if self._stop else text

    def finish(self) -> str:
        """What is left when no token follows. An incomplete character is a replacement sign."""
        return "" if self.stopped else self._held + self._decoder.finish()

    def _settle(self, text: str, may_stop: bool) -> str:
        if may_stop:
            found = [start for start in map(text.find, self._stop) if start >= 0]
            if found:
                self.stopped = True
                return text[: min(found)]
        split = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[split:]
        return text[:split]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string, not complete, may have begun with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
