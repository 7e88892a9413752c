"""audit(): whom a placement serves worse, group by group, and whether that may be chance.

An optimiser that is neutral on average can serve some traffic worse. To measure the outcomes of a
neutral optimisation group by group, whatever its intent, is the idea of Ali et al., "Discrimination
through optimization: How Facebook's ad delivery can lead to biased outcomes" (CSCW 2019).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._bootstrap import Interval, interval, resampled
from moetuner._counts import Rules
from moetuner._figures import Regime
from moetuner._validation import whole_number
from moetuner._windows import Measures, of_traffic, units_of
from moetuner.cost import CostModel
from moetuner.evaluation import check_model
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

WINDOW = 512
RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """One measure of one group, under a placement and under the baseline.

    Parameters
    ----------
    value, baseline
        The measure under both; lower is better for all of them.
    change
        Relative: 0.1 is ten percent worse. None where the baseline is 0.
    behind
        How much less of an improvement this is than that of the group which gains most surely (by
        the upper end of its interval): the difference of their changes. None for that group itself,
        and without groups.
    """

    value: Interval
    baseline: Interval
    change: Interval | None
    behind: Interval | None = None


@dataclass(frozen=True)
class Finding:
    """A group that a placement serves worse in one measure."""

    group: str
    measure: str
    change: Interval


@dataclass(frozen=True)
class Audit:
    """Outcomes of a placement beside those of a baseline.

    Parameters
    ----------
    whole
        Measures of all traffic, by name.
    groups
        The same of every group that has tokens or windows.
    units
        What was resampled for the intervals, and how many there are in all traffic: windows, or
        where sequences are known blocks, which are the windows of one sequence or of short ones a
        window.
    """

    whole: dict[str, Change]
    groups: dict[str, dict[str, Change]]
    units: tuple[str, int]

    def worse(self, than: float = 0.0, *, measures: tuple[str, ...] = ()) -> list[Finding]:
        """Name groups that got worse by more than a share, beyond chance; the worst first.

        Beyond chance: the interval of the change excludes 0. Where a group has no interval (one
        sequence, one window), its change counts as it is. Without groups all traffic is one,
        called ``"all"``.
        """
        return self._findings("change", than, measures)

    def behind(self, than: float = 0.0, *, measures: tuple[str, ...] = ()) -> list[Finding]:
        """Name groups that gain less than the best served one by more than a share."""
        return self._findings("behind", than, measures)

    def _findings(self, which: str, than: float, measures: tuple[str, ...]) -> list[Finding]:
        found = []
        for group, changes in (self.groups or {"all": self.whole}).items():
            for measure, each in changes.items():
                change: Interval | None = getattr(each, which)
                if change is None or (measures and measure not in measures):
                    continue
                if change.is_above_zero and change.value > than:
                    found.append(Finding(group, measure, change))
        return sorted(found, key=lambda each: -each.change.value)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values; intervals are value, low and high."""
        fields = asdict(self)
        return {
            "all": {name: _plain(change) for name, change in fields["whole"].items()},
            "by_group": {
                group: {name: _plain(change) for name, change in changes.items()}
                for group, changes in fields["groups"].items()
            },
            "units": {"kind": self.units[0], "number": self.units[1]},
            "worse": [_plain(asdict(each)) for each in self.worse()],
            "behind": [_plain(asdict(each)) for each in self.behind()],
        }


def audit(
    placement: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | None = None,
    *,
    baseline: Placement | None = None,
    window: int = WINDOW,
    cost_model: CostModel | None = None,
    regime: Regime = "dispatch",
    resamples: int = RESAMPLES,
    seed: int = 0,
    threads: int | None = None,
) -> Audit:
    """Compare a placement with a baseline for every group of the traffic.

    Every group is replayed by itself, in windows of its own tokens, under both placements; copies
    of an expert share its tokens evenly. Intervals are of a bootstrap over sequences: a window goes
    with the sequence that has most of its tokens, so that a long one stays whole. Both placements
    see the same resamples, so what they have in common does not blur the change.

    Parameters
    ----------
    placement
        What to audit.
    traffic
        A trace; or a load table, whose windows are resampled and which tells imbalance and time
        only.
    topology
        Nodes and speeds of the devices; one node of equal devices by default.
    baseline
        What to compare with; experts in blocks by default, as engines place them.
    window
        Tokens per window of a trace.
    cost_model, regime
        As in ``evaluate``; without a cost model no times are compared.
    resamples
        Number of resamples.
    seed
        Of the resamples.
    threads
        Threads to use, all cores by default; the answer does not depend on it.

    Raises
    ------
    ValueError
        If placements, traffic and topology are not of one model and machine.
    """
    topology = topology or Topology(placement.devices)
    baseline = baseline or contiguous(placement)
    for each in (placement, baseline):
        check_model(each, traffic, topology)
    if isinstance(traffic, RoutingTrace) and not traffic.tokens:
        raise ValueError("traffic must have tokens to audit, got a trace of 0")
    whole_number("window", window)
    whole_number("resamples", resamples, highest=1 << 20)
    with_active = cost_model is not None and cost_model.expert_us > 0
    mine, theirs = (
        of_traffic(
            traffic,
            Rules(each, topology, window, "even", with_active, threads, with_mixed=False),
            cost_model,
            regime,
        )
        for each in (placement, baseline)
    )
    units = units_of(traffic, window)
    changes: dict[str | None, dict[str, Change]] = {}
    samples: dict[str | None, dict[str, Floats]] = {}
    for number, (name, unit) in enumerate(units.items()):
        # Streams of their own, so that groups are resampled independently.
        rng = np.random.default_rng([seed, number])
        changes[name], samples[name] = _compared(mine[name], theirs[name], unit, resamples, rng)
    whole = changes.pop(None)
    groups = {str(name): change for name, change in changes.items()}
    kind = "window"
    if isinstance(traffic, RoutingTrace) and traffic.sequence is not None:
        kind = "block"
    number = len(np.unique(units[None]))
    return Audit(whole, _with_behind(groups, samples), (kind, number))


def contiguous(placement: Placement) -> Placement:
    """Experts in blocks on the devices of a placement, one copy each."""
    device_of = np.arange(placement.num_experts) * placement.devices // placement.num_experts
    return Placement.from_assignment(np.tile(device_of, (placement.layers, 1)), placement.devices)


def _compared(
    placement: Measures,
    baseline: Measures,
    unit: NDArray[np.int64],
    resamples: int,
    rng: np.random.Generator,
) -> tuple[dict[str, Change], dict[str, Floats]]:
    """Give changes of every measure, and the resampled changes they were judged by."""
    changes, samples = {}, {}
    for name in placement:
        columns = np.stack([*placement[name], *baseline[name]], axis=1)
        total = columns.sum(axis=0)
        drawn = resampled(columns, unit, resamples, rng)
        value, before = float(total[0] / total[1]), float(total[2] / total[3])
        values, befores = drawn[:, 0] / drawn[:, 1], drawn[:, 2] / drawn[:, 3]
        change = None
        if before > 0:
            samples[name] = values / np.maximum(befores, 1e-300) - 1
            change = interval(value / before - 1, samples[name])
        changes[name] = Change(interval(value, values), interval(before, befores), change)
    return changes, samples


def _with_behind(
    groups: dict[str, dict[str, Change]], samples: dict[str | None, dict[str, Floats]]
) -> dict[str, dict[str, Change]]:
    """Compare every group's change with that of the group that improved most, per measure."""
    found = {group: dict(changes) for group, changes in groups.items()}
    for measure in next(iter(groups.values()), {}):
        known = {
            group: change.change
            for group, changes in groups.items()
            if (change := changes[measure]).change is not None
        }
        if len(known) < 2:
            continue
        # Best is whose gain is surest: a small group may seem to gain most by chance.
        best = min(known, key=lambda group: _at_worst(known[group]))
        for group, own in known.items():
            if group == best:
                continue
            mine, theirs = samples[group][measure], samples[best][measure]
            spread = mine - theirs if mine.size == theirs.size else np.empty(0)
            behind = interval(own.value - known[best].value, spread)
            found[group][measure] = replace(found[group][measure], behind=behind)
    return found


def _at_worst(change: Interval) -> float:
    return change.value if change.high is None else change.high


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Write intervals as objects."""
    return {
        name: dict(zip(("value", "low", "high"), entry, strict=True))
        if isinstance(entry, tuple)
        else entry
        for name, entry in fields.items()
    }
