"""People with names, choices and, where it is known, the hidden taste they chose by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..conditioning.choices import Choice
from ..errors import InputError


@dataclass(frozen=True)
class ExampleUser:
    """``choices`` is all that steers; ``weights`` are only for judging the result."""

    name: str
    choices: tuple[Choice, ...]
    weights: dict[str, float] = field(default_factory=dict)


def read_users(path: Path) -> list[ExampleUser]:
    """A JSON list of ``{"name", "choices": [{"prompt", "chosen", "rejected"}], "weights"?}``;
    ``rejected`` may be a list of texts.

    Raises:
        InputError: missing or damaged file, a field missing, the same name twice.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"users {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"users {path}: not JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise InputError(f"users {path}: expected a list of at least one user")
    users = []
    for number, record in enumerate(records):
        try:
            choices = tuple(
                Choice(str(c["prompt"]), str(c["chosen"]), _texts(c["rejected"]))
                for c in record["choices"]
            )
            weights = {str(k): float(v) for k, v in record.get("weights", {}).items()}
            users.append(ExampleUser(str(record["name"]), choices, weights))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"users {path}: user {number}: {error!r}") from error
    if len({user.name for user in users}) != len(users):
        raise InputError(f"users {path}: a name occurs twice")
    return users


def _texts(value: object) -> str | tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else str(value)


def write_users(users: Sequence[ExampleUser], path: Path) -> None:
    """What `read_users` reads."""
    records = [
        {
            "name": user.name,
            "weights": user.weights,
            "choices": [choice._asdict() for choice in user.choices],
        }
        for user in users
    ]
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
