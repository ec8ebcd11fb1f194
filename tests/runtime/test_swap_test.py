"""What the swap test makes of measured texts, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fssa_runtime.training.swap_test import SwapTestConfig, _swap, spearman


def test_rank_correlation_with_the_order() -> None:
    assert spearman([0.0, 0.5, 0.6, 3.0, 9.0]) == pytest.approx(1.0)
    assert spearman([4.0, 3.0, 2.0]) == pytest.approx(-1.0)
    # 1 − 6 Σ d² / (n (n² − 1)), with two neighbours swapped.
    assert spearman([1.0, 3.0, 2.0, 4.0, 5.0]) == 0.9  # 1 - 6 * 2 / (5 * 24), exactly: a threshold
    assert spearman([2.0, 2.0, 2.0]) == 0.0
    assert spearman([1.0, 2.0, 2.0, 3.0]) == pytest.approx(np.sqrt(0.9))


@pytest.mark.parametrize(("shift", "passes"), [(1.0, True), (0.2, False), (-1.0, False)])
def test_a_taste_passes_if_more_is_surely_more(shift: float, passes: bool) -> None:
    config = SwapTestConfig.model_construct(mixtures=(0.5, 0.25))
    noise = np.array([1.0, -1.0] * 10)  # a mean of zero, and an error of 0.23
    less = np.zeros(20)
    scores = {
        ("length", "less"): less,
        ("length", "mix 0.25"): less + 0.1,
        ("length", "mix 0.5"): less + 0.05,
        ("length", "more"): less + shift + noise,
        ("length", "unmodulated"): less,
    }
    found = _swap(config, "length", scores)
    assert found["passes"] is passes
    assert found["more_minus_less"]["mean"] == pytest.approx(shift)
    assert found["means_from_less_to_more"] == pytest.approx([0.0, 0.1, 0.05, shift])
    assert not found["monotone"]
