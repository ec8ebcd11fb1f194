"""What can go wrong: `InputError` is what the command line turns into a message."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what was expected and what came."""


class OverloadedError(RuntimeError):
    """As many requests are in flight as may be; the same request may be welcome later."""


class EngineError(RuntimeError):
    """There is no answer, for no fault of the request: a step failed, say, or it was dropped."""
