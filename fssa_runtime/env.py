"""Every environment variable this package reads, and nothing else reads one.

===================  ========================================================================
``FSSA_CACHE``       where pulled models are kept (default: ``$XDG_CACHE_HOME/fssa``, that is
                     ``~/.cache/fssa``)
``OMP_NUM_THREADS``  compute threads of the ``fssa`` command (default: one for each physical core
                     the process may use)
===================  ========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path


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
