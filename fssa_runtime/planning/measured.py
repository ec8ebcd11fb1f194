"""How long a step takes by what was measured: files of the benchmarks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .machine import Machine, Step, refill_seconds
from .shapes import ModelSize

_ROW = "all distinct"  # every row another user, as the benchmarks name it


@dataclass(frozen=True)
class Measured:
    """Steps as they were measured, in between by straight lines over the tokens of a step.

    Attributes:
        points: (tokens of a step, seconds without attention to cached keys), by tokens.
        key_s, pair_s: seconds for every key read, and every pair; the larger sum counts.
        refill_bytes_per_s: at which rows are refilled.
    """

    model: ModelSize
    points: tuple[tuple[int, float], ...]
    key_s: float
    pair_s: float
    refill_bytes_per_s: float
    notes: tuple[str, ...] = ()
    basis: str = "measured"

    def terms(self, step: Step) -> dict[str, float]:
        return {
            "step": self._line(step.writing + step.prompt_tokens),
            "attention": max(step.keys * self.key_s, step.pairs * self.pair_s),
            "refills": refill_seconds(self.model, step.refills, self.refill_bytes_per_s),
        }

    def _line(self, tokens: int) -> float:
        """Below the first point, the first; beyond the last, the last line goes on."""
        points = self.points
        if tokens <= points[0][0]:
            return points[0][1]
        upper = next((i for i, (b, _) in enumerate(points) if tokens <= b), len(points) - 1)
        (a, start), (b, end) = points[upper - 1 : upper + 1]
        return start + (end - start) * (tokens - a) / (b - a)


def read_measured(path: Path, model: ModelSize, machine: Machine, rank: int) -> Measured:
    """Step times from a file that ``benchmarks.cpu_decode`` or ``benchmarks.cpu_profile`` wrote.

    Raises:
        InputError: not such a file, of another model or rank, or of fewer than two batch sizes.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--measured {path}: not JSON: {error}") from error
    if not isinstance(found, dict) or not ({"summary", "steps"} & found.keys()):
        raise InputError(
            f"--measured {path}: expected what benchmarks.cpu_decode or benchmarks.cpu_profile "
            "writes (with 'summary' or 'steps')"
        )
    name = found.get("model")
    if name is not None and not (name.startswith(model.name) or model.name.startswith(name)):
        raise InputError(f"--measured {path}: measured with {name}, not with {model.name}")
    if found.get("rank", rank) != rank:
        raise InputError(f"--measured {path}: measured at rank {found['rank']}, not {rank}")
    try:
        read = _read_profile if "steps" in found else _read_decode
        points, key_s, pair_s, notes = read(found, model)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"--measured {path}: {type(error).__name__}: {error}") from error
    if len(points) < 2:
        raise InputError(f"--measured {path}: expected at least two batch sizes")
    if any(seconds <= 0 for _, seconds in points):
        raise InputError(f"--measured {path}: a step takes no time there")
    if name is None:
        notes = [*notes, f"the file does not name its model: taken to be {model.name}"]
    if "rank" not in found:
        notes = [*notes, f"the file does not name its rank: taken to be {rank}"]
    notes += [
        f"batches beyond {points[-1][0]} tokens a step are extrapolated",
        "refills of table rows are not measured: at memory bandwidth",
    ]
    return Measured(model, tuple(points), key_s, pair_s, machine.bytes_per_s, tuple(notes))


_Reading = tuple[list[tuple[int, float]], float, float, list[str]]


def _read_decode(found: Mapping[str, Any], model: ModelSize) -> _Reading:
    """Decoding rates by batch, and the rate of one prompt, from ``cpu_decode``.

    Attention is in the measured times; at the bandwidth measured beside them it is taken out.
    """
    limits = found["raw"]["limits"].values()
    stream = statistics.median(v for limit in limits for v in limit["stream_bytes_per_s"])
    product = statistics.median(v for limit in limits for v in limit["product_flop_per_s"])
    key_s, pair_s = model.kv_token_bytes / stream, model.pair_flop / product
    context = found["prompt_tokens"] + found["new_tokens"] // 2
    points = []
    for text, rows in found["summary"]["decode"].items():
        batch = int(text)
        seconds = batch / rows[_ROW]["tokens_per_s"]
        points.append((batch, seconds - batch * context * max(key_s, pair_s)))
    length = found["prefill_tokens"]
    prefill = length / found["summary"]["prefill"][_ROW]["tokens_per_s"]
    attention = max(length * key_s, length * (length + 1) / 2 * pair_s)
    if length > max(batch for batch, _ in points):
        points.append((length, prefill - attention))
    notes = ["keys and values are read at the bandwidth measured in the same run"]
    return sorted(points), key_s, pair_s, notes


def _read_profile(found: Mapping[str, Any], model: ModelSize) -> _Reading:
    """Steps part by part from ``cpu_profile``: milliseconds, every row with as many keys.

    What passes between two steps counts with the step; earlier files do not have it.
    """
    points, attention, keys = [], 0.0, 0
    between = found.get("between_steps")
    for text, rows in found["steps"].items():
        batch, parts = int(text), rows[_ROW]
        besides = statistics.median(between[text][_ROW]) if between is not None else 0.0
        points.append((batch, 1e-3 * (sum(parts.values()) - parts["paged_attention"] + besides)))
        if batch * found["keys"] > keys:
            keys = batch * found["keys"]
            attention = 1e-3 * parts["paged_attention"]
    notes = ["prompts are not in the file: their tokens take what one more row of the batch takes"]
    if between is None:
        notes.append("time between the steps (scheduling, Python) is not in the file")
    return sorted(points), attention / keys, 0.0, notes
