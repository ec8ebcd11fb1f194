"""What is referred to, how often, and what is kept although nothing refers to it any more."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class References(Generic[K]):
    """Keys counted by reference. One that nothing refers to any more is idle until it is forgotten.

    A key is known if it is referred to or idle; ``len`` counts the known ones.
    """

    def __init__(self) -> None:
        self._counts: dict[K, int] = {}
        self._idle: OrderedDict[K, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts) + len(self._idle)

    def __contains__(self, key: K) -> bool:
        return key in self._counts or key in self._idle

    @property
    def num_referred(self) -> int:
        """Keys that something refers to."""
        return len(self._counts)

    @property
    def longest_idle(self) -> K | None:
        """The key whose last reference went first, if any is idle."""
        return next(iter(self._idle), None)

    def is_idle(self, key: K) -> bool:
        return key in self._idle

    def add(self, key: K) -> None:
        """One reference more; to a key that was not known, the first."""
        self._idle.pop(key, None)
        self._counts[key] = self._counts.get(key, 0) + 1

    def release(self, key: K) -> None:
        """One reference less.

        Raises:
            ValueError: nothing refers to the key.
        """
        count = self._counts.get(key, 0)
        if count == 0:
            raise ValueError("released what nothing refers to")
        if count > 1:
            self._counts[key] = count - 1
            return
        del self._counts[key]
        self._idle[key] = None

    def forget(self, key: K) -> None:
        """An idle key is not known any more.

        Raises:
            KeyError: it is not idle.
        """
        del self._idle[key]

    def check(self) -> None:
        """Raise AssertionError unless every key is either referred to or idle."""
        assert not self._counts.keys() & self._idle.keys()
        assert all(count > 0 for count in self._counts.values())
