"""Compute confidence intervals: standard errors, Student's t, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.halves.halved import Halved
from moetuner.evaluation.samples import Folds
from moetuner.frozen import Frozen

CONFIDENCE = 0.95
# With fewer units than these an interval is shown, but nothing is concluded from it.
FEWEST = 5
# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom.
QUANTILES = np.array(
    [
        [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281],
        [2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860],
        [2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423],
    ]
).ravel()


@dataclass(frozen=True, eq=False, repr=False)
class Spread(Frozen):
    """A figure with its standard error.

    Parameters
    ----------
    value
        The figure.
    error
        Standard error; None where there is a single unit.
    freedom
        Degrees of freedom of the standard error.
    units
        Number of independent units.
    """

    value: float
    error: float | None
    freedom: int
    units: int

    @property
    def is_enough(self) -> bool:
        """True if there are enough units for a conclusion."""
        return self.units >= FEWEST and self.error is not None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 % by Student's t; None without a standard error."""
        if self.error is None:
            return None
        half_width = float(QUANTILES[min(self.freedom, len(QUANTILES)) - 1]) * self.error
        return self.value - half_width, self.value + half_width

    @property
    def low(self) -> float | None:
        """Lower end of its interval of 95 %."""
        return None if self.interval is None else self.interval[0]

    @property
    def high(self) -> float | None:
        """Upper end of its interval of 95 %."""
        return None if self.interval is None else self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the figure and its interval as JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    @property
    def p_value(self) -> float:
        """One-sided p-value of the hypothesis that the true value is 0; 1 with too few units."""
        if not self.is_enough or self.value <= 0 or self.error is None:
            return 1.0
        return compute_tail(self.value / self.error, self.freedom) if self.error > 0 else 0.0

    def __neg__(self) -> Spread:
        """Return the figure with the opposite sign."""
        return Spread(-self.value, self.error, self.freedom, self.units)

    def __sub__(self, other: Spread) -> Spread:
        """Return the difference of independent figures, with Welch's degrees of freedom."""
        value, units = self.value - other.value, min(self.units, other.units)
        if self.error is None or other.error is None:
            return Spread(value, None, 1, units)
        variance, other_variance = self.error**2, other.error**2
        total = variance + other_variance
        divisor = variance**2 / self.freedom + other_variance**2 / other.freedom
        freedom = int(total**2 / divisor) if divisor > 0 else self.freedom
        return Spread(value, math.sqrt(total), max(freedom, 1), units)


def estimate_spread(value: float, sides: NDArray[np.float64], folds: Folds) -> Spread:
    """Estimate the standard error of a figure from its values on both sides of halvings [2,H]."""
    deviation = (sides[0] - sides[1]) / 2
    deviation = deviation[np.isfinite(deviation)]
    error = float(np.sqrt(np.mean(deviation**2))) if deviation.size else None
    return Spread(value, error, folds.freedom, folds.units)


def compute_change(before: Halved, after: Halved) -> Spread:
    """Compute the relative change of a figure and its standard error, by the same halves.

    The change of a figure that was 0 is a difference, as there is no share of it.
    """
    if before.value <= 0:
        return estimate_spread(after.value - before.value, after.sides - before.sides, after.folds)
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = after.sides / before.sides - 1
    return estimate_spread(after.value / before.value - 1, sides, after.folds)


def adjust_by_holm(chances: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of tests (Holm 1979).

    If all null hypotheses are true, the probability that any adjusted p-value is below a level is
    at most that level, whatever the dependence of the tests.
    """
    order = sorted(range(len(chances)), key=lambda test: chances[test])
    adjusted, largest = [1.0] * len(chances), 0.0
    for rank, test in enumerate(order):
        largest = max(largest, min((len(chances) - rank) * chances[test], 1.0))
        adjusted[test] = largest
    return adjusted


def compute_tail(t: float, freedom: int) -> float:
    """Compute the probability that Student's t with ``freedom`` degrees of freedom is above ``t``.

    The sums are finite, over powers of a cosine (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, is_odd, total = math.cos(angle), freedom % 2, 0.0
    term = cosine**is_odd
    for power in range(is_odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    within = math.sin(angle) * total
    if is_odd:
        within = (angle + within) * 2 / math.pi
    return max((1 - within) / 2, 0.0)
