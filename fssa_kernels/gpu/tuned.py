"""Launch configurations that were measured, by op, device class and problem.

`tuned/<device class>.json` is written by ``python -m benchmarks.gpu_tune`` on such a device: for
every problem the configuration that won, its time, and the time of the unmodulated product beside
it. A device without a file, and a problem without an entry, take the op's heuristic.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"


@functools.cache
def _table(device: str) -> dict[str, Any]:
    path = FOLDER / f"{device}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def lookup(op: str, device: str, problem: str) -> dict[str, Any] | None:
    """The measured configuration of a problem, or None."""
    entry = _table(device).get(op, {}).get(problem)
    return None if entry is None else entry["config"]
