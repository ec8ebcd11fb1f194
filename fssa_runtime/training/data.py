"""Preference data: JSON lines → checked records, grouped by user, split by prompt and by user.

One JSON object a line, in the format people already have for preference tuning, plus `user`:

    {"user": "u17", "prompt": "...", "chosen": "...", "rejected": "..."}

`prompt`, `chosen` and `rejected` are all text or all lists of chat messages
(`{"role": ..., "content": ...}`). `user` is text or an integer. An optional `mode` names the
user's hidden group where it is known; it is read by evaluation only. Other fields are ignored.
Files may be gzip-compressed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

ROLES = ("system", "user", "assistant", "tool")


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


Content = str | tuple[Message, ...]


class PreferenceError(ValueError):
    """A line of a preference file is not what it should be; the text says where and why."""


@dataclass(frozen=True)
class Preference:
    """`user` preferred `chosen` to `rejected` as the answer to `prompt`."""

    user: str
    prompt: Content
    chosen: Content
    rejected: Content
    mode: str = ""


@dataclass(frozen=True)
class PreferenceData:
    """N preferences; a preference is referred to by its row 0..N-1 everywhere else."""

    preferences: tuple[Preference, ...]

    def __len__(self) -> int:
        return len(self.preferences)

    @cached_property
    def rows_by_user(self) -> Mapping[str, np.ndarray]:
        """Rows of every user, int64, users in order of first appearance."""
        rows: dict[str, list[int]] = {}
        for row, preference in enumerate(self.preferences):
            rows.setdefault(preference.user, []).append(row)
        return {user: np.asarray(found, dtype=np.int64) for user, found in rows.items()}

    @cached_property
    def prompt_ids(self) -> np.ndarray:
        """[N] int64: equal numbers for equal prompts, numbered by first appearance."""
        ids: dict[Content, int] = {}
        found = [ids.setdefault(p.prompt, len(ids)) for p in self.preferences]
        return np.asarray(found, dtype=np.int64)

    @cached_property
    def mode_of_user(self) -> Mapping[str, str]:
        """Hidden group of every user, "" where the data does not say."""
        return {p.user: p.mode for p in self.preferences}


@dataclass(frozen=True)
class Split:
    """Rows of the four quarters of (user held out?) × (prompt held out?), each int64.

    `heldout` shares neither a user nor a prompt with `train`. The two mixed quarters are in
    neither; they show which of the two a drop in quality comes from.
    """

    train: np.ndarray
    heldout: np.ndarray
    known_users_new_prompts: np.ndarray
    new_users_known_prompts: np.ndarray


def as_messages(prompt: Content, completion: Content) -> list[dict[str, str]]:
    """The option [prompt, completion] as chat messages; text becomes a user and an answer turn."""
    before = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    after = (Message("assistant", completion),) if isinstance(completion, str) else completion
    return [{"role": m.role, "content": m.content} for m in (*before, *after)]


def iter_preferences(path: str | Path) -> Iterator[Preference]:
    """Checked preferences of one file, line by line; blank lines are skipped.

    Raises PreferenceError, naming file, line, field, what was expected and what came; and
    FileNotFoundError for a missing file.
    """
    for _, preference in _numbered_preferences(Path(path)):
        yield preference


def read_preferences(paths: str | Path | Sequence[str | Path]) -> PreferenceData:
    """All preferences of one or several files; errors as for `iter_preferences`.

    Also an error: no preference at all, or a user whose `mode` is not the same on every line.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    preferences: list[Preference] = []
    mode_first_seen: dict[str, tuple[str, str]] = {}
    for file in files:
        for number, preference in _numbered_preferences(Path(file)):
            where = f"{file}:{number}"
            mode, seen = mode_first_seen.setdefault(preference.user, (preference.mode, where))
            if mode != preference.mode:
                raise PreferenceError(
                    f"{where}: field 'mode': expected {mode!r} for user {preference.user!r} "
                    f"as at {seen}, got {preference.mode!r}"
                )
            preferences.append(preference)
    if not preferences:
        named = ", ".join(str(file) for file in files)
        raise PreferenceError(f"{named}: expected at least one preference, got none")
    return PreferenceData(tuple(preferences))


def split_preferences(
    data: PreferenceData, *, heldout_users: float, heldout_prompts: float, seed: int
) -> Split:
    """Hold out a share of the users and a share of the prompts.

    heldout_users, heldout_prompts: shares in (0, 1), rounded up to whole users of every mode (so
    every mode is represented) and whole prompts. Training is what has neither a held-out user
    nor a held-out prompt, evaluation what has both. Deterministic from `seed`, independent of the
    order of the lines. ValueError when a share is out of range or leaves a side empty.
    """
    for name, share in (("heldout_users", heldout_users), ("heldout_prompts", heldout_prompts)):
        if not 0 < share < 1:
            raise ValueError(f"{name}: expected a share between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    users_of_mode: dict[str, list[str]] = {}
    for user in sorted(data.rows_by_user):
        users_of_mode.setdefault(data.mode_of_user[user], []).append(user)
    new_users: set[str] = set()
    for mode in sorted(users_of_mode):
        new_users.update(_draw(users_of_mode[mode], heldout_users, rng))
    prompts = sorted({p.prompt for p in data.preferences}, key=repr)
    new_prompts = set(_draw(prompts, heldout_prompts, rng))

    user_is_new = np.asarray([p.user in new_users for p in data.preferences])
    prompt_is_new = np.asarray([p.prompt in new_prompts for p in data.preferences])
    split = Split(
        train=np.flatnonzero(~user_is_new & ~prompt_is_new),
        heldout=np.flatnonzero(user_is_new & prompt_is_new),
        known_users_new_prompts=np.flatnonzero(~user_is_new & prompt_is_new),
        new_users_known_prompts=np.flatnonzero(user_is_new & ~prompt_is_new),
    )
    for name, rows in (("train", split.train), ("heldout", split.heldout)):
        if not len(rows):
            raise ValueError(
                f"{name}: expected at least one preference after the split, got none of "
                f"{len(data)} ({len(new_users)} of {len(data.rows_by_user)} users and "
                f"{len(new_prompts)} of {len(prompts)} prompts held out)"
            )
    return split


def _draw(items: Sequence[Any], share: float, rng: np.random.Generator) -> list[Any]:
    count = int(np.ceil(share * len(items)))
    return [items[i] for i in rng.permutation(len(items))[:count]]


def _numbered_preferences(path: Path) -> Iterator[tuple[int, Preference]]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile) as error:
        raise PreferenceError(
            f"{path}: expected a complete gzip file, got an error after line {number}: {error}"
        ) from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        magic = file.read(2)
    # By content, not by name: downloads often lose or keep a .gz ending wrongly.
    return cast(BinaryIO, gzip.open(path)) if magic == b"\x1f\x8b" else path.open("rb")


def _parse(line: bytes, where: str) -> Preference:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise PreferenceError(f"{where}: expected UTF-8 text, got {error}") from None
    except json.JSONDecodeError as error:
        raise PreferenceError(
            f"{where}: expected one JSON object, got invalid JSON ({error.msg}, "
            f"column {error.colno})"
        ) from None
    if not isinstance(record, dict):
        raise PreferenceError(f"{where}: expected one JSON object, got {_kind(record)}")
    for field in ("user", "prompt", "chosen", "rejected"):
        if field not in record:
            present = ", ".join(sorted(map(repr, record))) or "none"
            raise PreferenceError(f"{where}: field {field!r}: expected, but fields are {present}")

    user = record["user"]
    if isinstance(user, bool) or not isinstance(user, str | int) or user == "":
        raise PreferenceError(
            f"{where}: field 'user': expected non-empty text or an integer, got {_kind(user)}"
        )
    mode = record.get("mode", "")
    if not isinstance(mode, str):
        raise PreferenceError(f"{where}: field 'mode': expected text, got {_kind(mode)}")
    prompt, chosen, rejected = (
        _content(record[field], f"{where}: field {field!r}")
        for field in ("prompt", "chosen", "rejected")
    )
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, str) != isinstance(prompt, str):
            raise PreferenceError(
                f"{where}: field {field!r}: expected {_kind(record['prompt'])} like 'prompt', "
                f"got {_kind(record[field])}"
            )
    if chosen == rejected:
        raise PreferenceError(
            f"{where}: fields 'chosen' and 'rejected': expected two different answers, got the "
            "same twice (no preference; remove the line)"
        )
    return Preference(str(user), prompt, chosen, rejected, mode)


def _content(value: Any, where: str) -> Content:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PreferenceError(f"{where}: expected text or a list of messages, got {_kind(value)}")
    if not value:
        raise PreferenceError(f"{where}: expected at least one message, got an empty list")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise PreferenceError(
                f"{where}: message {i}: expected an object with 'role' and 'content', "
                f"got {_kind(item)}"
            )
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise PreferenceError(
                f"{where}: message {i}: field 'role': expected one of {', '.join(ROLES)}, "
                f"got {role!r}"
            )
        if not isinstance(content, str):
            raise PreferenceError(
                f"{where}: message {i}: field 'content': expected text, got {_kind(content)}"
            )
        messages.append(Message(role, content))
    return tuple(messages)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == "":
        return "empty text"
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), f"a number ({value})")
