"""Judge a change of placement: its gain, the groups that lose, and whether that may be chance.

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
from moetuner.evaluation.halves import halve, halve_each
from moetuner.evaluation.halves.halved import Halved
from moetuner.evaluation.intervals import CONFIDENCE, FEWEST, Spread, adjust_by_holm, compute_change
from moetuner.evaluation.options import ReplayOptions
from moetuner.evaluation.samples import Samples, find_samples
from moetuner.frozen import Frozen, as_json, html_table
from moetuner.placement import Placement, contiguous
from moetuner.serving import Serving, make_serving
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
    """Comparisons of two placements on the same traffic: all of it, and every group.

    Parameters
    ----------
    before, after
        Evaluations of both placements.
    measure
        Name of the figure that the verdict is about.
    whole
        Comparisons of all traffic, by figure.
    groups
        Comparisons of every group that has tokens or windows, by figure; empty without groups.
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
        """The gain of all traffic and its interval, in words."""
        return self.gain.sentence

    @property
    def gain(self) -> Comparison:
        """Comparison of all traffic in the figure that the verdict is about."""
        return self.whole[self.measure]

    # Programs outside the package read an advice's by this name.
    @property
    def figures(self) -> Comparisons:
        """Comparisons of all traffic, by figure: ``whole``."""
        return self.whole

    @property
    def gains(self) -> Comparisons:
        """Comparisons of all traffic in figures that were above 0 before."""
        return {name: comparison for name, comparison in self.whole.items() if comparison.before}

    @property
    def window(self) -> int | None:
        """Tokens whose load is balanced together; None where windows are given."""
        return None if self.after.replayed is None else self.after.replayed.setting.window

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.after.imbalance_per_layer)

    @property
    def by_group(self) -> dict[str, Comparisons]:
        """Comparisons of groups; without groups those of all traffic, as group ``"all"``."""
        return self.groups or {"all": self.whole}

    @property
    def too_few(self) -> dict[str, int]:
        """Groups that have fewer than five units, too few for a conclusion, and their number."""
        numbers = {
            name: next(iter(comparisons.values())).units
            for name, comparisons in self.by_group.items()
        }
        return {name: number for name, number in numbers.items() if number < FEWEST}

    def worse(self, than: float = 0.0, *, measures: Collection[str] = ()) -> list[Comparison]:
        """Return groups that got worse by more than the share ``than``, the worst first.

        A group counts if its adjusted p-value is at most 5 %: where no group is worse or behind,
        nineteen of twenty judgements name none. Without groups, all traffic is one group.
        """
        worse = [
            comparison
            for comparison in self._select_comparisons(than, measures)
            if comparison.chance <= 1 - CONFIDENCE
            # Anything is more than any share of 0.
            and _is_above(comparison.change, than if comparison.before else 0.0)
        ]
        return sorted(worse, key=lambda comparison: -comparison.change.value)

    def behind(self, than: float = 0.0, *, measures: Collection[str] = ()) -> list[Comparison]:
        """Return groups that gain less than the best group by more than the share ``than``."""
        behind = [
            (comparison.behind.value, comparison)
            for comparison in self._select_comparisons(than, measures)
            if comparison.behind is not None
            and comparison.behind_chance <= 1 - CONFIDENCE
            and _is_above(comparison.behind, than)
        ]
        return [comparison for _, comparison in sorted(behind, key=lambda pair: -pair[0])]

    def _select_comparisons(self, than: float, measures: Collection[str]) -> list[Comparison]:
        """Return the comparisons of every group in some measures, by default in all."""
        if not check.is_number(than):
            raise ValueError(f"than must be a finite number, got {check.shown(than)}")
        measures = check.listed("measures", measures, "names")
        for measure in measures:
            check.one_of("measures", measure, self.whole)
        return [
            comparisons[name]
            for comparisons in self.by_group.values()
            for name in measures or self.whole
            if name in comparisons  # figures without halves are those of all traffic only
        ]

    def _repr_html_(self) -> str:
        head = ("measure", "group", "before", "after", "change", "from", "to")
        rows: list[tuple[Any, ...]] = [
            (
                name,
                group,
                comparisons[name].before,
                comparisons[name].after,
                *comparisons[name].change.to_dict().values(),
            )
            for name in self.whole
            for group, comparisons in {"all": self.whole, **self.groups}.items()
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
        length = None if units is None else units.autocorrelation.correlation_length
        name = None if units is None else units.name
        return {"kind": name, "number": self.gain.units, "block_length": length}


def _is_above(change: Spread | None, least: float) -> bool:
    """Return whether a change is larger than a share, and its interval above 0."""
    if change is None or change.low is None:
        return False
    return change.low > 0 and change.value > least


def _list_names(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the group and figure of every comparison, as JSON values."""
    return [
        {"group": comparison.group, "measure": comparison.measure} for comparison in comparisons
    ]


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
    """Compare the evaluations of two placements on the same traffic, figure by figure.

    Every command and every page shows this judgement.

    Parameters
    ----------
    before, after
        Evaluations of both placements on the same traffic.
    figure
        Name of the figure that the verdict is about; by default the one that the second placement
        was solved for, where its settings name it. Where the traffic does not have that figure, the
        predicted time or, without one, the imbalance.
    measures
        Names of figures to compare, besides that one; by default all that have intervals.
    by_group
        If True, compare the groups of the traffic, too.
    units
        Independent samples of the whole recording; by default those of the traffic itself.
    price
        Share up to which a gain is not worth the trouble of a change.
    names
        Names of the two placements.
    progress
        Called with the share of the comparison that is done.

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
    >>> before, after = (mt.evaluate(placement, traffic) for placement in (blocks, better))
    >>> judgement = mt.judge(before, after, names=("blocks", "better"))
    >>> judgement.gain.sentence
    'better has 16.5 % less predicted MoE layer time than blocks (95 % interval 16.5 to 16.5 %).'
    """
    for side, evaluation in (("before", before), ("after", after)):
        check.instance(side, evaluation, Evaluation, hint=", such as evaluate(placement, trace)")
    check.share("price", price)
    check.flag("by_group", by_group)
    check.callable_or_none("progress", progress)
    if units is not None:
        check.instance("units", units, Samples)
    if figure is not None:
        check.one_of("figure", figure, FIGURES)
    measures = check_measures(measures)
    _check_names(names)
    both, measure = (before, after), _choose_figure(before, after, figure)
    changes: dict[str | None, dict[str, Spread]] = {None: {}}
    if before.replayed is not None and after.replayed is not None:
        units = _find_samples(after.replayed) if units is None else units
        halved_names = {*measures, measure, "imbalance"} if measures else None
        changes = _measure_changes(
            before.replayed,
            after.replayed,
            units,
            by_group=by_group,
            names=halved_names,
            progress=progress,
        )
    compared: dict[str | None, Comparisons] = {}
    for group, changes_of_group in changes.items():
        old, new = (
            evaluation if group is None else evaluation.by_group[group] for evaluation in both
        )
        compared_names = [name for name in changes_of_group if name in measures or not measures]
        if group is None:
            compared_names = [*dict.fromkeys((*compared_names, measure))]
        compared[group] = {
            name: _compare(name, old, new, changes_of_group.get(name), units, group, price, names)
            for name in compared_names
        }
    overall = compared.pop(None)
    groups = {group: comparisons for group, comparisons in compared.items() if group is not None}
    judged = _judge_groups(groups or {"all": overall})
    return Judgement(
        before,
        after,
        measure,
        overall if groups else judged["all"],
        judged if groups else {},
        units,
    )


def _choose_figure(before: Evaluation, after: Evaluation, figure: str | None) -> str:
    """Return the figure of the verdict: as named, or what the second placement was solved for.

    Where an evaluation lacks it, the verdict is on the predicted time or else the imbalance.
    """
    if figure is None and after.replayed is not None:
        solved_for = after.replayed.setting.placement.settings.get("figure")
        figure = solved_for if isinstance(solved_for, str) else None
    choices = [name for name in (figure, "predicted_layer_us", "imbalance") if name in FIGURES]
    return next(
        name
        for name in choices
        if all(getattr(evaluation, name) is not None for evaluation in (before, after))
    )


def check_measures(measures: Collection[str]) -> list[str]:
    """Check the names of figures to compare, and return them as a list."""
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
    """Compare two evaluations in a figure, given its change and interval from halves."""
    old, new = getattr(before, measure), getattr(after, measure)
    value = new / old - 1 if old else new - old
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
    """Compute changes of figures of all traffic (None), and of groups, by the same halves."""
    machines = [replace(replayed.setting.topology, name=None) for replayed in (before, after)]
    if machines[0] != machines[1]:
        raise ValueError("before and after must be of one machine: give evaluate() its topology")
    sizes = [f"{replayed.traffic.length} {replayed.traffic.unit}s" for replayed in (before, after)]
    # A group's halves are computed together with those of all traffic.
    by_group = by_group or None not in (before.group, after.group)
    with_old_placement = replace(after.setting, placement=before.setting.placement)
    if before.traffic is after.traffic and before.setting == with_old_placement:
        settings = [replayed.setting for replayed in (before, after)]
        both = halve_each(
            after.traffic, settings, samples, by_group=by_group, names=names, progress=progress
        )
    else:
        both = [
            halve(replayed.traffic, replayed.setting, samples, by_group=by_group, names=names)
            for replayed in (before, after)
        ]
    if before.group is not None:
        both = [{None: figures[before.group]} for figures in both]
    numbers = [figures[None]["imbalance"].folds.units for figures in both]
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
    """Adjust the probabilities of all groups' changes, and of their lags behind the best group.

    All of them are one family of tests.
    """
    judged = {group: dict(comparisons) for group, comparisons in groups.items()}
    changed: list[tuple[str, str, float]] = []
    behind: list[tuple[str, str, float]] = []
    for measure in next(iter(groups.values())):
        enough = {
            group: comparisons[measure].change
            for group, comparisons in groups.items()
            if not comparisons[measure].is_too_few
        }
        # Differences from 0 and shares do not compare.
        shares = {group: enough[group] for group in enough if groups[group][measure].before}
        # The best group has the best upper bound: a small group may seem to gain most by chance.
        best = min(shares, key=lambda group: shares[group].high or 0.0, default="")
        for group, change in enough.items():
            changed.append((group, measure, change.p_value))
            if group in shares and group != best:
                lag = change - enough[best]
                judged[group][measure] = replace(judged[group][measure], behind=lag)
                # The best was selected among all others (Bonferroni).
                chance = min((len(shares) - 1) * lag.p_value, 1.0)
                behind.append((group, measure, chance))
    chances = adjust_by_holm([chance for _, _, chance in (*changed, *behind)])
    for (group, measure, _), chance in zip(changed, chances[: len(changed)], strict=True):
        judged[group][measure] = replace(judged[group][measure], chance=chance)
    for (group, measure, _), chance in zip(behind, chances[len(changed) :], strict=True):
        judged[group][measure] = replace(judged[group][measure], behind_chance=chance)
    return judged


def verdict(before: Evaluation, after: Evaluation, *, price: float = PRICE) -> Comparison:
    """Compare the evaluations of two placements, and conclude whether a change is worth it.

    The figure is that which the second placement was solved for, as in ``judge``.

    Parameters
    ----------
    before, after
        Evaluations of both placements on the same traffic.
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
    >>> before, after = (mt.evaluate(placement, traffic) for placement in (blocks, better))
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
    """Compare a placement with a baseline on every group of the traffic.

    Every group is replayed by itself, in windows of its own tokens, under both placements.
    Intervals come from the differences of halves of the traffic: halves of whole sequences or,
    without sequence labels, of runs of windows. Both placements have the same halves, so what they
    have in common cancels. Probabilities are corrected for the number of groups and measures
    (Holm's method).

    Parameters
    ----------
    placement
        Placement to audit.
    traffic
        A trace; or a load table, which gives imbalance and time only.
    topology
        Nodes and speeds of the devices; by default those that the placement was computed for, where
        its settings have them, else one node of equal devices.
    baseline
        Placement to compare with; experts in blocks by default, as engines place them.
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
        Names of figures to compare; by default all that the traffic gives.
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
    serving = make_serving(
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
    measured = [name for name in measures if getattr(after, name) is not None]
    if measures and not measured:
        raise check.ArgumentError(
            f"measures must be figures that the traffic has, got {','.join(measures)}", "measures"
        )
    return judge(
        before,
        after,
        figure=next(iter(measured), None),
        measures=measured,
        by_group=True,
        units=units,
    )
