"""What the scheduler knows of an answer being written."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from .page_pool import Key

_ORDER = itertools.count()


@dataclass(eq=False)
class Stream:
    """One answer to one prompt, from its arrival to its last token.

    Its tokens are the prompt's and those written so far. Keys and values of the first
    ``num_computed`` lie in ``pages``; what is not computed yet is computed next, in pieces as large
    as the step allows. A stream that is preempted loses its pages and computes all of it again.

    Attributes:
        fingerprint: of the content of the weights that write it, the root of its pages' keys.
        tenant: whose turn it takes; any value that has a hash.
        max_tokens: written at most.
        priority: larger goes first. deadline: when it is no longer wanted, on the caller's clock.
        parent: another answer to the same prompt; while that runs, its pages serve this one too.
        finds: whether it may begin with pages that others computed.
        pages, keys: its pages in order, and what the full ones hold.
        num_cached: tokens of the prompt that were found computed when it was last admitted.
        num_preempted: how often it lost its pages.
    """

    prompt: Sequence[int]
    max_tokens: int
    fingerprint: bytes = b""
    tenant: Hashable = None
    priority: int = 0
    deadline: float | None = None
    parent: Stream | None = None
    finds: bool = True
    written: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_preempted: int = 0
    order: int = field(default_factory=lambda: next(_ORDER))

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt's and those written."""
        return len(self.prompt) + len(self.written)

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Known tokens from ``start`` to ``stop``."""
        split = len(self.prompt)
        part = list(self.prompt[start:stop])
        if stop > split:
            part += self.written[max(0, start - split) : stop - split]
        return part
