"""Preference data: JSON lines → checked records, grouped by user, split by prompt and by user.

One JSON object a line, in the format people already have for preference tuning, plus `user`:

    {"user": "u17", "prompt": "...", "chosen": "...", "rejected": "..."}

`prompt`, `chosen` and `rejected` are all text or all lists of chat messages
(`{"role": ..., "content": ...}`). A choice among more than two has a list of such things as
`rejected`: one preferred to several. `user` is text or an integer. An optional `mode` names the
user's hidden group where it is known; it is read by evaluation only. Other fields are ignored.
Files may be gzip-compressed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fssa_runtime.training.records import (
    PreferenceError,
    describe,
    mode_of,
    need_fields,
    numbered_records,
    user_of,
)

# Of a prompt, in an error.
NAMED_CHARACTERS = 60
ROLES = ("system", "user", "assistant", "tool")


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


Content = str | tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """`user` preferred `chosen` to `rejected` as the answer to `prompt`; in a choice among several
    also to each of `also_rejected`."""

    user: str
    prompt: Content
    chosen: Content
    rejected: Content
    mode: str = ""
    also_rejected: tuple[Content, ...] = ()

    @property
    def all_rejected(self) -> tuple[Content, ...]:
        return (self.rejected, *self.also_rejected)


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
    def question_ids(self) -> np.ndarray:
        """[N] int64: equal numbers for the same prompt with the same options, whichever of them was
        chosen; numbered by first appearance."""
        ids: dict[tuple[Content, frozenset[Content]], int] = {}
        found = [
            ids.setdefault((p.prompt, frozenset((p.chosen, *p.all_rejected))), len(ids))
            for p in self.preferences
        ]
        return np.asarray(found, dtype=np.int64)

    def whose(self, prompt: Content, completion: Content) -> str:
        """Who first saw this option, and after which prompt: what an error calls it."""
        for p in self.preferences:
            if p.prompt == prompt and completion in (p.chosen, *p.all_rejected):
                asked = prompt if isinstance(prompt, str) else prompt[-1].content
                return f"an answer to {asked[:NAMED_CHARACTERS]!r}, seen by user {p.user!r}"
        raise KeyError((prompt, completion))

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


def read_preferences(
    paths: str | Path | Sequence[str | Path], *, pairs_only: bool = False
) -> PreferenceData:
    """All preferences of one or several files; errors as for `iter_preferences`.

    Also an error: no preference at all, a user whose `mode` is not the same on every line, and with
    `pairs_only` a choice among more than two.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    preferences: list[Preference] = []
    mode_first_seen: dict[str, tuple[str, str]] = {}
    for file in files:
        for number, preference in _numbered_preferences(Path(file)):
            where = f"{file}:{number}"
            if pairs_only and preference.also_rejected:
                raise PreferenceError(
                    f"{where}: field 'rejected': expected one answer, as only pairs can be used "
                    f"here, got {len(preference.all_rejected)}"
                )
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


def rows_of_mode(data: PreferenceData, rows: np.ndarray, mode: str | None) -> np.ndarray:
    """Those of the rows whose users are of this hidden group; all of them for None.

    ValueError when there is none.
    """
    if mode is None:
        return rows
    kept = rows[[data.preferences[row].mode == mode for row in rows]]
    if not len(kept):
        known = sorted(set(data.mode_of_user.values()))
        raise ValueError(f"data.mode: expected one of {known}, got {mode!r}")
    return kept


def _draw(items: Sequence[Any], share: float, rng: np.random.Generator) -> list[Any]:
    count = int(np.ceil(share * len(items)))
    return [items[i] for i in rng.permutation(len(items))[:count]]


def _numbered_preferences(path: Path) -> Iterator[tuple[int, Preference]]:
    for number, record in numbered_records(path):
        yield number, _parse(record, f"{path}:{number}")


def _parse(record: Mapping[str, Any], where: str) -> Preference:
    need_fields(record, ("user", "prompt", "chosen", "rejected"), where)
    user, mode = user_of(record, where), mode_of(record, where)
    prompt, chosen = (_content(record[f], f"{where}: field {f!r}") for f in ("prompt", "chosen"))
    rejected = tuple(
        _content(value, f"{where}: field 'rejected'{place}")
        for value, place in _alternatives(record["rejected"])
    )
    if not rejected:
        raise PreferenceError(f"{where}: field 'rejected': expected at least one answer, got none")
    for field, values in (("chosen", (chosen,)), ("rejected", rejected)):
        for value in values:
            if isinstance(value, str) != isinstance(prompt, str):
                raise PreferenceError(
                    f"{where}: field {field!r}: expected {describe(record['prompt'])} like "
                    f"'prompt', got {describe(record[field])}"
                )
    if chosen in rejected:
        raise PreferenceError(
            f"{where}: fields 'chosen' and 'rejected': expected two different answers, got the "
            "same twice (no preference; remove the line)"
        )
    if len(set(rejected)) < len(rejected):
        raise PreferenceError(f"{where}: field 'rejected': expected different answers, got repeats")
    return Preference(user, prompt, chosen, rejected[0], mode, rejected[1:])


def _alternatives(value: Any) -> list[tuple[Any, str]]:
    """The answers in the field `rejected`, each with how to name its place in the field."""
    # A list of messages is one answer, a list of texts or of lists is several.
    several = isinstance(value, list) and all(isinstance(item, str | list) for item in value)
    if not several:
        return [(value, "")]
    return [(item, f": answer {number}") for number, item in enumerate(value)]


def _content(value: Any, where: str) -> Content:
    if isinstance(value, str):
        if not value.strip():
            raise PreferenceError(f"{where}: expected words, got {describe(value)}")
        return value
    if not isinstance(value, list):
        raise PreferenceError(
            f"{where}: expected text or a list of messages, got {describe(value)}"
        )
    if not value:
        raise PreferenceError(f"{where}: expected at least one message, got an empty list")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise PreferenceError(
                f"{where}: message {i}: expected an object with 'role' and 'content', "
                f"got {describe(item)}"
            )
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise PreferenceError(
                f"{where}: message {i}: field 'role': expected one of {', '.join(ROLES)}, "
                f"got {role!r}"
            )
        if not isinstance(content, str):
            raise PreferenceError(
                f"{where}: message {i}: field 'content': expected text, got {describe(content)}"
            )
        if not content.strip():
            raise PreferenceError(
                f"{where}: message {i}: field 'content': expected words, got {describe(content)}"
            )
        messages.append(Message(role, content))
    return tuple(messages)
