"""Which slot of the modulation table holds whose weights while requests run.

A slot is filled when the first request of its user starts to run, and kept as long as one refers to
it. After that its content stays until the slot is needed or the weights are forgotten: a user who
comes back finds it. With more users than slots the one unused for longest is filled anew, which
costs a product with the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..conditioning.table import ModulationTable
from ..conditioning.user_weights import UserWeights
from ..errors import InputError
from .references import References


@dataclass
class SlotStats:
    """How often weights were wanted, found in their slot, and put into one."""

    wanted: int = 0
    found: int = 0
    filled: int = 0


class SlotCache:
    """Slots of a table, counted by reference and found by the content of the weights in them."""

    def __init__(self, table: ModulationTable) -> None:
        self.stats = SlotStats()
        self._table = table
        self._slots: dict[bytes, int] = {}
        self._references: References[bytes] = References()

    @property
    def num_slots(self) -> int:
        """Users that fit at the same time."""
        return len(self._table.rows) - 1

    def check_weights(self, weights: UserWeights) -> None:
        """Raise InputError for weights that the table would refuse: wrong length, not finite."""
        if weights.fingerprint not in self._slots:
            self._table.check(weights.make_row())

    @torch.no_grad()
    def acquire(self, weights: UserWeights) -> int:
        """The slot that holds these weights, referred to once more.

        Raises:
            InputError: weights that the table refuses.
            RuntimeError: every slot is referred to.
        """
        key = weights.fingerprint
        self.stats.wanted += 1
        if key in self._slots:
            self.stats.found += 1
        else:
            row = weights.make_row().to(self._table.rows.device)
            longest_idle = self._references.longest_idle
            if not self._table.num_free and longest_idle is not None:
                self._drop(longest_idle)
            self._slots[key] = self._table.add(row)
            self.stats.filled += 1
        self._references.add(key)
        return self._slots[key]

    def release(self, weights: UserWeights) -> None:
        """One reference less.

        Raises:
            ValueError: nothing refers to these weights.
        """
        self._references.release(weights.fingerprint)

    def forget(self, weights: UserWeights) -> None:
        """Clear the slot of a user who is gone, if no request refers to it any more."""
        if self._references.is_idle(weights.fingerprint):
            self._drop(weights.fingerprint)

    def check(self) -> None:
        """Raise AssertionError unless every slot is accounted for exactly once."""
        assert len(set(self._slots.values())) == len(self._slots), "a slot is used twice"
        self._references.check()
        assert len(self._references) == len(self._slots), "a slot's weights are not known"
        assert all(key in self._references for key in self._slots)
        assert len(self._slots) + self._table.num_free == self.num_slots, "a slot is lost"

    def _drop(self, key: bytes) -> None:
        self._references.forget(key)
        self._table.remove(self._slots.pop(key))


def require_slots(slots: SlotCache | None, max_batch_size: int) -> None:
    """Raise InputError if a step could have more users than the table has slots."""
    if slots is not None and slots.num_slots < max_batch_size:
        raise InputError(
            f"the modulation table has {slots.num_slots} slots, a batch of {max_batch_size} "
            "may have as many users"
        )
