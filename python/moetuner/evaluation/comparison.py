"""Compare one figure under two placements: the gain, its interval, and a conclusion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from moetuner.evaluation import Evaluation
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST, Spread
from moetuner.files.cells import percent, span
from moetuner.frozen import Frozen, html_table

# Smallest gain for which moving weights is worth it. Engines that compare the gain with a threshold
# before they rebalance have one of the same size (vLLM on ROCm: 5 %).
PRICE = 0.02

Answer = Literal["worth it", "certain but small", "no evidence", "too few", "worse"]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Frozen):
    """A figure of some traffic under two placements.

    Parameters
    ----------
    measure
        Name of the figure; lower is better for all of them.
    before, after
        The figure under both placements.
    change
        Relative change: 0.1 is ten percent worse; a difference where the figure was 0 before. Its
        interval comes from halves of the traffic, the same for both placements.
    price
        Smallest gain for which a change is worth the trouble.
    splits
        Gain in every split of a recording; empty where it was not split.
    names
        Names of the two placements.
    group
        Group of the traffic.
    behind
        Change of this group less that of the best group, which has the smallest upper end of the
        interval of its change. None for the best group itself, without groups, and where either has
        too few units.
    chance, behind_chance
        p-values of the hypotheses that the group did not get worse, and that it is not behind the
        best one; adjusted for all groups and figures of the judgement (Holm). 1 where the figure
        did not grow, or there are too few units.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> traffic = mt.RoutingStatistics.from_load(np.tile([[8000, 4000, 2000, 2000]], (10, 1, 1)))
    >>> blocks, better = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
    >>> gain = mt.verdict(mt.evaluate(blocks, traffic), mt.evaluate(better, traffic))
    >>> gain.answer
    'worth it'
    >>> gain.sentence
    'after has 16.5 % less predicted MoE layer time than before (95 % interval 16.5 to 16.5 %).'
    """

    measure: str
    before: float
    after: float
    change: Spread
    price: float = PRICE
    splits: tuple[float, ...] = ()
    names: tuple[str, str] = ("before", "after")
    group: str = "all"
    behind: Spread | None = None
    chance: float = 1.0
    behind_chance: float = 1.0

    _also_shown = ("gain", "interval")

    def _repr_html_(self) -> str:
        head = ("measure", "group", *self.names, "gain", "95 % interval", "answer")
        interval = "-" if self.low is None else f"{percent(self.low)} to {percent(self.high)}"
        figures = (self.before, self.after, percent(self.gain), interval, self.answer)
        return html_table(head, [(self.measure, self.group, *figures)])

    @property
    def gain(self) -> float:
        """Relative reduction of the figure; negative where it grows."""
        return 0.0 - self.change.value

    # Programs outside the package read the gain by this name.
    @property
    def mean(self) -> float:
        """The gain."""
        return self.gain

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 % of the gain; None where there is a single unit.

        With fewer than five units nothing can be concluded from it.
        """
        if self.change.interval is None:
            return None
        low, high = self.change.interval
        return 0.0 - high, 0.0 - low

    @property
    def low(self) -> float | None:
        """Lower end of the interval; None where there are too few units for a conclusion."""
        return None if self.is_too_few or self.interval is None else self.interval[0]

    @property
    def high(self) -> float | None:
        """Upper end of the interval; None where there are too few units for a conclusion."""
        return None if self.is_too_few or self.interval is None else self.interval[1]

    @property
    def units(self) -> int:
        """Number of independent sequences, kinds or windows of the traffic."""
        return self.change.units

    @property
    def is_too_few(self) -> bool:
        """True if there are too few units for a conclusion."""
        return not self.change.is_enough

    @property
    def answer(self) -> Answer:
        """The conclusion, in one of five words.

        ``"worth it"``: the gain is certain (its interval is above 0), and larger than the price.
        ``"certain but small"``: certain, but not larger. ``"worse"``: certainly a loss. ``"no
        evidence"``: other traffic of the kind may show the contrary, or another split does.
        ``"too few"``: below five units.
        """
        if self.low is None or self.high is None:
            return "too few"
        if any(gain * self.gain < 0 for gain in self.splits):
            return "no evidence"
        if self.low > 0:
            return "worth it" if self.gain > self.price else "certain but small"
        return "worse" if self.high < 0 else "no evidence"

    @property
    def is_worth_it(self) -> bool:
        """True if the gain is certain, and larger than its price."""
        return self.answer == "worth it"

    @property
    def amount(self) -> str:
        """The change of the figure, such as "7.2 % less"; of one that was 0 the difference."""
        if not self.before:
            return f"{FIGURES[self.measure].text(self.change.value)} more"
        return f"{100 * abs(self.gain):.1f} % {'less' if self.gain >= 0 else 'more'}"

    @property
    def interval_in_words(self) -> str:
        """The interval in words; empty where there are too few units."""
        if self.low is None or self.high is None:
            return ""
        ends = (self.low, self.high) if self.gain >= 0 else (-self.high, -self.low)
        if not self.before:
            return f"95 % interval {' to '.join(map(FIGURES[self.measure].text, ends))}"
        return f"95 % interval {span(*ends, with_signs=False)}"

    @property
    def sentence(self) -> str:
        """The change of the figure, its interval and a doubt, in words."""
        text = self.change_in_words
        if not self.is_too_few:
            text += f" ({self.interval_in_words})"
        if self.doubt:
            text += f"; {self.doubt}"
        return f"{text}."

    @property
    def change_in_words(self) -> str:
        """The change of the figure from the first placement to the second, in words."""
        before, after = self.names
        return f"{after} has {self.amount} {FIGURES[self.measure].label} than {before}"

    @property
    def doubt(self) -> str:
        """The reason to doubt the change; empty where it is beyond chance."""
        if self.is_too_few:
            return (
                f"too few independent sequences or windows for an interval ({self.units}, at least "
                f"{FEWEST} are needed)"
            )
        # Programs outside the package search for "not surely".
        return "not surely a difference: it may be chance" if self.answer == "no evidence" else ""

    def __str__(self) -> str:
        return f"{self.answer}: {self.sentence}"

    def to_dict(self) -> dict[str, Any]:
        """Return the gain as JSON values: its interval, and beside it the range of its splits."""
        return {
            "answer": self.answer,
            "names": list(self.names),
            "measure": self.measure,
            "before": self.before,
            "after": self.after,
            "gain": self.gain,
            "low": self.low,
            "high": self.high,
            "splits": list(self.splits),
            "range": [min(self.splits), max(self.splits)] if len(self.splits) > 1 else None,
            "interval": None if self.low is None else [self.low, self.high],
            "units": self.units,
            "group": self.group,
            "behind": None if self.behind is None else self.behind.to_dict(),
            "chance": self.chance,
            "behind_chance": self.behind_chance,
        }


def with_splits(
    comparison: Comparison, pairs: Iterable[tuple[Evaluation, Evaluation]]
) -> Comparison:
    """Return a comparison with the gain of every split, given evaluations before and after."""
    measure = comparison.measure
    figures = ([getattr(evaluation, measure) or 0.0 for evaluation in pair] for pair in pairs)
    gains = (1 - after / before if before else 0.0 for before, after in figures)
    return replace(comparison, splits=tuple(gains))
