"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return what this process has freed to the system, where its C library can (glibc).

    Weights that were loaded and then packed are hundreds of pieces of the heap: freed, but by
    default kept for later, as if the model were in memory twice.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
