"""How sure a figure is: its spread, Student's t, and what is named beyond chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.halves import Halved
from moetuner.evaluation.samples import Folds
from moetuner.frozen import Frozen

CONFIDENCE = 0.95
# Units below which an interval is shown, but nothing is concluded from it.
FEWEST = 5
# What 95 % of Student's t of 1, 2, ... degrees of freedom do not exceed in size.
QUANTILES = np.array(
    [
        [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281],
        [2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860],
        [2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423],
    ]
).ravel()


@dataclass(frozen=True, eq=False, repr=False)
class Spread(Frozen):
    """A figure, and how far from it the truth may be.

    Parameters
    ----------
    value
        The figure.
    error
        Its standard error; None of a single unit.
    freedom
        Degrees of freedom of that.
    units
        How many independent units there are.
    """

    value: float
    error: float | None
    freedom: int
    units: int

    @property
    def is_enough(self) -> bool:
        """Whether there are units enough to conclude anything."""
        return self.units >= FEWEST and self.error is not None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 % by Student's t; None where it has none."""
        if self.error is None:
            return None
        reach = float(QUANTILES[min(self.freedom, len(QUANTILES)) - 1]) * self.error
        return self.value - reach, self.value + reach

    @property
    def low(self) -> float | None:
        """Lower end of its interval of 95 %."""
        return self.interval and self.interval[0]

    @property
    def high(self) -> float | None:
        """Upper end of its interval of 95 %."""
        return self.interval and self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Return the figure and its interval as JSON values."""
        return {"value": self.value, "low": self.low, "high": self.high}

    @property
    def chance(self) -> float:
        """Probability of such a value, or a larger one, if the true one is 0; 1 of few units."""
        if not self.is_enough or self.value <= 0 or self.error is None:
            return 1.0
        return compute_tail(self.value / self.error, self.freedom) if self.error > 0 else 0.0

    def __neg__(self) -> Spread:
        """Turn the sign."""
        return Spread(-self.value, self.error, self.freedom, self.units)

    def __sub__(self, other: Spread) -> Spread:
        """Return the difference of independent figures, with Welch's degrees of freedom."""
        value, units = self.value - other.value, min(self.units, other.units)
        if self.error is None or other.error is None:
            return Spread(value, None, 1, units)
        own, others = self.error**2, other.error**2
        parts = own**2 / self.freedom + others**2 / other.freedom
        freedom = int((own + others) ** 2 / parts) if parts > 0 else self.freedom
        return Spread(value, math.sqrt(own + others), max(freedom, 1), units)


def estimate_spread(value: float, sides: NDArray[np.float64], folds: Folds) -> Spread:
    """Return how far a figure is from the truth, by what it is on sides [2,H] of halves."""
    apart = (sides[0] - sides[1]) / 2
    apart = apart[np.isfinite(apart)]
    error = float(np.sqrt(np.mean(apart**2))) if apart.size else None
    return Spread(value, error, folds.freedom, folds.units)


def compute_change(before: Halved, after: Halved) -> Spread:
    """Return how much a figure changes, relative, by the same halves; none of what was 0."""
    if before.value <= 0:
        return Spread(0.0, None, 1, after.folds.units)
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = after.sides / before.sides - 1
    return estimate_spread(after.value / before.value - 1, sides, after.folds)


def adjust_by_holm(chances: Sequence[float]) -> list[float]:
    """Adjust probabilities so that none falls below a level by chance, as often as the level says.

    Whatever they have to do with each other (Holm 1979).
    """
    order = sorted(range(len(chances)), key=lambda place: chances[place])
    adjusted, least = [1.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        least = max(least, min((len(chances) - rank) * chances[place], 1.0))
        adjusted[place] = least
    return adjusted


def compute_tail(t: float, freedom: int) -> float:
    """Compute the probability that a variate of Student's t of such freedom is above ``t``.

    By finite sums over powers of a cosine (Abramowitz and Stegun, 26.7.3 and 26.7.4).
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
