"""What methods gain over one of them on unseen traffic, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.verdicts import gain
from moetuner.report.cells import signed
from moetuner.report.outcome import Outcome

# What the measures are called in a sentence: "less ...".
NAMES = {
    "predicted_layer_us": "predicted time of a layer",
    "imbalance": "imbalance",
    "crossing": "crossing",
    "fanout": "fanout",
    "node_fanout": "node fanout",
}


@dataclass(frozen=True)
class Gain:
    """Share of a measure that a method saves, on the unseen traffic of every split.

    Parameters
    ----------
    method, over, measure
        What saves how much of what, in comparison with which method.
    splits
        One gain for every split.
    interval
        95 % of what other sequences, or windows, of the kind had shown of the two placements; of
        several splits the mean of their intervals, which is no narrower than that of their mean,
        whatever the splits have in common. None where there are too few of them, or nobody asked.
    units
        How many sequences or windows that is of, in a split.
    """

    method: str
    over: str
    measure: str
    splits: tuple[float, ...]
    interval: tuple[float, float] | None = None
    units: int = 0

    @property
    def mean(self) -> float:
        """Mean over the splits."""
        return float(np.mean(self.splits))

    @property
    def low(self) -> float | None:
        """Lower end of the range over splits; of a single one, of its interval."""
        if len(self.splits) > 1:
            return min(self.splits)
        return None if self.interval is None else self.interval[0]

    @property
    def high(self) -> float | None:
        """Upper end."""
        if len(self.splits) > 1:
            return max(self.splits)
        return None if self.interval is None else self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values; ``kind`` says what low and high are."""
        return {
            "over": self.over,
            "measure": self.measure,
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "kind": "range of splits" if len(self.splits) > 1 else "interval of this placement",
            "splits": list(self.splits),
        }

    def row(self) -> tuple[str, ...]:
        """Return the cells of a table."""
        return (
            self.method,
            signed(self.mean),
            *(signed(end) for end in (self.low, self.high)),
        )

    def sentence(self, where: str) -> str:
        """Write it down, with the traffic that it is of and its uncertainty."""
        name = NAMES[self.measure]
        if len(self.splits) > 1:
            found = f"{signed(self.low)} to {signed(self.high)} over {len(self.splits)} splits"
            kind, unsure = f"mean {signed(self.mean)}, {found}", "the splits do not agree"
        elif self.interval is not None:
            found = f"95 %: {signed(self.low)} to {signed(self.high)}"
            kind, unsure = f"{found}, of this placement", "that may be chance"
        else:
            return (
                f"{self.method} over {self.over}: {signed(self.mean)} in {name}; too few sequences "
                f"or windows to say how sure that is (below {FEWEST})."
            )
        assert self.low is not None
        assert self.high is not None
        if self.low <= 0 <= self.high:
            return f"{self.method} is not surely better or worse than {self.over} in {name}: " + (
                f"{unsure} ({kind})."
            )
        word = "less" if self.mean > 0 else "more"
        return (
            f"{self.method} has {100 * abs(self.mean):.1f} % {word} {name} than {self.over} "
            f"{where} (gain {kind})."
        )


def gains(splits: list[dict[str, Outcome]], over: str, *, seed: int) -> list[Gain]:
    """Compare all methods with one, split by split.

    Only splits count in which every method ran. Nothing comes where the traffic does not tell the
    measure.
    """
    first = splits[0]
    measure = first[over].worth.figure
    whole = [split for split in splits if set(split) == set(first)]
    found = []
    for method in first:
        if method == over or getattr(first[over].evaluation, measure) is None:
            continue
        spreads = []
        for split in whole:
            before, after = split[over].evaluation, split[method].evaluation
            if len(whole) == 1:
                spread = gain(before, after, measure, seed=seed)
                _, low, high = spread.interval
                ends = None
                if spread.is_enough and low is not None and high is not None:
                    ends = (low, high)
                found.append(Gain(method, over, measure, (spread.value,), ends, spread.units))
            else:
                old = getattr(before, measure)
                spreads.append(1 - getattr(after, measure) / old if old else 0.0)
        if spreads:
            found.append(Gain(method, over, measure, tuple(spreads)))
    return found
