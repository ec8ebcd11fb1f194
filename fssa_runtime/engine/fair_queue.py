"""Who is next: priorities first, then the user who has been served least, then who came first."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Items of many users, taken so that users with work waiting are served alike.

    Service is counted in tokens (`serve`), for each priority apart. Within a user and priority,
    first come is first served. Operations cost O(log users), removal O(items of the user).

    A user is present from `add` to `leave`. A priority has a clock, which goes on by the even share
    of those present in all that is served, and is never behind the user who was taken last. A user
    with nothing waiting starts where the clock is, or further if they were served more: so a pause
    earns nothing, and who has been served much is reached in the end, however many others come.

    Source: virtual token counters, arXiv 2401.00588; the clock is that of weighted fair queueing.
    """

    def __init__(self) -> None:
        self._lines: dict[int, _Line[Item]] = {}  # by priority, where somebody is present
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        """All items, in no particular order."""
        for line in self._lines.values():
            for items in line.waiting.values():
                yield from items

    def add(self, item: Item, user: Hashable, priority: int, *, front: bool = False) -> None:
        """Let an item wait; at the front of its user's if it was taken before."""
        hash(user)  # an error must leave nothing behind
        line = self._lines.setdefault(priority, _Line())
        line.add(item, user, front)
        self._length += 1

    def peek(self) -> tuple[Item, Hashable, int] | None:
        """(item, user, priority) that is next, or None."""
        for priority in sorted(self._lines, reverse=True):
            line = self._lines[priority]
            if line.waiting:
                user = line.next_user()
                return line.waiting[user][0], user, priority
        return None

    def pop(self) -> Item | None:
        """Take the next item. Its user stays present until `leave`."""
        head = self.peek()
        if head is None:
            return None
        item, user, priority = head
        self._lines[priority].take_first(user)
        self._length -= 1
        return item

    def remove(self, item: Item, user: Hashable, priority: int) -> bool:
        """Take an item out of the queue; whether it was there. Its user has one thing less."""
        line = self._lines.get(priority)
        if line is None or not line.remove(item, user):
            return False
        self._length -= 1
        self.leave(user, priority)
        return True

    def serve(self, user: Hashable, priority: int, num_tokens: float) -> None:
        """Count tokens that are computed for a user who is present."""
        self._lines[priority].serve(user, num_tokens)

    def leave(self, user: Hashable, priority: int) -> None:
        """A user has one thing less waiting or running."""
        line = self._lines[priority]
        line.leave(user)
        if not line.present:
            # Nobody is left who could be ahead of another.
            del self._lines[priority]


class _Line(Generic[Item]):
    """The users of one priority."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, deque[Item]] = {}  # of users with items
        self.present: dict[Hashable, int] = {}  # what each user has waiting or running
        self.served: dict[Hashable, float] = {}
        self._clock = 0.0
        # (served, ticket, user); it counts if the ticket is the user's, others are left behind.
        self._heap: list[tuple[float, int, Hashable]] = []
        self._tickets: dict[Hashable, int] = {}
        self._next_ticket = 0
        self._max_served = 1000  # entries, before those that tell nothing are dropped

    def add(self, item: Item, user: Hashable, front: bool) -> None:
        if user not in self.waiting:
            if user not in self.present or not front:
                self.served[user] = max(self.served.get(user, 0.0), self._clock)
            self.waiting[user] = deque()
            self._push(user)
        self.present[user] = self.present.get(user, 0) + 1
        if front:
            self.waiting[user].appendleft(item)
        else:
            self.waiting[user].append(item)

    def next_user(self) -> Hashable:
        """The user served least, of those with items."""
        while True:
            served, ticket, user = self._heap[0]
            if self._tickets.get(user) != ticket:
                heapq.heappop(self._heap)
            elif served != self.served[user]:  # served since it was pushed
                heapq.heappop(self._heap)
                self._push(user)
            else:
                return user

    def take_first(self, user: Hashable) -> None:
        self._clock = max(self._clock, self.served[user])
        self._drop(user, 0)

    def remove(self, item: Item, user: Hashable) -> bool:
        for index, other in enumerate(self.waiting.get(user, ())):
            if other is item:
                self._drop(user, index)
                return True
        return False

    def serve(self, user: Hashable, num_tokens: float) -> None:
        self.served[user] += num_tokens
        self._clock += num_tokens / len(self.present)

    def leave(self, user: Hashable) -> None:
        self.present[user] -= 1
        if self.present[user] == 0:
            del self.present[user]
            if len(self.served) > self._max_served:
                self._forget()

    def _forget(self) -> None:
        """Drop the counts of users who are away and would start at the clock anyway."""
        self.served = {
            user: served
            for user, served in self.served.items()
            if user in self.present or served > self._clock
        }
        self._max_served = 2 * len(self.served) + 1000

    def _push(self, user: Hashable) -> None:
        self._tickets[user] = self._next_ticket
        self._next_ticket += 1
        if len(self._heap) > 2 * len(self._tickets) + 16:
            self._heap = [(self.served[user], t, user) for user, t in self._tickets.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self.served[user], self._tickets[user], user))

    def _drop(self, user: Hashable, index: int) -> None:
        items = self.waiting[user]
        del items[index]
        if not items:
            del self.waiting[user], self._tickets[user]
