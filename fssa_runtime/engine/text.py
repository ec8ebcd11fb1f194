"""The text of an answer as its tokens come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Text of one answer, given out as soon as nothing that may follow can change it.

    A token may hold part of a character, or the beginning of what turns out to be a stop string:
    such text is held back until it is certain. What was given out, put together, is the text of all
    tokens as the tokenizer decodes them at once, special tokens left out, up to the first stop
    string.

    Args:
        tokenizer: of the `tokenizers` library.
        stop: strings that end the text.

    Attributes:
        stopped: whether one of them came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._tokens: list[int] = []
        self._num_decoded = 0  # characters that came out of the decoder
        self._held = ""

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; the text that is certain now. ``may_stop``: whether a string may end it."""
        self._tokens.append(token)
        decoded = self._decoder.step(self._tokenizer, token) or ""
        self._num_decoded += len(decoded)
        return self._settle(decoded, may_stop)

    def finish(self) -> str:
        """What is left when no token follows. An incomplete character is a replacement sign."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        held, self._held = self._held + whole[self._num_decoded :], ""
        return held

    def _settle(self, decoded: str, may_stop: bool) -> str:
        text = self._held + decoded
        if may_stop:
            found = [start for start in map(text.find, self._stop) if start >= 0]
            if found:
                self.stopped, self._held = True, ""
                return text[: min(found)]
        split = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[split:]
        return text[:split]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string, not complete, may have begun with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
