"""Pages of the key-value cache: who holds them, and whose content can be used again.

Keys and values depend on the tokens before them *and* on the weights that made them, which differ
from user to user. So a page's content is known by a key that starts from a fingerprint of the
modulation's content and goes on over the tokens, page by page: two users never share a page unless
their weights are the same numbers. No tensors here: pages are numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Key = bytes


@dataclass
class PageStats:
    """Counts since the start: of tokens looked up in the cache and of those found, for streams that
    were admitted (the scheduler's to count), and of pages whose content was given up.
    """

    looked_up: int = 0
    found: int = 0
    evicted: int = 0


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens, counted by reference.

    A page that nobody holds any more keeps its content, if that is known, until the page is needed:
    the one unused for longest goes first.

    Attributes:
        stats: how useful the cached content was.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"expected at least one page of one token, got {num_pages}, {page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.stats = PageStats()
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._keys: dict[int, Key] = {}  # of pages whose content is known
        self._pages: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known content, nobody holds them

    @property
    def num_free(self) -> int:
        """Pages that could be allocated now, cached content given up for some."""
        return len(self._free) + len(self._idle)

    def unused(self) -> list[int]:
        """Pages that hold nothing anybody could use."""
        return list(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self) -> int | None:
        """A page with no content, held once; None if all are held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self.stats.evicted += 1
        else:
            return None
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Hold a page once more.

        Raises:
            ValueError: nobody holds it and its content is not known.
        """
        if self._references[page] == 0:
            if page not in self._idle:
                raise ValueError(f"page {page} is retained, but it holds nothing")
            del self._idle[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Hold a page once less.

        Raises:
            ValueError: nobody holds it.
        """
        if self._references[page] == 0:
            raise ValueError(f"page {page} is released, but nobody holds it")
        self._references[page] -= 1
        if self._references[page] == 0:
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether more than one holds it, so that writing needs a copy."""
        return self._references[page] > 1

    def publish(self, page: int, key: Key) -> None:
        """Say what a full page holds. Content that another page holds already is not added."""
        if key not in self._pages and page not in self._keys:
            self._pages[key] = page
            self._keys[page] = key

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Pages of the longest known beginning of ``keys``, each held once more."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            self.retain(page)
            found.append(page)
        return found

    def forget_all(self) -> None:
        """Give up all known content. Held pages stay held, and who holds them may publish them.

        So a change of weights changes the fingerprints too, or waits until nothing runs.
        """
        for page in list(self._keys):
            self._forget(page)
        self._free.extend(self._idle)
        self._idle.clear()

    def check(self) -> None:
        """Raise AssertionError unless every page is accounted for exactly once."""
        held = {page for page, count in enumerate(self._references) if count}
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert len(held) + len(free) + len(idle) == len(held | free | idle), "in two states"
        assert held | free | idle == set(range(self.num_pages)), "a page is lost"
        assert idle <= self._keys.keys(), "an idle page has no content"
        assert not free & self._keys.keys(), "a free page has content"
        assert {key: page for page, key in self._keys.items()} == self._pages
        assert all(count >= 0 for count in self._references)

    def _forget(self, page: int) -> None:
        del self._pages[self._keys.pop(page)]


def page_keys(fingerprint: bytes, tokens: Sequence[int], page_size: int) -> list[Key]:
    """Keys of the full pages of ``tokens`` under weights of that fingerprint.

    Each digests the one before and its tokens, so it stands for everything up to its end.
    """
    return extend_keys([], fingerprint, tokens, page_size)


def extend_keys(
    keys: Sequence[Key], fingerprint: bytes, following: Sequence[int], page_size: int
) -> list[Key]:
    """``keys`` of a text's first pages, continued by the full pages of the tokens ``following``."""
    result = list(keys)
    previous = result[-1] if result else hashlib.sha256(b"fssa-kv" + fingerprint).digest()
    for start in range(0, len(following) - page_size + 1, page_size):
        part = array("q", following[start : start + page_size]).tobytes()
        previous = hashlib.sha256(previous + part).digest()
        result.append(previous)
    return result
