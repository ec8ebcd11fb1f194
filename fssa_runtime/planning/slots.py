"""Which users have a row in the modulation table, by the rule of the engine's own slots."""

from __future__ import annotations

from ..engine.references import References


class SlotTable:
    """Which users have a row in the modulation table: those in flight, and the latest of others."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._users: References[int] = References()

    def acquire(self, user: int) -> bool:
        """Hold a user's row; whether it was there. Otherwise the row unused for longest goes."""
        found = user in self._users
        self._users.add(user)
        if len(self._users) > self._num_slots:
            longest_idle = self._users.longest_idle
            assert longest_idle is not None, "more users in flight than slots"
            self._users.forget(longest_idle)
        return found

    def release(self, user: int) -> None:
        """Hold it once less."""
        self._users.release(user)
