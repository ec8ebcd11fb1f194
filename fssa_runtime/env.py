"""Every environment variable this package reads, and nothing else reads one.

===================  ========================================================================
``FSSA_CACHE``       where pulled models are kept (default: ``$XDG_CACHE_HOME/fssa``, that is
                     ``~/.cache/fssa``)
``OMP_NUM_THREADS``  compute threads of the ``fssa`` command and of `LLM` (default: one for each
                     physical core the process may use)
``WORLD_SIZE``,      how many processes train together, which of them this is, and which on its
``RANK``,            machine; set by ``torchrun`` and ``accelerate launch`` (default: one process)
``LOCAL_RANK``
===================  ========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One of the ``world_size`` processes that train together: ``rank`` of all of them,
    ``local_rank`` of those on its machine."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether it is the one that measures, writes and tells."""
        return self.rank == 0


def process() -> Process:
    """Which process this is, as who launched it says."""
    rank, local_rank, world_size = (
        int(os.environ.get(name) or default)
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    return Process(rank, local_rank, world_size)


def omp_num_threads() -> int | None:
    """The first number of ``OMP_NUM_THREADS``, or None where there is none."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) else None


def cache_dir() -> Path:
    """The folder for pulled models; it need not exist yet."""
    explicit = os.environ.get("FSSA_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fssa"
