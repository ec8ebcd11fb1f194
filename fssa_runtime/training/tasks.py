"""Few-shot tasks: for one user, n context choices and some target choices that share no pair.

A task is drawn from (seed, stream, index) alone, so a resumed run sees the same tasks as an
uninterrupted one, and evaluation (`EVALUATION`) never meets a training draw (`TRAINING`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from typing_extensions import Self

TRAINING = 0
EVALUATION = 1
# Users, or tasks of a batch, that a message names.
MAX_NAMED = 5


class TooFewChoicesError(ValueError):
    """No user has enough choices for the context and a target."""


class TaskConfig(BaseModel):
    """How tasks are drawn: n ~ U{context_min..context_max}, up to `num_targets` targets."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context_min: int = Field(default=0, ge=0)
    context_max: int = Field(default=10, ge=0)
    num_targets: int = Field(default=20, ge=1)
    disjoint_by: Literal["pair", "prompt"] = "pair"

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.context_min > self.context_max:
            raise ValueError(
                f"context_min must not exceed context_max, "
                f"got {self.context_min} > {self.context_max}"
            )
        return self

    def with_context(self, n: int) -> TaskConfig:
        """The same tasks with exactly n context choices."""
        return self.model_copy(update={"context_min": n, "context_max": n})


class ChoiceRecords(Protocol):
    """Recorded choices, referred to by row 0..N-1: `data.PreferenceData`, `choices.ChoiceData`."""

    def __len__(self) -> int: ...

    @property
    def rows_by_user(self) -> Mapping[str, np.ndarray]: ...

    @property
    def prompt_ids(self) -> np.ndarray: ...

    @property
    def question_ids(self) -> np.ndarray: ...

    @property
    def mode_of_user(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Task:
    """Rows of one user's preferences: `context` [n] and `target` [m], int64, disjoint."""

    user: str
    mode: str
    context: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class OptionTask:
    """A task with its options as tensors; `user` tells apart those whose errors are independent.

    chosen: [n, E] and [m, E]. Pairs: rejected [n, E] and [m, E], no masks. Choices among up to
    R + 1 options: rejected [n, R, E] and [m, R, E] with masks [n, R] and [m, R] bool, True for a
    real option (None: all are). All tasks of a data set are of one form, with one R.
    """

    user: str
    mode: str
    context_chosen: Tensor
    context_rejected: Tensor
    target_chosen: Tensor
    target_rejected: Tensor
    context_mask: Tensor | None = None
    target_mask: Tensor | None = None


class TaskDataset(Dataset[Task]):
    """Map-style data set of `num_tasks` tasks over the given rows of the preferences.

    A task: a user drawn uniformly, a random order of that user's choices, n, the first n choices
    as context and up to `num_targets` from the other end as targets. A question that a user was
    asked twice, answered alike or not, is in one of the two only; with `disjoint_by="prompt"` a
    prompt is. n is drawn from {context_min .. min(context_max, what leaves at least one target)}.
    The order does not depend on n: data sets with the same seed and different n have nested
    contexts.

    Users with too few choices for context_min and a target are left out and named in
    `left_out_users`; TooFewChoicesError when nobody remains.
    """

    def __init__(
        self,
        data: ChoiceRecords,
        rows: np.ndarray,
        config: TaskConfig,
        *,
        num_tasks: int,
        seed: int,
        stream: int = TRAINING,
    ) -> None:
        self.config = config
        self.num_tasks = num_tasks
        self._data = data
        self._key = (seed, stream)
        # What a context and its targets must not share: the prompt, or just the options of one.
        by_prompt = config.disjoint_by == "prompt"
        self._groups = data.prompt_ids if by_prompt else data.question_ids
        wanted = np.zeros(len(data), dtype=bool)
        wanted[rows] = True
        self._users: list[tuple[str, np.ndarray]] = []
        left_out = []
        for user, all_rows in data.rows_by_user.items():
            of_user = all_rows[wanted[all_rows]]
            if not len(of_user):
                continue
            largest_group = np.unique(self._groups[of_user], return_counts=True)[1].max()
            if len(of_user) - largest_group < config.context_min:
                left_out.append(user)
            else:
                self._users.append((user, of_user))
        self.left_out_users = tuple(left_out)
        if not self._users:
            raise TooFewChoicesError(
                f"rows: expected a user with at least {config.context_min} context choices and "
                f"a target that shares no {config.disjoint_by} with them, got none among "
                f"{len(left_out)} users"
            )

    @property
    def num_users(self) -> int:
        return len(self._users)

    def say_who_is_left_out(self) -> None:
        """A warning that counts `left_out_users` and names some, if there are any."""
        if not self.left_out_users:
            return
        count = len(self.left_out_users)
        named = ", ".join(map(repr, self.left_out_users[:MAX_NAMED]))
        more = f" and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
        warnings.warn(
            f"{count} of {count + self.num_users} users have too few choices for a context and a "
            f"target and are left out: {named}{more}",
            stacklevel=2,
        )

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < self.num_tasks:
            raise IndexError(f"index: expected 0..{self.num_tasks - 1}, got {index}")
        rng = np.random.default_rng((*self._key, index))
        user, rows = self._users[rng.integers(len(self._users))]
        order = rng.permutation(rows)
        groups = self._groups[order]
        # The last choice of the order is a target whatever n is; its group is kept out of the
        # context so that there always is one.
        available = order[groups != groups[-1]]
        most = min(self.config.context_max, len(available))
        n = int(rng.integers(self.config.context_min, most, endpoint=True))
        context = available[:n]
        free = order[~np.isin(groups, self._groups[context])]
        target = free[::-1][: self.config.num_targets]
        return Task(user, self._data.mode_of_user[user], context, target)


class EmbeddedTaskDataset(Dataset[OptionTask]):
    """The tasks of a `TaskDataset` with options looked up in tables: chosen [N, E], rejected
    [N, E], or [N, R, E] with the mask of its real options [N, R] for choices among several."""

    def __init__(
        self, tasks: TaskDataset, chosen: Tensor, rejected: Tensor, mask: Tensor | None = None
    ) -> None:
        self._tasks = tasks
        self._chosen = chosen
        self._rejected = rejected
        self._mask = mask

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> OptionTask:
        task = self._tasks[index]
        context, target = torch.from_numpy(task.context), torch.from_numpy(task.target.copy())
        return OptionTask(
            task.user,
            task.mode,
            self._chosen[context],
            self._rejected[context],
            self._chosen[target],
            self._rejected[target],
            None if self._mask is None else self._mask[context],
            None if self._mask is None else self._mask[target],
        )


def collate_options(tasks: Sequence[OptionTask]) -> dict[str, Tensor]:
    """Pad U tasks into one batch.

    Returns context_chosen [U, n_max, E] and target_chosen [U, m_max, E]. For pairs, rejected of the
    same shapes, context_mask [U, n_max] and target_mask [U, m_max] bool. For choices among several,
    rejected [U, n_max, R, E] and [U, m_max, R, E] and masks without E. Padding is 0.
    """
    batch: dict[str, Tensor] = {}
    for kind in ("context", "target"):
        rejected = [getattr(task, f"{kind}_rejected") for task in tasks]
        masks = [
            torch.ones(r.shape[:-1], dtype=torch.bool)
            if (found := getattr(task, f"{kind}_mask")) is None
            else found
            for task, r in zip(tasks, rejected, strict=True)
        ]
        chosen = [getattr(task, f"{kind}_chosen") for task in tasks]
        batch[f"{kind}_chosen"] = pad_sequence(chosen, batch_first=True)
        batch[f"{kind}_rejected"] = pad_sequence(rejected, batch_first=True)
        batch[f"{kind}_mask"] = pad_sequence(masks, batch_first=True)
    return batch


def collate_rows(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """Pad U tasks into row numbers: context_rows [U, n_max] and target_rows [U, m_max] int64,
    context_mask and target_mask bool. Padding is row 0: valid to look up, masked out."""
    rows = {
        "context": [torch.from_numpy(t.context.copy()) for t in tasks],
        "target": [torch.from_numpy(t.target.copy()) for t in tasks],
    }
    batch: dict[str, Tensor] = {}
    for name, parts in rows.items():
        batch[f"{name}_rows"] = pad_sequence(parts, batch_first=True)
        batch[f"{name}_mask"] = _mask([len(part) for part in parts])
    return batch


def _mask(lengths: Sequence[int]) -> Tensor:
    counts = torch.tensor(lengths)
    return torch.arange(int(counts.max())) < counts[:, None]
