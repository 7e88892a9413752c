"""Bootstrap of quotients: how far a figure might have been another had other units come along.

Units are whole sequences, or windows where no sequences are known: what is drawn with replacement,
as many as there are; windows whose neighbours are alike in circular blocks (Politis & Romano 1992).
Percentiles of few units are too narrow, for two reasons that have known sizes: units deviate less
from their own mean than from the true one, and the width is itself learned from few units, for
which there is Student's t.

Where many sequences share a window, which device is the slowest is chance that belongs to the
window, and what sequences deviate by counts it once for each of them. So deviations are scaled to
the variance that is clustered both ways (Cameron, Gelbach & Miller 2011), where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.units import INDEPENDENT, Blocks
from moetuner.frozen import Frozen

CONFIDENCE = 0.95
RESAMPLES = 1000
# Units below which an interval is shown, but nothing is concluded from it.
FEWEST = 5
# Drawn units that are held at once.
DRAWN = 1 << 22
# 95 % of normal variates do not exceed this in size.
NORMAL = 1.959963984540054
# Points and weights of Gauss and Legendre, exact to rounding for densities of Student's t.
GAUSS = np.polynomial.legendre.leggauss(64)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Sums(NamedTuple):
    """A figure that is a quotient of two sums over units.

    Parameters
    ----------
    value
        The figure.
    above, below
        What every unit adds to numerator and denominator [U]; or, of units that are sequences, what
        each adds in one of its windows [C].
    blocks
        How far units are alike, which are windows in their order then.
    unit, window
        Whose that is, and where [C]; None where every unit stands by itself.
    """

    value: float
    above: Floats
    below: Floats
    blocks: Blocks = INDEPENDENT
    unit: Integers | None = None
    window: Integers | None = None

    def by_unit(self) -> tuple[Floats, Floats]:
        """Return what every unit adds to numerator and denominator [U]."""
        if self.unit is None:
            return self.above, self.below
        above, below = (np.bincount(self.unit, each) for each in (self.above, self.below))
        return above.astype(np.float64), below.astype(np.float64)

    def influence(self) -> Floats | None:
        """Compute what is added to the relative deviation of the quotient, by window too [C]."""
        above, below = float(self.above.sum()), float(self.below.sum())
        if self.window is None or above <= 0 or below <= 0:
            return None
        return self.above / above - self.below / below


@dataclass(frozen=True, eq=False, repr=False)
class Spread(Frozen):
    """A figure, and how far from it the truth may be.

    Parameters
    ----------
    value
        The figure.
    deviations
        Of resamples [n], as large as they are expected to be from the truth; none of one unit.
    freedom
        Degrees of freedom of their size.
    units
        How many independent units were resampled.
    """

    value: float
    deviations: Floats
    freedom: float
    units: int

    @property
    def is_enough(self) -> bool:
        """Whether there are units enough to conclude anything."""
        return self.units >= FEWEST and self.deviations.size > 1

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Percentiles of the resamples, widened by Student's t; None where it has none."""
        if self.deviations.size < 2:
            return None
        outside = (1 - CONFIDENCE) / 2
        below, above = np.quantile(self.deviations, [outside, 1 - outside])
        wider = quantile(outside, self.freedom) / NORMAL
        return float(self.value + wider * below), float(self.value + wider * above)

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
        if not self.is_enough or self.value <= 0:
            return 1.0
        size = float(self.deviations.std())
        return tail(self.value / size if size > 0 else np.inf, self.freedom)

    def __neg__(self) -> Spread:
        """Turn the sign."""
        return Spread(-self.value, -self.deviations, self.freedom, self.units)

    def __sub__(self, other: Spread) -> Spread:
        """Return the difference of independent figures, with Welch's degrees of freedom."""
        value, units = self.value - other.value, min(self.units, other.units)
        if self.deviations.size != other.deviations.size:
            return Spread(value, np.empty(0), 1.0, units)
        mine, theirs = float(self.deviations.var()), float(other.deviations.var())
        parts = mine**2 / self.freedom + theirs**2 / other.freedom
        freedom = (mine + theirs) ** 2 / parts if parts > 0 else self.freedom
        return Spread(value, self.deviations - other.deviations, freedom, units)


def drawn(columns: Floats, resamples: int, rng: np.random.Generator, length: int = 1) -> Floats:
    """Sum columns [U,C] over units drawn with replacement [resamples,C]; none come of one unit.

    Units are drawn in circular blocks of a length, of which there are as many as make up all units.
    """
    units = len(columns)
    if units < 2:
        return np.empty((0, columns.shape[1]))
    if length > 1:
        summed = np.cumsum(np.concatenate([np.zeros((1, columns.shape[1])), *2 * [columns]]), 0)
        columns = summed[length : length + units] - summed[:units]
    blocks, at_once = max(round(units / length), 1), max(DRAWN // units, 1)
    sums = []
    for first in range(0, resamples, at_once):
        size = min(at_once, resamples - first)
        sums.append(rng.multinomial(blocks, np.full(units, 1 / units), size=size) @ columns)
    totals: Floats = np.concatenate(sums)
    return totals


class Change(NamedTuple):
    """A figure under a placement and under a baseline, which see the same resamples.

    Parameters
    ----------
    value, baseline
        The figure under both; lower is better for all of them.
    change
        Relative: 0.1 is ten percent worse. None where the baseline is 0.
    behind
        Of a group, how much less of an improvement this is than that of the group which gains most
        surely (by the upper end of its interval): the difference of their changes. None for that
        group itself, without groups, and where either has too few units.
    chance, behind_chance
        How likely an audit is to name anything at all that got worse, or is behind, as surely as
        this, if nothing really is: corrected for everything that could have been named. 1 where
        the change is none, or there are too few units.
    """

    value: Spread
    baseline: Spread
    change: Spread | None
    behind: Spread | None = None
    chance: float = 1.0
    behind_chance: float = 1.0


def paired(
    placement: dict[str, Sums],
    baseline: dict[str, Sums],
    *,
    resamples: int = RESAMPLES,
    rng: np.random.Generator,
) -> dict[str, Change]:
    """Compare every figure of two placements on the same units."""
    both = {name: (placement[name], baseline[name]) for name in placement if name in baseline}
    added = [each for pair in both.values() for of in pair for each in of.by_unit()]
    columns = np.stack(added, axis=1)
    blocks = next(iter(both.values()))[0].blocks
    # The last row is of every unit once.
    sums = drawn(columns, resamples, rng, min(blocks.length, len(columns)))
    sums = np.concatenate([sums, columns.sum(axis=0, keepdims=True)])
    changes = {}
    for number, (name, (mine, theirs)) in enumerate(both.items()):
        with np.errstate(divide="ignore", invalid="ignore"):
            now, before = (sums[:, at] / sums[:, at + 1] for at in (4 * number, 4 * number + 2))
            ratio = now / before - 1
        one, other = mine.influence(), theirs.influence()
        apart = None if one is None or other is None else one - other
        change = None
        if theirs.value > 0 and before[-1] > 0:
            change = _spread(mine, mine.value / theirs.value - 1, ratio, apart)
        value = _spread(mine, mine.value, now, one)
        changes[name] = Change(value, _spread(mine, theirs.value, before, other), change)
    return changes


def _spread(sums: Sums, value: float, samples: Floats, influence: Floats | None) -> Spread:
    """Return the spread of a figure out of resamples, the last of which is of every unit once."""
    blocks, below = sums.blocks, sums.by_unit()[1]
    units = len(below)
    number = units if blocks.length == 1 else blocks.number(units)
    if number < 2:
        return Spread(value, np.empty(0), 1.0, number)
    if blocks.length == 1:
        wider, freedom = _lost(below)
    else:
        worth, length = units / blocks.correlation, min(blocks.length, units)
        drawn_too_many = max(round(units / length), 1) * length / units
        wider = math.sqrt((worth / (worth - 1) if worth > 1 else 1.0) * drawn_too_many)
        freedom = max(worth - 1, 1.0)
    wider *= blocks.inflation
    if influence is not None and sums.unit is not None and sums.window is not None:
        # The variance is that of sequences and that of windows less that of both, which both count.
        # It is no less than that of windows: what a sequence does in two goes the same way.
        by_unit = float((np.bincount(sums.unit, influence) ** 2).sum())
        windows = int((np.bincount(sums.window) > 0).sum())
        if by_unit > 0 and windows > 1:
            squares = float((np.bincount(sums.window, influence) ** 2).sum())
            of_windows = squares * windows / (windows - 1)
            both = max(by_unit + of_windows - float((influence**2).sum()), of_windows)
            ratio, fewest = math.sqrt(both / by_unit), min(freedom, windows - 1.0)
            outside = (1 - CONFIDENCE) / 2
            if ratio * quantile(outside, fewest) < quantile(outside, freedom):
                wider, freedom = wider * ratio, fewest
    finite = samples[:-1][np.isfinite(samples[:-1])]
    return Spread(value, wider * (finite - samples[-1]), freedom, number)


def holm(chances: Sequence[float]) -> list[float]:
    """Adjust probabilities so that none falls below a level by chance, as often as the level says.

    Whatever they have to do with each other (Holm 1979).
    """
    order = sorted(range(len(chances)), key=lambda place: chances[place])
    adjusted, least = [1.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        least = max(least, min((len(chances) - rank) * chances[place], 1.0))
        adjusted[place] = least
    return adjusted


def _lost(weights: Floats) -> tuple[float, float]:
    """Compute by how much resamples of weights [U] deviate too little, and degrees of freedom.

    Units deviate from a mean that is partly their own: the more, the heavier they are. Of equal
    units these are the root of n / (n - 1), and n - 1.
    """
    share = weights / max(weights.sum(), 1e-300)
    squares = float((share**2).sum())
    left = float((share**2 * (1 - 2 * share + squares)).sum())
    if len(weights) < 2 or left <= 0:
        return 1.0, 1.0
    return float(np.sqrt(squares / left)), max(1 / squares - 1, 1.0)


def tail(t: float, freedom: float) -> float:
    """Compute the probability that a variate of Student's t of such freedom is above ``t``.

    At t = sqrt(freedom) sinh(y) its density is that power of 1 / cosh(y), which is integrated up to
    where it has fallen by e**40.
    """
    if math.isnan(t):
        return 1.0
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    begin = math.asinh(abs(t) / math.sqrt(freedom))
    half = (math.acosh(math.cosh(begin) * math.exp(40 / freedom)) - begin) / 2
    point, weight = GAUSS
    area = half * float(weight @ np.cosh(begin + half * (1 + point)) ** -freedom)
    log_whole = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2) + math.log(math.pi) / 2
    above = area / math.exp(log_whole)
    return above if t > 0 else 1 - above


def quantile(above: float, freedom: float) -> float:
    """Find the value that a variate exceeds with a probability of at most a half, by bisection."""
    low, high = 0.0, 1.0
    while tail(high, freedom) > above:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > above else (low, middle)
    return high
