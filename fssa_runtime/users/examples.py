"""People with names, choices and, where it is known, the hidden taste they chose by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from ..conditioning.choices import Choice, checked_choices
from ..errors import InputError
from ..models.messages import Content, chat_messages


@dataclass(frozen=True)
class ExampleUser:
    """``choices`` is all that steers; ``weights`` are only for judging the result."""

    name: str
    choices: tuple[Choice, ...]
    weights: dict[str, float] = field(default_factory=dict)


def read_users(path: Path) -> list[ExampleUser]:
    """A JSON list of ``{"name", "choices": [{"prompt", "chosen", "rejected"}], "weights"?}``;
    texts may be chat messages, and ``rejected`` a list of answers.

    Raises:
        InputError: missing or damaged file, a field missing or of another kind, a choice as
            `checked_choices` refuses it, the same name twice.
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
            choices = checked_choices(record["choices"])
            weights = {str(k): float(v) for k, v in record.get("weights", {}).items()}
            users.append(ExampleUser(_name(record["name"]), choices, weights))
        except InputError as error:
            raise InputError(f"users {path}: user {number}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"users {path}: user {number}: {error!r}") from error
    if len({user.name for user in users}) != len(users):
        raise InputError(f"users {path}: a name occurs twice")
    return users


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"name: expected text, got {shortened(value)}")
    return value


def write_users(users: Sequence[ExampleUser], path: Path) -> None:
    """What `read_users` reads."""
    records = [
        {
            "name": user.name,
            "weights": user.weights,
            "choices": [_record(choice) for choice in user.choices],
        }
        for user in users
    ]
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _record(choice: Choice) -> dict[str, Any]:
    rejected = [_written(answer) for answer in choice.all_rejected]
    return {
        "prompt": _written(choice.prompt),
        "chosen": _written(choice.chosen),
        "rejected": rejected[0] if len(rejected) == 1 else rejected,
    }


def _written(content: Content) -> Content:
    """Messages as objects: JSON has no pairs that could be told from a list of two texts."""
    return content if isinstance(content, str) else chat_messages("content", content, "user")
