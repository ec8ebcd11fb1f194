"""Whether a number that a caller gives is one, and of the right kind."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

from .errors import InputError


def require_int(name: str, value: object) -> None:
    """Raise InputError unless a value is an integer; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} must be an integer, got {type(value).__name__}")


def require_ints(name: str, values: Iterable[object]) -> None:
    """Raise InputError unless all values are integers, Python's or numpy's; a bool is none."""
    for kind in set(map(type, values)):  # by kind: a prompt has thousands of tokens
        if not issubclass(kind, Integral) or kind is bool:
            raise InputError(f"{name} must be integers, got {kind.__name__}")


def require_number(name: str, value: object) -> None:
    """Raise InputError unless a value is a real number, which may be infinite or NaN."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} must be a number, got {type(value).__name__}")
