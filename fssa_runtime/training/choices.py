"""Choices between options that are given by numbers: JSON lines → checked records, split by user.

One JSON object a line:

    {"user": "u17", "options": [[0.2, 1.0], [0.5, 0.0], [0.1, 0.4]], "chosen": 1}

`options` are at least two vectors of one length, the same in the whole data set; choices may be
among different numbers of them. `chosen` counts from 0. `user` is text or an integer. An optional
`mode` names the user's hidden group where it is known; it is read by evaluation only. Other fields
are ignored. Files may be gzip-compressed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fssa_runtime.training.records import (
    PreferenceError,
    mode_of,
    need_fields,
    numbered_records,
    user_of,
)

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ChoiceData:
    """N choices among up to R + 1 options of size E.

    chosen [N, E] and rejected [N, R, E] float32, mask [N, R] bool (True for a real option),
    `users` [N] and `modes` by user ("" where the data does not say).
    """

    users: tuple[str, ...]
    chosen: Tensor
    rejected: Tensor
    mask: Tensor
    mode_of_user: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def rows_by_user(self) -> Mapping[str, np.ndarray]:
        """Rows of every user, int64, users in order of first appearance."""
        rows: dict[str, list[int]] = {}
        for row, user in enumerate(self.users):
            rows.setdefault(user, []).append(row)
        return {user: np.asarray(found, dtype=np.int64) for user, found in rows.items()}

    @property
    def prompt_ids(self) -> np.ndarray:
        """[N] int64: every choice has a prompt of its own."""
        return np.arange(len(self), dtype=np.int64)

    @property
    def question_ids(self) -> np.ndarray:
        """[N] int64: equal numbers for the same options, whichever of them was chosen; numbered by
        first appearance."""
        offers = torch.cat([self.chosen[:, None], self.rejected], dim=1).numpy() + 0.0  # no -0.0
        real = torch.cat([torch.ones(len(self), 1, dtype=torch.bool), self.mask], dim=1).numpy()
        ids: dict[tuple[bytes, ...], int] = {}
        found = [
            ids.setdefault(tuple(sorted(option.tobytes() for option in offered[kept])), len(ids))
            for offered, kept in zip(offers, real, strict=True)
        ]
        return np.asarray(found, dtype=np.int64)


def read_choices(paths: Sequence[Path]) -> ChoiceData:
    """All choices of one or several files.

    Raises PreferenceError, naming file, line, field, what was expected and what came, also when
    there is no choice at all, options differ in length, or a user's `mode` is not the same on every
    line; FileNotFoundError for a missing file.
    """
    users: list[str] = []
    options: list[np.ndarray] = []
    modes: dict[str, str] = {}
    for path in paths:
        for number, record in numbered_records(path):
            where = f"{path}:{number}"
            user, mode, offered = _parse(record, where)
            if options and offered.shape[1] != options[0].shape[1]:
                raise PreferenceError(
                    f"{where}: field 'options': expected vectors of length "
                    f"{options[0].shape[1]} as before, got {offered.shape[1]}"
                )
            if modes.setdefault(user, mode) != mode:
                raise PreferenceError(
                    f"{where}: field 'mode': expected {modes[user]!r} for user {user!r} as before, "
                    f"got {mode!r}"
                )
            users.append(user)
            options.append(offered)
    if not options:
        named = ", ".join(str(path) for path in paths)
        raise PreferenceError(f"{named}: expected at least one choice, got none")
    most = max(len(offered) for offered in options)
    table = np.zeros((len(options), most, options[0].shape[1]), np.float32)
    real = np.zeros((len(options), most), bool)
    for row, offered in enumerate(options):
        table[row, : len(offered)] = offered
        real[row, : len(offered)] = True
    offers = torch.from_numpy(table)
    return ChoiceData(
        tuple(users), offers[:, 0], offers[:, 1:], torch.from_numpy(real)[:, 1:], modes
    )


def split_users(
    data: ChoiceData, *, num_folds: int, fold: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (int64) of the training users and of those of fold `fold`, none of them in both.

    Users in an order drawn from `seed` are dealt out to the folds in turn. ValueError when there
    are fewer users than folds.
    """
    by_user = data.rows_by_user
    if len(by_user) < num_folds:
        raise ValueError(f"num_folds: expected at most {len(by_user)} users, got {num_folds}")
    order = np.random.default_rng(seed).permutation(sorted(by_user))
    heldout = set(order[fold::num_folds])
    inside = np.asarray([user in heldout for user in data.users])
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def _parse(record: Mapping[str, Any], where: str) -> tuple[str, str, np.ndarray]:
    """User, mode and options [K, E] with the chosen one first."""
    need_fields(record, ("user", "options", "chosen"), where)
    user, mode, options = user_of(record, where), mode_of(record, where), record["options"]
    if not isinstance(options, list) or len(options) < 2:
        raise PreferenceError(
            f"{where}: field 'options': expected a list of at least two, got {json.dumps(options)}"
        )
    for number, option in enumerate(options):
        numbers = isinstance(option, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= LARGEST
            for x in option
        )
        if not numbers or len(option) != len(options[0]) or not option:
            raise PreferenceError(
                f"{where}: field 'options': option {number}: expected finite numbers (float32), "
                f"as many as in option 0, got {json.dumps(option)}"
            )
    chosen = record["chosen"]
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(options):
        raise PreferenceError(
            f"{where}: field 'chosen': expected 0..{len(options) - 1}, got {json.dumps(chosen)}"
        )
    order = [chosen, *(k for k in range(len(options)) if k != chosen)]
    return user, mode, np.asarray(options, dtype=np.float32)[order]
