"""Bootstrap of ratios: how far a figure might have been another had other sequences come along.

Units (sequences, or windows where no sequences are known) are drawn with replacement, as many as
there are; tokens and windows of one unit go together, since they route alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Drawn units that are held at once.
DRAWN = 1 << 22

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A figure and the interval that holds 95 % of its resamples; None where it has none."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_above_zero(self) -> bool:
        """Whether the figure, and its interval where it has one, is above 0."""
        return self.value > 0 if self.low is None else self.value > 0 and self.low > 0


def resampled(
    columns: Floats, units: NDArray[np.int64], resamples: int, rng: np.random.Generator
) -> Floats:
    """Sum columns [W,C] over windows whose units [W] were drawn [resamples,C].

    None come where there is one unit, which cannot be drawn differently.
    """
    _, unit = np.unique(units, return_inverse=True)
    count = int(unit.max()) + 1
    if count < 2:
        return np.empty((0, columns.shape[1]))
    totals = np.stack([np.bincount(unit, column, count) for column in columns.T], axis=1)
    at_once = max(DRAWN // count, 1)
    sums = []
    for first in range(0, resamples, at_once):
        size = min(at_once, resamples - first)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=size)
        sums.append(drawn @ totals)
    found: Floats = np.concatenate(sums)
    return found


def interval(value: float, samples: Floats) -> Interval:
    """Percentile interval of resampled figures [n]."""
    finite = samples[np.isfinite(samples)]
    if finite.size < 2:
        return Interval(value, None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
