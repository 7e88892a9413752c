"""Verdict: whether a placement is worth changing to, and whether that is certain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moetuner._checks import instance, not_negative
from moetuner.evaluation import Evaluation
from moetuner.evaluation.by_unit import of_traffic
from moetuner.evaluation.intervals import FEWEST, RESAMPLES, Spread, paired
from moetuner.evaluation.units import Units, units_of
from moetuner.frozen import Frozen
from moetuner.statistics import RoutingStatistics

# What a gain must be, to be worth moving weights for. Engines that ask before they rebalance draw
# the line at about the same place (vLLM on ROCm: 5 %).
PRICE = 0.02

Answer = Literal["worth it", "certain but small", "no evidence", "too few", "worse"]


@dataclass(frozen=True, eq=False, repr=False)
class Verdict(Frozen):
    """What changing from one placement to another would bring.

    Parameters
    ----------
    measure
        ``predicted_layer_us``, or ``imbalance`` where no times were predicted.
    before, after
        The measure.
    gain
        Share that is saved; negative where the change makes things worse.
    low, high
        Its interval of 95 %, both placements on the same resamples of the traffic's sequences, or
        of blocks of windows where those are not known; None of a single one.
    units
        How many independent ones there are; nothing is concluded from fewer than five.
    price
        Gain from which a change is worth the trouble.

    Examples
    --------
    >>> import moetuner as mt
    >>> verdict = mt.Verdict("imbalance", 1.5, 1.25, 1 / 6, 0.15, 0.18, units=40, price=0.02)
    >>> verdict.answer
    'worth it'
    """

    measure: str
    before: float
    after: float
    gain: float
    low: float | None
    high: float | None
    units: int
    price: float

    @property
    def answer(self) -> Answer:
        """One of five words.

        ``"worth it"``: the gain is certain (its interval is above 0), and larger than the price.
        ``"certain but small"``: certain, but not larger. ``"worse"``: certainly a loss. ``"no
        evidence"``: other traffic of the kind may show the contrary. ``"too few"``: below five
        units.
        """
        if self.units < FEWEST or self.low is None or self.high is None:
            return "too few"
        if self.low > 0:
            return "worth it" if self.gain > self.price else "certain but small"
        return "worse" if self.high < 0 else "no evidence"

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain is certain, and larger than its price."""
        return self.answer == "worth it"

    def __str__(self) -> str:
        unit = " us" if self.measure == "predicted_layer_us" else ""
        figures = f"{self.measure} {self.before:.4g}{unit} -> {self.after:.4g}{unit}"
        found = f"{self.units} unit{'' if self.units == 1 else 's'}"
        if self.low is not None and self.high is not None:
            found = f"95 %: {100 * self.low:.1f} to {100 * self.high:.1f}, of {found}"
        return (
            f"{self.answer}: {figures}, gain {100 * self.gain:.1f} % ({found}; "
            f"worth it above {100 * self.price:g} %)"
        )


def verdict(before: Evaluation, after: Evaluation, *, price: float = PRICE) -> Verdict:
    """Judge a change of placement by what both do to the same traffic.

    Parameters
    ----------
    before, after
        What ``evaluate`` said of the same traffic.
    price
        Share up to which a gain is not worth the trouble of a change.

    Raises
    ------
    ValueError
        If ``price`` is negative, or the evaluations are not of the same traffic.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> traffic = mt.RoutingStatistics.from_load(np.tile([[8, 4, 2, 2]], (10, 1, 1)))
    >>> blocks, better = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
    >>> before, after = (mt.evaluate(each, traffic) for each in (blocks, better))
    >>> mt.verdict(before, after).answer
    'worth it'
    """
    for name, each in (("before", before), ("after", after)):
        instance(name, each, Evaluation, hint=", such as evaluate(placement, trace)")
    not_negative("price", price, "share")
    measure = "imbalance"
    if before.predicted_layer_us is not None and after.predicted_layer_us is not None:
        measure = "predicted_layer_us"
    found = gain(before, after, measure)
    _, low, high = found.interval
    old, new = getattr(before, measure), getattr(after, measure)
    return Verdict(measure, old, new, found.value, low, high, found.units, price)


def gain(
    before: Evaluation,
    after: Evaluation,
    measure: str,
    *,
    units: Units | None = None,
    seed: int = 0,
) -> Spread:
    """Return the share of a measure that is saved, with its spread over the traffic's units.

    ``units`` are by default those of the traffic itself, which may be a part of a recording.
    Figures of a mixed arrival, and those that depend on given homes, have no spread.
    """
    old, new = getattr(before, measure), getattr(after, measure)
    value = 1 - new / old if old else 0.0
    ours, theirs = after.replayed, before.replayed
    if ours is None or theirs is None:
        return Spread(value, np.empty(0), 1.0, 0)
    if units is None:
        units = units_of(ours.traffic, window=ours.setting.window, threads=ours.setting.threads)
    sums = []
    for each in (ours, theirs):
        traffic, group = each.traffic, each.group
        setting = replace(each.setting, with_mixed=False)
        # A group alone would be all of its traffic, but copies look at a token's place in all.
        whole = group is None
        parts = of_traffic(traffic, setting, each.model, each.regime, units, only_whole=whole)
        sums.append(parts[group])
    counts = [_units(each.traffic) for each in (ours, theirs)]
    if counts[0] != counts[1] or len(sums[0]["imbalance"].above) != len(sums[1]["imbalance"].above):
        raise ValueError(
            f"before and after must be of the same traffic, got {counts[1]} and {counts[0]}"
        )
    rng = np.random.default_rng(seed)
    found = paired(sums[0], sums[1], resamples=RESAMPLES, rng=rng)
    change = found[measure].change if measure in found else None
    if change is None:
        return Spread(value, np.empty(0), 1.0, units.number)
    return replace(-change, value=value)


def _units(traffic: object) -> str:
    if isinstance(traffic, RoutingStatistics):
        return f"{traffic.windows} windows"
    return f"{getattr(traffic, 'tokens', 0)} tokens"
