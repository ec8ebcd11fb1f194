"""The load of the simulator: who asks, when, and for how much."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from fssa_runtime.errors import InputError
from fssa_runtime.planning.trace import Lengths

from .planned import trace


def test_the_trace_is_lazy_seeded_and_scales_with_the_rate() -> None:
    endless = trace(num_requests=10**15)
    start = list(islice(endless.arrivals(), 5000))
    assert start == list(islice(endless.arrivals(), 5000))
    assert start != list(islice(trace(num_requests=10**15, seed=1).arrivals(), 5000))
    twice = list(islice(trace(num_requests=10**15, rate=40.0).arrivals(), 5000))
    assert [a[1:] for a in start] == [a[1:] for a in twice]
    assert twice[-1].time == pytest.approx(start[-1].time / 2)
    assert start[-1].time == pytest.approx(5000 / 20, rel=0.05)
    assert all(a.time <= b.time for a, b in pairwise(start))
    assert len(list(trace(num_requests=4097).arrivals())) == 4097


def test_users_follow_zipf_and_lengths_their_mean() -> None:
    load = trace(num_requests=40_000, num_users=50, continued=0.0, prompt=Lengths(60, 500, 0.5))
    found = list(load.arrivals())
    counts = np.bincount([a.user for a in found], minlength=50) / len(found)
    weights = 1 / np.arange(1, 51)
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.006)
    assert np.mean([a.prompt_tokens for a in found]) == pytest.approx(60, rel=0.02)
    assert max(a.output_tokens for a in found) == 40  # the cap
    assert len({a.conversation for a in found}) == len(found)


def test_bursts_keep_the_rate() -> None:
    steady = np.array([a.time for a in trace(num_requests=20_000).arrivals()])
    load = trace(num_requests=20_000, on_seconds=2.0, off_seconds=6.0)
    bursty = np.array([a.time for a in load.arrivals()])
    assert bursty[-1] == pytest.approx(1000, rel=0.2)
    # The variance of counts a second over their mean: 1 for a Poisson process.
    dispersion = [
        np.var(counts) / np.mean(counts)
        for counts in (np.bincount(t.astype(int)) for t in (steady, bursty))
    ]
    assert dispersion[0] == pytest.approx(1, abs=0.2)
    assert dispersion[1] > 20
    # Within a burst they come four times as fast.
    assert np.median(np.diff(bursty)) == pytest.approx(np.log(2) / 80, rel=0.1)


def test_conversations_grow_until_they_are_too_long() -> None:
    told: dict[int, int] = {}
    owner: dict[int, int] = {}
    continued = 0
    for arrival in trace(num_requests=5000, num_users=20, continued=0.8).arrivals():
        assert owner.setdefault(arrival.conversation, arrival.user) == arrival.user
        assert told.get(arrival.conversation, 0) < arrival.prompt_tokens <= 500
        continued += arrival.conversation in told
        told[arrival.conversation] = arrival.prompt_tokens + arrival.output_tokens
    assert 0.5 < continued / 5000 < 0.8


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 0.0},
        {"rate": float("nan")},
        {"num_requests": 0},
        {"num_users": 0},
        {"continued": 1.5},
        {"zipf": -1.0},
        {"off_seconds": -1.0},
        {"max_prompt": 100},
    ],
)
def test_traces_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected|fit"):
        trace(**changes)
