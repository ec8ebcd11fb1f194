"""The one exception the command line turns into a message instead of a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what was expected and what came."""
