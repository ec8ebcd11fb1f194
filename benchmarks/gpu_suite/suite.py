"""One run of the suite: what is measured, and what is kept of it.

A contest is a problem and the sides that solve it. Every side is checked, then all are timed in
turn. A side that fails, in whatever way, is recorded with the reason; the others go on.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gate import Judgement
from benchmarks.gpu_suite.scale import Scale
from benchmarks.gpu_suite.timing import Clock, Deadline, Timed, calls_for, interleaved

OUT_OF_TIME = "not measured: out of time"
OUT_OF_MEMORY = "not measured: out of memory"

Record = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One way to solve a problem.

    `call(i)` works on copy i of the inputs. `check` is asked before anything is timed. `ops` are
    the ops of ours it rests on; `work` the (bytes, flops) it has to move and compute. A side
    without `graph` cannot be captured in a CUDA graph. `note` is kept beside the figures.
    """

    call: Callable[[int], Any]
    work: tuple[int, int]
    check: Callable[[], Judgement] | None = None
    ops: tuple[str, ...] = ()
    graph: bool = True
    calls: int | None = None
    note: str = ""


Maker = Callable[[], Side]


@dataclass
class Suite:
    """The state of a run: its scale, its clock, the time it has, and the records made."""

    scale: Scale
    clock: Clock
    deadline: Deadline
    limits: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.scale.device

    def contest(
        self,
        part: str,
        key: Mapping[str, Any],
        sides: Mapping[str, Maker],
        *,
        base: str,
        copies: int = 1,
    ) -> Record:
        """Check and time the sides; the record is kept and returned.

        Ratios are to the side `base`, round by round. Each side is made, checked and captured
        when its turn comes, so that one that does not fit leaves the others their memory.
        """
        record: Record = {"part": part, "key": dict(key), "base": base, "sides": {}}
        if self.scale.dry:
            record["dry_run"] = True
        self.records.append(record)
        ready: dict[str, tuple[Side, Timed]] = {}
        for name, make in sides.items():
            if self.deadline.passed:
                record["sides"][name] = {"status": OUT_OF_TIME}
                continue
            try:
                record["sides"][name], prepared = self._prepare(make, copies)
                if prepared is not None:
                    ready[name] = prepared
            except Exception as error:
                record["sides"][name] = {"status": reason(error)}
                self._recover(error)
        self._time(record, ready)
        ready.clear()
        self.clock.release()
        return record

    def skip(self, part: str, key: Mapping[str, Any], status: str) -> None:
        """Record a contest that never took place."""
        self.records.append({"part": part, "key": dict(key), "status": status, "sides": {}})

    def run(self, part: str, plan: Iterable[tuple[dict[str, Any], Callable[[], Any]]]) -> None:
        """Run planned contests, (key, action) each, until the time is up; record the rest too."""
        for key, action in plan:
            if self.deadline.passed:
                self.skip(part, key, OUT_OF_TIME)
                continue
            try:
                action()
            except Exception as error:
                self.skip(part, key, reason(error))
                self._recover(error)

    def floor(self, work: tuple[int, int]) -> float | None:
        """The least seconds that this run's limits leave for (bytes, flops)."""
        if not {"copy", "product"} <= self.limits.keys():
            return None
        return max(work[0] / self.limits["copy"], work[1] / self.limits["product"])

    def _prepare(self, make: Maker, copies: int) -> tuple[Record, tuple[Side, Timed] | None]:
        side = make()
        for op in side.ops:
            if op in self.wrong:
                return {"status": f"wrong: {self.wrong[op][0]}"}, None
        result: Record = {"status": "ok"}
        if side.note:
            result["note"] = side.note
        if side.check is not None:
            judgement = side.check()
            result["error"], result["allowed"] = judgement.error, judgement.allowed
            if not judgement.good:
                return {**result, "status": f"wrong: {judgement.fault}"}, None
        seconds = max(side.work[0] / 3e12, side.work[1] / 7e14)
        calls = side.calls or calls_for(seconds, copies)
        timed = self.clock.prepare(side.call, copies=copies, calls=calls, graph=side.graph)
        result["how"] = timed.how
        return result, (side, timed)

    def _time(self, record: Record, ready: dict[str, tuple[Side, Timed]]) -> None:
        base = record["base"]
        try:
            samples = interleaved(
                {name: timed for name, (_, timed) in ready.items()}, self.scale.rounds, base
            )
        except Exception as error:
            for name in ready:
                record["sides"][name] = {"status": reason(error)}
            self._recover(error)
            return
        for name, seconds in samples.items():
            side = ready[name.removesuffix(" again")][0]
            result = record["sides"].setdefault(name, {"status": "ok"})
            result.update(self.figures(seconds, side.work, samples.get(base)))

    def figures(
        self, seconds: Sequence[float], work: tuple[int, int], base: Sequence[float] | None
    ) -> Record:
        """What a row shows, and the samples it comes from."""
        median = statistics.median(seconds)
        figures: Record = {
            "us": [_short(1e6 * value) for value in seconds],
            "time_us": _short(1e6 * median),
            "p20_us": _short(1e6 * _quantile(seconds, 0.2)),
            "p80_us": _short(1e6 * _quantile(seconds, 0.8)),
            "gb_s": _short(work[0] / median / 1e9),
            "tflop_s": _short(work[1] / median / 1e12),
        }
        floor = self.floor(work)
        if floor is not None:
            figures["of_limit"] = _short(floor / median)
        if base is not None:
            ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
            figures["ratio"] = _short(statistics.median(ratios))
        return figures

    def _recover(self, error: BaseException) -> None:
        # The traceback holds the tensors of the side that failed.
        error.__traceback__ = None
        if self.device == "cuda":
            # Where the context is lost every later row says so.
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """What a record says of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"error: {type(error).__name__}: {lines[0][:300]}"


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
