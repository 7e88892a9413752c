"""Judgement: what a change of placement does to traffic, to whom, and whether that may be chance.

An optimiser that is neutral on average can serve some traffic worse. To measure the outcomes of a
neutral optimisation group by group, whatever its intent, is the idea of Ali et al., "Discrimination
through optimization: How Facebook's ad delivery can lead to biased outcomes" (CSCW 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moetuner import _checks as check
from moetuner.cost import CostModel
from moetuner.evaluation import Evaluation, Replayed, evaluate_each
from moetuner.evaluation.comparison import PRICE, Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.halves import Halved, halve, halve_each
from moetuner.evaluation.intervals import CONFIDENCE, FEWEST, Spread, adjust_by_holm, compute_change
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.samples import Samples, find_samples
from moetuner.frozen import Frozen, as_json, html_table
from moetuner.placement import Placement, contiguous
from moetuner.serving import Serving, serving_of
from moetuner.serving.arrival import Arrival
from moetuner.serving.splits import Split
from moetuner.statistics import WINDOW, RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

# Figures whose parts add up, so that groups have them.
MEASURES = tuple(name for name, figure in FIGURES.items() if figure.windows is not None)

Comparisons = dict[str, Comparison]


@dataclass(frozen=True, eq=False, repr=False)
class Judgement(Frozen):
    """What changing from one placement to another does to the same traffic.

    Parameters
    ----------
    before, after
        What ``evaluate`` said of both.
    measure
        The figure that the verdict is on.
    whole
        All traffic, by figure.
    groups
        Every group that has tokens or windows, by figure; empty where groups were not asked for.
    units
        Independent samples of the traffic; None where they are not known any more.

    Examples
    --------
    >>> import moetuner as mt
    >>> statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    >>> judgement = mt.audit(mt.Placement([[[0, 2], [1, 3]]]), statistics)
    >>> judgement.whole["imbalance"].before, judgement.whole["imbalance"].after
    (1.5, 1.25)
    >>> judgement.too_few
    {'all': 1}
    """

    before: Evaluation = field(repr=False)
    after: Evaluation = field(repr=False)
    measure: str
    whole: Comparisons
    groups: dict[str, Comparisons] = field(default_factory=dict)
    units: Samples | None = field(default=None, repr=False)

    _also_shown = ("sentence",)

    @property
    def sentence(self) -> str:
        """What all traffic gains, and how sure that is."""
        return self.gain.sentence

    @property
    def gain(self) -> Comparison:
        """What all traffic gains, in the figure that the verdict is on."""
        return self.whole[self.measure]

    # Programs outside the package read an advice's by this name.
    @property
    def figures(self) -> Comparisons:
        """All traffic, by figure, which is ``whole``."""
        return self.whole

    @property
    def gains(self) -> Comparisons:
        """Figures of which there is something to save."""
        return {name: each for name, each in self.whole.items() if each.before}

    @property
    def window(self) -> int | None:
        """Tokens whose load is balanced together; None where windows are given."""
        return None if self.after.replayed is None else self.after.replayed.setting.window

    @property
    def layers(self) -> int:
        """Layers of a step."""
        return len(self.after.imbalance_per_layer)

    @property
    def by_group(self) -> dict[str, Comparisons]:
        """Comparisons of groups; without groups all traffic is one, called ``"all"``."""
        return self.groups or {"all": self.whole}

    @property
    def too_few(self) -> dict[str, int]:
        """Groups of which nothing is said, as they have fewer than five units, and how many."""
        numbers = {name: next(iter(own.values())).units for name, own in self.by_group.items()}
        return {name: number for name, number in numbers.items() if number < FEWEST}

    def worse(self, than: float = 0.0, *, measures: Collection[str] = ()) -> list[Comparison]:
        """Return groups that got worse by more than a share, beyond chance; the worst first.

        Beyond chance: where no group is worse, and none is behind, nineteen of twenty judgements
        name nobody. Without groups all traffic is one.
        """
        named = [
            each
            for each in self._select_comparisons(than, measures)
            if each.chance <= 1 - CONFIDENCE and _is_above(each.change, than)
        ]
        return sorted(named, key=lambda each: -each.change.value)

    def behind(self, than: float = 0.0, *, measures: Collection[str] = ()) -> list[Comparison]:
        """Return groups that gain less than the best served one by more than a share."""
        named = [
            each
            for each in self._select_comparisons(than, measures)
            if each.behind_chance <= 1 - CONFIDENCE and _is_above(each.behind, than)
        ]
        return sorted(named, key=lambda each: -each.behind.value if each.behind else 0.0)

    def _select_comparisons(self, than: float, measures: Collection[str]) -> list[Comparison]:
        """Return the comparisons of every group in some measures, by default in all."""
        if not check.is_number(than):
            raise ValueError(f"than must be a finite number, got {check.shown(than)}")
        measures = check.listed("measures", measures, "names")
        for measure in measures:
            check.one_of("measures", measure, self.whole)
        return [
            own[name]
            for own in self.by_group.values()
            for name in measures or self.whole
            if name in own  # what has no halves is of all traffic alone
        ]

    def _repr_html_(self) -> str:
        head = ("measure", "group", "before", "after", "change", "from", "to")
        rows: list[tuple[Any, ...]] = [
            (name, group, own[name].before, own[name].after, *own[name].change.to_dict().values())
            for name in self.whole
            for group, own in {"all": self.whole, **self.groups}.items()
        ]
        return html_table(head, rows)

    def to_dict(self) -> dict[str, Any]:
        """Return comparisons as JSON values, without both evaluations."""
        fields: dict[str, Any] = as_json(
            {
                "window": self.window,
                "measure": self.measure,
                "answer": self.gain.answer,
                "whole": self.whole,
                "groups": self.groups,
                "units": self._describe_samples(),
                "too_few": self.too_few,
                "worse": _list_names(self.worse()),
                "behind": _list_names(self.behind()),
            }
        )
        return fields

    def _describe_samples(self) -> dict[str, Any]:
        """Return the kind and number of independent samples of the traffic, as JSON values."""
        units = self.units
        length = None if units is None else units.blocks.correlation_length
        name = None if units is None else units.name
        return {"kind": name, "number": self.gain.units, "block_length": length}


def _is_above(change: Spread | None, least: float) -> bool:
    """Return whether a change is surely positive, and larger than a share."""
    if change is None or change.low is None:
        return False
    return change.low > 0 and change.value > least


def _list_names(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return groups and figures, which say where comparisons stand, as JSON values."""
    return [{"group": each.group, "measure": each.measure} for each in comparisons]


def judge(
    before: Evaluation,
    after: Evaluation,
    *,
    figure: str | None = None,
    measures: Collection[str] = (),
    by_group: bool = False,
    units: Samples | None = None,
    price: float = PRICE,
    names: tuple[str, str] = ("before", "after"),
    progress: Callable[[float], None] | None = None,
) -> Judgement:
    """Return what a change of placement does, by what both placements do to the same traffic.

    Every command and every page shows what this returns.

    Parameters
    ----------
    before, after
        What ``evaluate`` said of the same traffic.
    figure
        The figure that the verdict is on; by default the one that the second placement was solved
        for, where its settings say it. Where the traffic does not tell that, the predicted time or,
        without one, the imbalance.
    measures
        Figures to compare, besides that one; by default all whose parts add up.
    by_group
        Whether to compare the groups of the traffic too.
    units
        Independent samples of the whole recording; by default those of the traffic itself.
    price
        Share up to which a gain is not worth the trouble of a change.
    names
        Names of the two placements.
    progress
        Called now and then with the share of the comparison that is done.

    Raises
    ------
    ValueError
        If the evaluations are not of the same traffic and machine.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> traffic = mt.RoutingStatistics.from_load(np.tile([[8000, 4000, 2000, 2000]], (10, 1, 1)))
    >>> blocks, better = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
    >>> before, after = (mt.evaluate(each, traffic) for each in (blocks, better))
    >>> judgement = mt.judge(before, after, names=("blocks", "better"))
    >>> judgement.gain.sentence
    'better has 16.5 % less predicted layer time than blocks (95 % interval 16.5 to 16.5 %).'
    """
    for side, each in (("before", before), ("after", after)):
        check.instance(side, each, Evaluation, hint=", such as evaluate(placement, trace)")
    check.share("price", price)
    check.flag("by_group", by_group)
    check.callable_or_none("progress", progress)
    if units is not None:
        check.instance("units", units, Samples)
    if figure is not None:
        check.one_of("figure", figure, FIGURES)
    measures = check_measures(measures)
    _check_names(names)
    if figure is None and after.replayed is not None:
        solved_for = after.replayed.setting.placement.settings.get("figure")
        figure = solved_for if isinstance(solved_for, str) else None
    both = (before, after)
    choices = [name for name in (figure, "predicted_layer_us", "imbalance") if name in FIGURES]
    measure = next(name for name in choices if None not in [getattr(each, name) for each in both])
    changes: dict[str | None, dict[str, Spread]] = {None: {}}
    if before.replayed is not None and after.replayed is not None:
        units = _find_samples(after.replayed) if units is None else units
        asked = {*measures, measure, "imbalance"} if measures else None
        changes = _measure_changes(
            before.replayed,
            after.replayed,
            units,
            by_group=by_group,
            names=asked,
            progress=progress,
        )
    compared: dict[str | None, Comparisons] = {}
    for group, own in changes.items():
        old, new = (each if group is None else each.by_group[group] for each in both)
        compared_names = [name for name in own if name in measures or not measures]
        if group is None:
            compared_names = [*dict.fromkeys((*compared_names, measure))]
        compared[group] = {
            name: _compare(name, old, new, own.get(name), units, group, price, names)
            for name in compared_names
        }
    overall = compared.pop(None)
    groups = {group: own for group, own in compared.items() if group is not None}
    judged = _judge_groups(groups or {"all": overall})
    return Judgement(
        before,
        after,
        measure,
        overall if groups else judged["all"],
        judged if groups else {},
        units,
    )


def check_measures(measures: Collection[str]) -> list[str]:
    """Return figures that are compared, checked."""
    listed = list(check.listed("measures", measures, "names"))
    for measure in listed:
        check.one_of("measures", measure, MEASURES)
    return listed


def _check_names(names: tuple[str, str]) -> None:
    """Raise unless there are two names."""
    labels = list(check.listed("names", names, "texts"))
    for label in labels:
        check.instance("names", label, str)
    if len(labels) != 2:
        raise check.ArgumentError(f"names must be two, got {len(labels)}", "names")


def _compare(
    measure: str,
    before: Evaluation,
    after: Evaluation,
    change: Spread | None,
    units: Samples | None,
    group: str | None,
    price: float,
    names: tuple[str, str],
) -> Comparison:
    """Compare two evaluations in a figure, whose change has the interval of its halves."""
    old, new = getattr(before, measure), getattr(after, measure)
    value = new / old - 1 if old else 0.0
    if change is None:
        change = Spread(value, None, 1, 0 if units is None else units.number)
    return Comparison(
        measure,
        old,
        new,
        replace(change, value=value),
        price=price,
        names=names,
        group="all" if group is None else group,
    )


def _find_samples(replayed: Replayed) -> Samples:
    """Return the independent samples of replayed traffic."""
    setting = replayed.setting
    return find_samples(replayed.traffic, window=setting.window, threads=setting.options.threads)


def _measure_changes(
    before: Replayed,
    after: Replayed,
    samples: Samples,
    *,
    by_group: bool,
    names: Collection[str] | None,
    progress: Callable[[float], None] | None = None,
) -> dict[str | None, dict[str, Spread]]:
    """Compute changes of some figures of all traffic (None), and of groups, from equal halves."""
    machines = [replace(each.setting.topology, name=None) for each in (before, after)]
    if machines[0] != machines[1]:
        raise ValueError("before and after must be of one machine: give evaluate() its topology")
    sizes = [f"{each.traffic.length} {each.traffic.unit}s" for each in (before, after)]
    # Halves of a group are those that are computed with all traffic.
    by_group = by_group or None not in (before.group, after.group)
    alone = replace(after.setting, placement=before.setting.placement)
    if before.traffic is after.traffic and before.setting == alone:
        settings = [each.setting for each in (before, after)]
        both = halve_each(
            after.traffic, settings, samples, by_group=by_group, names=names, progress=progress
        )
    else:
        both = [
            halve(each.traffic, each.setting, samples, by_group=by_group, names=names)
            for each in (before, after)
        ]
    if before.group is not None:
        both = [{None: each[before.group]} for each in both]
    numbers = [each[None]["imbalance"].folds.units for each in both]
    if sizes[0] != sizes[1] or numbers[0] != numbers[1]:
        raise ValueError(
            f"before and after must be of the same traffic, got {sizes[0]} and {sizes[1]}"
        )
    return {group: _change_figures(both[0][group], figures) for group, figures in both[1].items()}


def _change_figures(before: dict[str, Halved], after: dict[str, Halved]) -> dict[str, Spread]:
    """Compute changes of the figures that both have."""
    return {
        name: compute_change(before[name], figure)
        for name, figure in after.items()
        if name in before
    }


def _judge_groups(groups: dict[str, Comparisons]) -> dict[str, Comparisons]:
    """Judge all changes of all groups, and how far each is behind the best, as one family."""
    judged = {group: dict(own) for group, own in groups.items()}
    changed: list[tuple[str, str, float]] = []
    behind: list[tuple[str, str, float]] = []
    for measure in next(iter(groups.values())):
        enough = {
            group: own[measure].change
            for group, own in groups.items()
            if not own[measure].is_too_few
        }
        # Best is whose gain is surest: a small group may seem to gain most by chance.
        best = min(enough, key=lambda group: enough[group].high or 0.0, default="")
        for group, change in enough.items():
            changed.append((group, measure, change.chance))
            if group != best:
                apart = change - enough[best]
                judged[group][measure] = replace(judged[group][measure], behind=apart)
                # The best was picked out of all others, for being far from this one.
                chance = min((len(enough) - 1) * apart.chance, 1.0)
                behind.append((group, measure, chance))
    chances = adjust_by_holm([chance for _, _, chance in (*changed, *behind)])
    for (group, measure, _), chance in zip(changed, chances[: len(changed)], strict=True):
        judged[group][measure] = replace(judged[group][measure], chance=chance)
    for (group, measure, _), chance in zip(behind, chances[len(changed) :], strict=True):
        judged[group][measure] = replace(judged[group][measure], behind_chance=chance)
    return judged


def verdict(before: Evaluation, after: Evaluation, *, price: float = PRICE) -> Comparison:
    """Return whether a change of placement is worth it, by what both do to the same traffic.

    It is judged in the figure that the second placement was solved for, as ``judge`` does.

    Parameters
    ----------
    before, after
        What ``evaluate`` said of the same traffic.
    price
        Share up to which a gain is not worth the trouble of a change.

    Raises
    ------
    ValueError
        If ``price`` is not from 0 to 1, or the evaluations are not of the same traffic.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> traffic = mt.RoutingStatistics.from_load(np.tile([[8000, 4000, 2000, 2000]], (10, 1, 1)))
    >>> blocks, better = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
    >>> before, after = (mt.evaluate(each, traffic) for each in (blocks, better))
    >>> mt.verdict(before, after).answer
    'worth it'
    """
    return judge(before, after, price=price).gain


def audit(
    placement: Placement,
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | Serving | None = None,
    *,
    baseline: Placement | None = None,
    window: int = WINDOW,
    cost_model: CostModel | Literal["model"] | None = "model",
    regime: Regime = "dispatch",
    split: Split = "even",
    arrival: Arrival = "bursts",
    threads: int | None = None,
    units: Samples | None = None,
    measures: Collection[str] = (),
    waterfill: float | None = None,
) -> Judgement:
    """Return what a placement does to every group of the traffic, compared with a baseline.

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
        Independent samples of the traffic; found in it by default. Give those of a whole recording
        to audit a part of it.
    measures
        Measures to compare, of those that the traffic tells; all by default.
    waterfill
        As in ``evaluate``.

    Raises
    ------
    ValueError
        If placements, traffic and topology are not of one model and machine.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.tile([[8000, 4000, 2000, 2000]], (10, 1, 1))  # ten windows of one layer
    >>> audited = mt.audit(mt.Placement([[[0, 2], [1, 3]]]), mt.RoutingStatistics.from_load(load))
    >>> audited.worse()
    []
    >>> round(audited.whole["imbalance"].change.value, 3)
    -0.167
    """
    check.instance("placement", placement, Placement)
    serving = serving_of(
        traffic,
        topology,
        placement,
        window=window,
        split=split,
        cost_model=cost_model,
        regime=regime,
        arrival=arrival,
        waterfill=waterfill,
    )
    baseline = contiguous(placement) if baseline is None else baseline
    check.instance("baseline", baseline, Placement)
    check.whole_number("window", window)
    if units is not None:
        check.instance("units", units, Samples)
    measures = check_measures(measures)
    if not traffic.length:
        raise ValueError("traffic must have tokens to audit, got a trace of 0")
    pair = [baseline, placement]
    options = ReplayOptions(mixed=False, threads=threads)
    [(before, after)] = evaluate_each(pair, traffic, [serving], options)
    known = [name for name in measures if getattr(after, name) is not None]
    if measures and not known:
        raise check.ArgumentError(
            f"measures must be figures that the traffic has, got {','.join(measures)}", "measures"
        )
    return judge(
        before, after, figure=next(iter(known), None), measures=known, by_group=True, units=units
    )
