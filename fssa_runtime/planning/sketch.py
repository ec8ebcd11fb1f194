"""Quantiles of many numbers in little memory."""

from __future__ import annotations

import math


class Sketch:
    """Weighted counts in bins whose edges grow by a constant ratio.

    A quantile is off by at most ``accuracy`` of its value, whatever came; the smallest and the
    largest number are exact. Numbers up to ``smallest`` are one bin. The bins are as many as the
    range needs: about 1,400 for twelve decades at 1 %.

    Source: DDSketch, arXiv 1908.10693.
    """

    def __init__(self, accuracy: float = 0.01, smallest: float = 1e-6) -> None:
        self._ratio = (1 + accuracy) / (1 - accuracy)
        self._scale = 1 / math.log(self._ratio)
        self._smallest = smallest
        self._bins: dict[int, float] = {}
        self.count = 0.0
        self.sum = 0.0
        self.min = math.inf
        self.max = -math.inf

    def add(self, value: float, weight: float = 1.0) -> None:
        """Count a non-negative number ``weight`` times."""
        index = 0
        if value > self._smallest:
            index = max(1, math.ceil(math.log(value / self._smallest) * self._scale))
        self._bins[index] = self._bins.get(index, 0.0) + weight
        self.count += weight
        self.sum += value * weight
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value

    @property
    def mean(self) -> float:
        """NaN if nothing was counted."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The number that ``share`` of the weight does not exceed; NaN if nothing was counted."""
        if not self.count:
            return math.nan
        if share >= 1:
            return self.max
        below = 0.0
        for index in sorted(self._bins):
            below += self._bins[index]
            if below >= share * self.count:
                break
        if index == 0:
            return self.min
        middle = self._smallest * 2 * self._ratio**index / (1 + self._ratio)
        return min(max(middle, self.min), self.max)
