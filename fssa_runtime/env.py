"""Every environment variable this package reads, and nothing else reads one.

=================  ==========================================================================
``FSSA_CACHE``     where pulled models are kept (default: ``$XDG_CACHE_HOME/fssa``, that is
                   ``~/.cache/fssa``)
=================  ==========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for pulled models; it need not exist yet."""
    explicit = os.environ.get("FSSA_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fssa"
