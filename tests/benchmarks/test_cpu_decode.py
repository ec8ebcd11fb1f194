"""Rounds of the decoding benchmark: what whoever ends a run early has, what the ratios are of."""

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from benchmarks import cpu_decode
from benchmarks.cpu_decode import OURS, measure, summarise
from fssa_runtime.errors import InputError


class FixedLimits:
    def stream(self) -> float:
        return 1e9

    def product(self) -> float:
        return 1e10


class FakeOurs:
    """Decodes at 100 tokens a second a row, the n-th time n faster; reads 4 MB a step."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, row: str, batch: int, *, prompt: list[int], new: int) -> float:
        self.calls += 1
        return 100.0 * batch + self.calls

    def prefill(self, row: str, prompt: list[int]) -> float:
        return 50.0

    def step_bytes(self, row: str, batch: int, context: int) -> int:
        return 4_000_000


class Timing:
    tokens, seconds = 30, 2.0


class FakePeer:
    """Fails in the middle of the second round that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, batch: int, prompt: list[int], new: int) -> Timing:
        self.calls += 1
        if self.calls == 6:
            raise InputError("no more")
        return Timing()

    def prefill(self, prompt: list[int]) -> Timing:
        return Timing()


def test_what_was_measured_before_a_run_ends_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "Limits", FixedLimits)
    ours: Any = FakeOurs()
    peers: Any = {"peer": FakePeer()}
    rounds = measure(
        ours,
        peers,
        [1, 8],
        prompt=[1],
        long_prompt=[1, 2],
        new=4,
        rounds=3,
        console=Console(file=io.StringIO()),
    )
    kept = copy.deepcopy(next(rounds))
    with pytest.raises(InputError, match="no more"):
        next(rounds)
    assert {batch: set(map(len, sides.values())) for batch, sides in kept["decode"].items()} == {
        "1": {1},
        "8": {1},
    }
    assert {name: len(values) for name, values in kept["prefill"].items()} == dict.fromkeys(
        [*OURS, "peer"], 1
    )

    summary = summarise(kept, ours, 10)
    one = summary["decode"]["1"]
    assert one["peer"]["tokens_per_s"] == 15.0
    measured = one["all distinct"]["tokens_per_s"]
    assert one["peer"]["all_distinct_over_this"] == measured / 15.0
    assert one["all distinct"]["fraction_of_stream"] == pytest.approx(4e6 * measured / 1e9)
    assert summary["prefill"]["peer"]["all_distinct_over_this"] == pytest.approx(50.0 / 15.0)
    # Ours are taken twice a round, the second time in reverse: the mean is the same for all three.
    assert {one[name]["tokens_per_s"] for name in OURS} == {measured}
