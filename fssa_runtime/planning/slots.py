"""Which users have a row in the modulation table, by the rule of the engine's own slots."""

from __future__ import annotations

from collections import OrderedDict


class SlotTable:
    """Which users have a row in the modulation table: those in flight, and the latest of others."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._held: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def acquire(self, user: int) -> bool:
        """Hold a user's row; whether it was there. Otherwise the row unused for longest goes."""
        held = self._held.get(user, 0)
        self._held[user] = held + 1
        if held:
            return True
        if user in self._idle:
            del self._idle[user]
            return True
        if len(self._held) + len(self._idle) > self._num_slots:
            assert self._idle, "more users in flight than slots"
            self._idle.popitem(last=False)
        return False

    def release(self, user: int) -> None:
        """Hold it once less."""
        self._held[user] -= 1
        if not self._held[user]:
            del self._held[user]
            self._idle[user] = None
