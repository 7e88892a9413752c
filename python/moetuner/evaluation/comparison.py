"""Comparison: how much less a placement takes than another one, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moetuner._checks import instance, not_negative
from moetuner.evaluation import Evaluation, Replayed
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.halves import halve
from moetuner.evaluation.intervals import FEWEST, Change, compare_halves
from moetuner.evaluation.units import Units, units_of
from moetuner.frozen import Frozen
from moetuner.trace import RoutingTrace

# What a gain must be, to be worth moving weights for. Engines that ask before they rebalance draw
# the line at about the same place (vLLM on ROCm: 5 %).
PRICE = 0.02

Answer = Literal["worth it", "certain but small", "no evidence", "too few", "worse"]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Frozen):
    """What changing from one placement to another brings, in one figure.

    Parameters
    ----------
    measure
        Name of the figure. A verdict is on ``predicted_layer_us``, or on ``imbalance`` where no
        times were predicted.
    before, after
        The figure under both placements; means over splits.
    gain
        Share that is saved, the mean over splits; negative where the change makes things worse.
    low, high
        Its interval of 95 %, both placements on the same halves of the traffic's sequences, or of
        runs of windows where those are not known; None of a single one.
    units
        How many independent ones there are in a split; nothing is concluded from fewer than five.
    price
        Gain from which a change is worth the trouble.
    splits
        Gain in every split of a recording; empty where it was not split.
    names
        Names of the two placements.

    Examples
    --------
    >>> import moetuner as mt
    >>> verdict = mt.Verdict("imbalance", 1.5, 1.25, 1 / 6, 0.15, 0.18, units=40, price=0.02)
    >>> verdict.answer
    'worth it'
    >>> verdict.sentence
    'after has 16.7 % less imbalance than before (95 % interval 15.0 to 18.0 %).'
    """

    measure: str
    before: float
    after: float
    gain: float
    low: float | None
    high: float | None
    units: int
    price: float = PRICE
    splits: tuple[float, ...] = ()
    names: tuple[str, str] = ("before", "after")

    # Programs outside the package read the gain by this name.
    @property
    def mean(self) -> float:
        """Mean gain over splits, which is ``gain``."""
        return self.gain

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the gain; None where it has none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_too_few(self) -> bool:
        """Whether there are too few units to conclude anything."""
        return self.units < FEWEST or self.interval is None

    @property
    def answer(self) -> Answer:
        """The conclusion, in one of five words.

        ``"worth it"``: the gain is certain (its interval is above 0), and larger than the price.
        ``"certain but small"``: certain, but not larger. ``"worse"``: certainly a loss. ``"no
        evidence"``: other traffic of the kind may show the contrary, or another split does.
        ``"too few"``: below five units.
        """
        if self.is_too_few or self.low is None or self.high is None:
            return "too few"
        if any(each * self.gain < 0 for each in self.splits):
            return "no evidence"
        if self.low > 0:
            return "worth it" if self.gain > self.price else "certain but small"
        return "worse" if self.high < 0 else "no evidence"

    @property
    def is_worth_it(self) -> bool:
        """Whether the gain is certain, and larger than its price."""
        return self.answer == "worth it"

    @property
    def much(self) -> str:
        """How much less, or more, after the change."""
        return f"{100 * abs(self.gain):.1f} % {'less' if self.gain >= 0 else 'more'}"

    @property
    def sure(self) -> str:
        """The interval of that; empty where it has none."""
        if self.interval is None:
            return ""
        ends = self.interval if self.gain >= 0 else (-self.interval[1], -self.interval[0])
        low, high = (round(100 * end, 1) + 0.0 for end in ends)
        return f"95 % interval {low:.1f} to {high:.1f} %"

    @property
    def sentence(self) -> str:
        """How much less of the figure the second placement has, and how sure that is."""
        before, after = self.names
        line = f"{after} has {self.much} {FIGURES[self.measure].label} than {before}"
        if self.is_too_few:
            return (
                f"{line}; too few independent sequences or windows for an interval ({self.units}, "
                f"at least {FEWEST} are needed)."
            )
        chance = (
            "; not surely a difference: that may be chance" if self.answer == "no evidence" else ""
        )
        return f"{line} ({self.sure}){chance}."

    def __str__(self) -> str:
        return f"{self.answer}: {self.sentence}"

    def to_dict(self) -> dict[str, Any]:
        """Return the gain as JSON values; ``kind`` says what low and high are."""
        low, high, kind = self.low, self.high, "interval of this placement"
        if len(self.splits) > 1:
            low, high, kind = min(self.splits), max(self.splits), "range of splits"
        return {
            "answer": self.answer,
            "names": list(self.names),
            "over": self.names[0],
            "measure": self.measure,
            "before": self.before,
            "after": self.after,
            "gain": self.gain,
            "low": low,
            "high": high,
            "kind": kind,
            "splits": list(self.splits),
            "interval": None if self.interval is None else list(self.interval),
            "units": self.units,
        }


def verdict(before: Evaluation, after: Evaluation, *, price: float = PRICE) -> Comparison:
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
    has_times = before.predicted_layer_us is not None and after.predicted_layer_us is not None
    measure = "predicted_layer_us" if has_times else "imbalance"
    return replace(compare(before, after, [measure])[measure], price=price, splits=())


def compare(
    before: Evaluation,
    after: Evaluation,
    measures: Sequence[str] = (),
    *,
    units: Units | None = None,
) -> dict[str, Comparison]:
    """Compare two placements on the same traffic in figures, by default all whose parts add up.

    Figures of mixed arrival, and those that depend on given homes, have no interval. ``units`` are
    what is independent in the whole recording, by default in the traffic itself.
    """
    figures: dict[str, Change] = {}
    number = 0
    if before.replayed is not None and after.replayed is not None:
        figures, number = _compare_figures(before.replayed, after.replayed, units)
    comparisons = {}
    for measure in measures or figures:
        old, new = getattr(before, measure), getattr(after, measure)
        gain, interval, counted = 1 - new / old if old else 0.0, None, number
        change = figures[measure].change if measure in figures else None
        if change is not None:
            interval, counted = replace(-change, value=gain).interval, change.units
        low, high = interval or (None, None)
        values = (measure, old, new, gain, low, high)
        comparisons[measure] = Comparison(*values, units=counted, splits=(gain,))
    return comparisons


def _compare_figures(
    before: Replayed, after: Replayed, units: Units | None
) -> tuple[dict[str, Change], int]:
    """Compare halves of two evaluations of the same traffic; return how many units it has, too."""
    machines = [replace(each.setting.topology, name=None) for each in (before, after)]
    if machines[0] != machines[1]:
        raise ValueError("before and after must be of one machine: give evaluate() its topology")
    sizes = [
        f"{each.traffic.tokens} tokens"
        if isinstance(each.traffic, RoutingTrace)
        else f"{each.traffic.windows} windows"
        for each in (before, after)
    ]
    if units is None:
        setting = after.setting
        units = units_of(after.traffic, window=setting.window, threads=setting.threads)
    # A group alone would be all of its traffic, but copies look at a token's place in all.
    first, second = (
        halve(each.traffic, each.setting, units, by_group=each.group is not None)[each.group]
        for each in (before, after)
    )
    numbers = [figures["imbalance"].folds.units for figures in (first, second)]
    if sizes[0] != sizes[1] or numbers[0] != numbers[1]:
        raise ValueError(
            f"before and after must be of the same traffic, got {sizes[0]} and {sizes[1]}"
        )
    return compare_halves(second, first), units.number


def with_splits(gain: Comparison, splits: Iterable[tuple[Evaluation, Evaluation]]) -> Comparison:
    """Return a comparison with its gain in every split, from the evaluations before and after."""
    values = ([getattr(each, gain.measure) or 0.0 for each in pair] for pair in splits)
    gains = (1 - after / before if before else 0.0 for before, after in values)
    return replace(gain, splits=tuple(gains))
