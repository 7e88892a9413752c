"""audit(): whom a placement serves worse, group by group, and whether that may be chance.

An optimiser that is neutral on average can serve some traffic worse. To measure the outcomes of a
neutral optimisation group by group, whatever its intent, is the idea of Ali et al., "Discrimination
through optimization: How Facebook's ad delivery can lead to biased outcomes" (CSCW 2019).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from moetuner import _checks as check
from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation
from moetuner.evaluation.arrival import Arrival
from moetuner.evaluation.copies import Split
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.halves import halve
from moetuner.evaluation.intervals import CONFIDENCE, FEWEST, Change, Spread, compare_halves, holm
from moetuner.evaluation.replay import Setting, Traffic, check_model, times_of, topology_of
from moetuner.evaluation.units import Units, units_of
from moetuner.frozen import Frozen, as_json, html_table
from moetuner.placement import Placement
from moetuner.statistics import WINDOW, RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

# Figures whose parts add up, so that groups have them.
MEASURES = tuple(name for name, figure in FIGURES.items() if figure.windows is not None)


class Finding(NamedTuple):
    """A group that a placement serves worse in one measure."""

    group: str
    measure: str
    change: Spread
    chance: float


@dataclass(frozen=True, eq=False, repr=False)
class Audit(Frozen):
    """Outcomes of a placement beside those of a baseline.

    Parameters
    ----------
    whole
        Measures of all traffic, by name.
    groups
        The same of every group that has tokens or windows.
    units
        What is independent, sequences, or windows where those are not known, and how many there are
        in all traffic.
    block_length
        Windows over which neighbours are alike; 1 where they are not.
    too_few
        Groups of which nothing is said, as they have fewer than five units, and how many they have;
        without groups all traffic, called ``"all"``.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> audited = mt.audit(mt.Placement([[[0, 2], [1, 3]]]), statistics)
    >>> audited.whole["imbalance"].baseline.value, audited.whole["imbalance"].value.value
    (1.5, 1.25)
    >>> audited.too_few
    {'all': 1}
    """

    whole: dict[str, Change]
    groups: dict[str, dict[str, Change]]
    units: tuple[str, int]
    too_few: dict[str, int] = field(default_factory=dict)
    block_length: int = 1

    def worse(self, than: float = 0.0, *, measures: tuple[str, ...] = ()) -> list[Finding]:
        """Name groups that got worse by more than a share, beyond chance; the worst first.

        Beyond chance: where no group is worse, and none is behind, nineteen of twenty audits name
        nobody. Without groups all traffic is one, called ``"all"``.
        """
        return self._findings("change", "chance", than, measures)

    def behind(self, than: float = 0.0, *, measures: tuple[str, ...] = ()) -> list[Finding]:
        """Name groups that gain less than the best served one by more than a share."""
        return self._findings("behind", "behind_chance", than, measures)

    def _findings(
        self, which: str, chance: str, than: float, measures: tuple[str, ...]
    ) -> list[Finding]:
        if not check.is_number(than):
            raise ValueError(f"than must be a finite number, got {check.shown(than)}")
        measures = tuple(check.listed("measures", measures, "names"))
        for measure in measures:
            check.one_of("measures", measure, self.whole)
        findings = []
        for group, changes in (self.groups or {"all": self.whole}).items():
            for measure in measures or self.whole:
                change: Spread | None = getattr(changes[measure], which)
                surely = getattr(changes[measure], chance)
                if change is None or change.low is None or surely > 1 - CONFIDENCE:
                    continue
                if change.low > 0 and change.value > than:
                    findings.append(Finding(group, measure, change, surely))
        return sorted(findings, key=lambda finding: -finding.change.value)

    def _repr_html_(self) -> str:
        head = ("measure", "group", "baseline", "placement", "change", "from", "to")
        by_group = {"all": self.whole, **self.groups}
        rows: list[tuple[Any, ...]] = []
        for measure in self.whole:
            for group, changes in by_group.items():
                value, baseline, change = changes[measure][:3]
                ends = (None, None, None) if change is None else change.to_dict().values()
                rows.append((measure, group, baseline.value, value.value, *ends))
        return html_table(head, rows)

    def to_dict(self) -> dict[str, Any]:
        """Return fields as JSON values; intervals are value, low and high."""
        fields: dict[str, Any] = as_json(
            {
                "whole": self.whole,
                "groups": self.groups,
                "units": dict(zip(("kind", "number"), self.units, strict=True)),
                "block_length": self.block_length,
                "too_few": self.too_few,
                "worse": self.worse(),
                "behind": self.behind(),
            }
        )
        return fields


def audit(
    placement: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | None = None,
    *,
    baseline: Placement | None = None,
    window: int = WINDOW,
    cost_model: CostModel | Literal["model"] | None = "model",
    regime: Regime = "dispatch",
    split: Split = "even",
    arrival: Arrival = "bursts",
    threads: int | None = None,
    units: Units | None = None,
    measures: Collection[str] = (),
) -> Audit:
    """Compare a placement with a baseline for every group of the traffic.

    Every group is replayed by itself, in windows of its own tokens, under both placements.
    Intervals tell how far halves of the whole sequences are apart; where these are not known,
    halves of runs of windows that are longer than neighbours are alike. Both placements have the
    same halves, so what they have in common does not blur the change. What is named is corrected
    for the number of groups and measures (Holm's way).

    Parameters
    ----------
    placement
        What to audit.
    traffic
        A trace; or a load table, which tells imbalance and time only.
    topology
        Nodes and speeds of the devices; by default those that the placement was computed for, where
        its settings have them, else one node of equal devices.
    baseline
        What to compare with; experts in blocks by default, as engines place them.
    window
        Tokens per window of a trace.
    cost_model, regime, split, arrival
        As in ``evaluate``.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    units
        What is independent in the traffic; by default what ``units_of`` finds in it. Give that of a
        whole recording to audit a part of it.
    measures
        Measures to compare, of those that the traffic tells; all by default.

    Raises
    ------
    ValueError
        If placements, traffic and topology are not of one model and machine.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.tile([[8, 4, 2, 2]], (10, 1, 1))  # ten windows of one layer
    >>> audited = mt.audit(mt.Placement([[[0, 2], [1, 3]]]), mt.RoutingStatistics.from_load(load))
    >>> audited.worse()
    []
    >>> round(audited.whole["imbalance"].change.value, 3)
    -0.167
    """
    topology = topology_of(placement, topology)
    baseline = contiguous(placement) if baseline is None else baseline
    check.instance("baseline", baseline, Placement)
    check.whole_number("window", window)
    cost_model = times_of(traffic, cost_model)
    settings = [
        Setting(
            each,
            topology,
            window=window,
            split=split,
            cost_model=cost_model,
            regime=regime,
            arrival=arrival,
            mixed=False,
            threads=threads,
        )
        for each in (placement, baseline)
    ]
    for setting in settings:
        check_model(setting.placement, traffic, topology)
    if isinstance(traffic, RoutingTrace) and not traffic.tokens:
        raise ValueError("traffic must have tokens to audit, got a trace of 0")
    if units is not None:
        check.instance("units", units, Units)
    measures = check.listed("measures", measures, "names")
    for measure in measures:
        check.one_of("measures", measure, MEASURES)
    return _audit(traffic, settings, units, measures)


def audit_of(
    before: Evaluation,
    after: Evaluation,
    units: Units | None = None,
    measures: Collection[str] = (),
) -> Audit:
    """Compare two evaluations for every group of their traffic, in windows as they have."""
    first, second = before.replayed, after.replayed
    assert first is not None
    assert second is not None
    return _audit(first.traffic, [second.setting, first.setting], units, measures)


def _audit(
    traffic: Traffic,
    settings: list[Setting],
    units: Units | None,
    measures: Collection[str],
) -> Audit:
    """Audit the first of two placements against the second one."""
    if units is None:
        units = units_of(traffic, window=settings[0].window, threads=settings[0].threads)
    after, before = (halve(traffic, setting, units) for setting in settings)
    compared = {}
    for group, figures in after.items():
        changes = compare_halves(figures, before[group]).items()
        compared[group] = {
            name: change for name, change in changes if name in measures or not measures
        }
    overall = compared.pop(None)
    if not overall:
        raise check.ArgumentError(
            f"measures must be figures that the traffic has, got {','.join(measures)}", "measures"
        )
    groups = {group: changes for group, changes in compared.items() if group is not None}
    judged = _judge(groups or {"all": overall})
    numbers = {name: next(iter(each.values())).value.units for name, each in judged.items()}
    return Audit(
        overall if groups else judged["all"],
        judged if groups else {},
        (units.name, next(iter(overall.values())).value.units),
        {name: number for name, number in numbers.items() if number < FEWEST},
        units.blocks.length,
    )


def contiguous(placement: Placement) -> Placement:
    """Return experts in blocks on the devices of a placement, one copy each."""
    return blocks(placement.layers, placement.num_experts, placement.devices)


def blocks(layers: int, experts: int, devices: int) -> Placement:
    """Return experts in blocks, one copy each; the first devices take what is left over."""
    sizes = experts // devices + (np.arange(devices) < experts % devices)
    device_of = np.repeat(np.arange(devices), sizes)
    return Placement.from_assignment(np.tile(device_of, (layers, 1)), devices)


def _judge(groups: dict[str, dict[str, Change]]) -> dict[str, dict[str, Change]]:
    """Judge all changes of all groups, and how far each is behind the best, as one family."""
    judged = {group: dict(changes) for group, changes in groups.items()}
    questions: list[tuple[str, str, str]] = []
    chances: list[float] = []
    for measure in next(iter(groups.values())):
        enough = {
            group: change
            for group, changes in groups.items()
            if (change := changes[measure].change) is not None and change.is_enough
        }
        # Best is whose gain is surest: a small group may seem to gain most by chance.
        best = min(enough, key=lambda group: enough[group].high or 0.0, default="")
        for group, own in enough.items():
            questions.append((group, measure, "chance"))
            chances.append(own.chance)
            if group != best:
                behind = own - enough[best]
                judged[group][measure] = judged[group][measure]._replace(behind=behind)
                questions.append((group, measure, "behind_chance"))
                # The best was picked out of all others, for being far from this one.
                chances.append(min((len(enough) - 1) * behind.chance, 1.0))
    for (group, measure, which), chance in zip(questions, holm(chances), strict=True):
        judged[group][measure] = judged[group][measure]._replace(**{which: chance})  # type: ignore[arg-type]
    return judged
