"""Memory on huge pages, where there are any.

What is large and read once a step, weights or keys and values, has more pages of the ordinary size
than the TLB has entries.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21  # x86-64's and aarch64's


def zeros_on_huge_pages(num_bytes: int) -> Tensor:
    """``[num_bytes]`` uint8 zeros on the CPU, of which only what is touched takes memory.

    They begin at a multiple of 2 MiB. Where the system has no huge pages, or keeps them from
    programs that ask for them, the pages are ordinary ones.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    # Private, since shared memory gets no huge pages, and one of them more than is asked for, since
    # they lie at multiples of their size.
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    mapped = torch.frombuffer(memory, dtype=torch.uint8)
    start = -mapped.data_ptr() % _HUGE_PAGE
    return mapped[start : start + num_bytes]
