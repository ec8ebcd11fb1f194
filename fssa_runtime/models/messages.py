"""Text or chat messages, as callers give them, and what a chat template is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any

from ..errors import InputError

# Text, or chat messages: mappings with role and content, or (role, content) pairs.
Content = str | Sequence[Any]


def is_chat(value: object) -> bool:
    """Whether this is a list of chat messages: objects with role and content, or such pairs."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(map(_is_message, value))
    )


def chat_messages(name: str, content: Content, role: str) -> list[dict[str, Any]]:
    """Chat messages with text as content; text alone is one message of ``role``.

    A content in parts, ``[{"type": "text", "text": "…"}]``, is these texts put together. What else
    a message holds is kept.

    Raises:
        InputError: neither text nor chat messages, named by ``name``.
    """
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not is_chat(content):
        raise InputError(
            f"{name}: expected text or chat messages, got {shortened(content)}; messages are a "
            "list of objects with role and content, or of such pairs"
        )
    return [_message(f"{name}: message {place}", each) for place, each in enumerate(content)]


def _is_message(value: object) -> bool:
    if isinstance(value, Mapping):
        return {"role", "content"} <= value.keys()
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _message(name: str, given: Any) -> dict[str, Any]:
    if isinstance(given, tuple):
        return dict(zip(("role", "content"), given, strict=True))
    role, content = given["role"], given["content"]
    if not isinstance(role, str):
        raise InputError(f"{name}: role: expected text, got {shortened(role)}")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InputError(f"{name}: content: expected text or parts of it, got {shortened(content)}")
    return {**given, "content": content}


def _is_text_part(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and value.get("type") == "text"
        and isinstance(value.get("text"), str)
    )
