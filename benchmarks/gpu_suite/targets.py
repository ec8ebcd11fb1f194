"""The project's targets for a GPU, each with how it is read off the records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Values = list[tuple[str, float]]
LINEARS = ("linears", "sweep")


@dataclass(frozen=True)
class Target:
    """A line of the table: what is asked for, and (where, value) of all that was measured."""

    title: str
    bound: float
    at_most: bool
    values: Callable[[Sequence[Record]], Values]

    @property
    def goal(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"

    def met(self, values: Values) -> bool:
        """Whether the geometric mean reaches the target."""
        mean = geomean(value for _, value in values)
        return mean <= self.bound if self.at_most else mean >= self.bound

    def worst(self, values: Values) -> tuple[str, float]:
        pick = max if self.at_most else min
        return pick(values, key=lambda pair: pair[1])


def geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def measured(record: Record, side: str) -> bool:
    return "time_us" in record["sides"].get(side, {})


def quotient(record: Record, mine: str, theirs: str) -> float | None:
    """Median over the rounds of my time by theirs; None where either has none."""
    if not (measured(record, mine) and measured(record, theirs)):
        return None
    pairs = zip(record["sides"][mine]["us"], record["sides"][theirs]["us"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def label(record: Record) -> str:
    return " ".join(
        str(v) if k in ("model", "linear", "op", "what", "way", "with") else f"{k}={v}"
        for k, v in record["key"].items()
    )


def _linears(
    mine: str, theirs: str, rank: int, tokens: Callable[[int], bool], only: tuple[str, ...] = ()
) -> Callable[[Sequence[Record]], Values]:
    """Quotients of two sides of the linears; "M" in a side's name stands for all distinct."""

    def values(records: Sequence[Record]) -> Values:
        found = []
        for record in records:
            key = record["key"]
            if record["part"] not in LINEARS or key["R"] != rank or not tokens(key["M"]):
                continue
            if only and key["linear"] not in only:
                continue
            sides = (side.replace("M", str(key["M"])) for side in (mine, theirs))
            value = quotient(record, *sides)
            if value is not None:
                found.append((label(record), value))
        return found

    return values


def _bandwidth(only: tuple[str, ...], model: str) -> Callable[[Sequence[Record]], Values]:
    def values(records: Sequence[Record]) -> Values:
        return [
            (label(r), side["of_limit"])
            for r in records
            if r["part"] in LINEARS
            and r["key"]["R"] == 16
            and r["key"]["M"] <= 16
            and r["key"]["model"] == model
            and r["key"]["linear"] in only
            and "of_limit" in (side := r["sides"].get(f"gated {r['key']['M']}", {}))
        ]

    return values


def _rows(part: str, mine: str, theirs: str, **key: Any) -> Callable[[Sequence[Record]], Values]:
    """Quotients of two sides of another part."""

    def values(records: Sequence[Record]) -> Values:
        return [
            (label(r), value)
            for r in records
            if r["part"] == part
            and all(r["key"].get(name) == wanted for name, wanted in key.items())
            and (value := quotient(r, mine, theirs)) is not None
        ]

    return values


def _small(tokens: int) -> bool:
    return tokens <= 128


def targets() -> list[Target]:
    """In the order in which the project states them."""
    large = lambda m: 2048 <= m <= 8192  # noqa: E731
    at_128 = lambda m: m == 128  # noqa: E731
    anywhere = lambda m: True  # noqa: E731
    several = lambda m: m > 1  # noqa: E731
    return [
        Target(
            "linear, gated R=16, all distinct ÷ cuBLAS base only, M = 1..128",
            1.02,
            True,
            _linears("gated M", "cublas", 16, _small),
        ),
        Target("the same at R=64", 1.04, True, _linears("gated M", "cublas", 64, _small)),
        Target(
            "the same at R=16, M = 2048..8192", 1.03, True, _linears("gated M", "cublas", 16, large)
        ),
        Target(
            "of the copy's bandwidth, M ≤ 16, gate_up and down",
            0.85,
            False,
            _bandwidth(("gate_up", "down"), "llama-8b"),
        ),
        Target(
            "of the copy's bandwidth, M ≤ 16, o (4096²)",
            0.70,
            False,
            _bandwidth(("o",), "llama-8b"),
        ),
        # With one row both are the same run.
        Target("all distinct ÷ one user", 1.01, True, _linears("gated M", "gated 1", 16, several)),
        Target(
            "multi-LoRA ÷ gated, M = 128, 1 user, R=16",
            1.15,
            False,
            _linears("multi-lora 1", "gated 1", 16, at_128),
        ),
        Target(
            "multi-LoRA ÷ gated, M = 128, 32 users, R=16",
            1.3,
            False,
            _linears("multi-lora 32", "gated 32", 16, at_128),
        ),
        Target(
            "multi-LoRA ÷ gated, M = 128, all distinct, R=16",
            1.6,
            False,
            _linears("multi-lora 128", "gated 128", 16, at_128),
        ),
        Target(
            "multi-LoRA ÷ gated, M = 128, all distinct, R=64",
            3.0,
            False,
            _linears("multi-lora 128", "gated 128", 64, at_128),
        ),
        Target(
            "multi-LoRA ÷ factors, 32 users, R=16",
            1.3,
            False,
            _linears("multi-lora 32", "factors 32", 16, anywhere),
        ),
        Target(
            "plain PyTorch ÷ gated, all distinct, R=16",
            5.0,
            False,
            _linears("eager M", "gated M", 16, anywhere),
        ),
        Target(
            "decode, base only ÷ all distinct (tokens/s kept)",
            0.98,
            False,
            _rows("decode", "base only", "all distinct"),
        ),
        Target(
            "decode, base only ÷ nobody modulated",
            0.995,
            False,
            _rows("decode", "base only", "nobody"),
        ),
        Target(
            "1,000,000 users ÷ 1 user, decode step",
            1.01,
            True,
            _rows("flatness", "1000000 users", "1 users", what="step"),
        ),
        Target(
            "1,000,000 users ÷ 1 user, linear",
            1.01,
            True,
            _rows("flatness", "1000000 users", "1 users", what="linear"),
        ),
    ]
