"""What methods gain over one of them on unseen traffic, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moetuner.evaluation.intervals import FEWEST, mean_interval
from moetuner.evaluation.units import Units, likeness
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
        95 % of what other sequences, or windows, of the kind had shown of the placements; of
        several splits that of their mean, whose errors have much in common. None where there are
        too few of them.
    units
        How many independent sequences or windows that is of, in a split.
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
            "interval": None if self.interval is None else list(self.interval),
            "units": self.units,
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
        if self.interval is None:
            return (
                f"{self.method} over {self.over}: {signed(self.mean)} in {name}; too few "
                f"independent sequences or windows to say how sure that is ({self.units}, below "
                f"{FEWEST})."
            )
        low, high = self.interval
        kind = f"95 %: {signed(low)} to {signed(high)}, "
        if len(self.splits) > 1:
            kind = f"mean {signed(self.mean)}, {kind}over {len(self.splits)} splits"
        else:
            kind += "of this placement"
        if low <= 0 <= high:
            return (
                f"{self.method} is not surely better or worse than {self.over} in {name}: that may "
                f"be chance ({kind})."
            )
        word = "less" if self.mean > 0 else "more"
        return (
            f"{self.method} has {100 * abs(self.mean):.1f} % {word} {name} than {self.over} "
            f"{where} (gain {kind})."
        )


def gains(
    splits: list[dict[str, Outcome]], over: str, units: Units, *, share: float, seed: int
) -> list[Gain]:
    """Compare all methods with one, split by split.

    ``units`` are those of the recording, and ``share`` what each split holds out. Only splits count
    in which every method ran. Nothing comes where the traffic does not tell the measure.
    """
    first = splits[0]
    measure = first[over].worth.figure
    whole = [split for split in splits if set(split) == set(first)]
    found = []
    for method in first:
        if method == over or getattr(first[over].evaluation, measure) is None:
            continue
        spreads = [
            gain(split[over].evaluation, split[method].evaluation, measure, units=units, seed=seed)
            for split in whole
        ]
        _, low, high = mean_interval([each.interval for each in spreads], likeness(share, units))
        is_enough = all(each.is_enough for each in spreads)
        ends = (low, high) if is_enough and low is not None and high is not None else None
        values = tuple(each.value for each in spreads)
        found.append(Gain(method, over, measure, values, ends, min(e.units for e in spreads)))
    return found
