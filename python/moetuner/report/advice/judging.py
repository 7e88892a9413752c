"""Trials judged: the proposed placement beside what runs, in windows, halves, groups and phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moetuner.cost import busiest_ports
from moetuner.evaluation import evaluate
from moetuner.evaluation.comparison import Comparison, with_splits
from moetuner.evaluation.halves import halve_each
from moetuner.evaluation.intervals import Spread
from moetuner.evaluation.judgement import Judgement, judge
from moetuner.evaluation.replay import without_groups
from moetuner.evaluation.units import Units
from moetuner.placement import EMPTY, Placement
from moetuner.recording import Recording
from moetuner.report.advice.request import (
    Part,
    Request,
    Window,
    build_problem,
    count_traffic,
    search_shortly,
    split_recording,
)
from moetuner.report.advice.trial import (
    EPLB,
    PROPOSED,
    RUNNING,
    Key,
    Trial,
    evaluate_all,
    try_out,
)
from moetuner.report.advice.values import LpSplit, Moving, PhaseTimes
from moetuner.report.recording import PHASES
from moetuner.serving.splits import EVEN, Split
from moetuner.statistics import RoutingStatistics, count_loads

# Windows at most, at even distances, whose tokens are divided anew.
DIVIDED_WINDOWS = 256


def judge_trials(
    request: Request,
    trials: Sequence[Trial],
    key: Key,
    window: Window,
    units: Units,
    *,
    by_group: bool = False,
) -> Judgement:
    """Judge what is proposed beside another placement, with the first split's intervals."""
    evaluations = [trial.evaluations[window] for trial in trials]
    judgement = judge(
        evaluations[0][key],
        evaluations[0][PROPOSED],
        figure="predicted_layer_us",
        by_group=by_group,
        units=units,
        price=request.price,
        names=("running" if key == RUNNING else "EPLB", "proposed"),
    )
    pairs = [(each[key], each[PROPOSED]) for each in evaluations]
    comparisons = {name: with_splits(each, pairs) for name, each in judgement.whole.items()}
    return replace(judgement, whole=comparisons)


def compute_trial_halves(
    request: Request, trial: Trial, keys: Sequence[Key], *, by_group: bool
) -> None:
    """Compute halves of some placements' figures in windows of all sizes at once.

    The tokens are read once for all of them; judgements then know these halves.
    """
    units = [request.units[window] for window in request.windows]
    if any(each is not units[0] for each in units):
        return  # folds of windows are of their own size
    evaluations = [trial.evaluations[window][key] for window in request.windows for key in keys]
    replayed = [each.replayed for each in evaluations if each.replayed is not None]
    settings = [each.setting for each in replayed]
    halve_each(replayed[0].traffic, settings, units[0], by_group=by_group)


def judge_over_eplb(request: Request, trials: Sequence[Trial]) -> dict[Window, Judgement]:
    """Judge what is proposed beside EPLB's placement, by window; nothing if that is what runs."""
    first = trials[0].placements
    if first[EPLB] == first[RUNNING]:
        return {}
    compute_trial_halves(request, trials[0], [EPLB], by_group=False)
    return {
        window: judge_trials(request, trials, EPLB, window, request.units[window])
        for window in request.windows
    }


def _judge_gain(request: Request, trial: Trial, window: Window, units: Units) -> Comparison:
    return judge_trials(request, [trial], RUNNING, window, units).gain


def combine_phases(request: Request, judged: Sequence[Judgement]) -> Comparison | None:
    """Weigh the gains of decode and prefill by their shares of the serving time, if known.

    Both are of the same sequences, so their errors add up.
    """
    if request.prefill_share is None:
        return None
    share, (decode, prefill) = request.prefill_share, (each.gain for each in judged)

    def combine(of_decode: float, of_prefill: float) -> float:
        return share * of_prefill + (1 - share) * of_decode

    both = (decode.change, prefill.change)
    errors = [change.error for change in both if change.error is not None]
    change = Spread(
        combine(decode.change.value, prefill.change.value),
        combine(errors[0], errors[1]) if len(errors) == len(both) else None,
        min(each.freedom for each in both),
        min(each.units for each in both),
    )
    return replace(
        decode,
        before=1.0,
        after=1 + change.value,
        change=change,
        splits=tuple(map(combine, decode.splits, prefill.splits)),
    )


def name_groups(halves: Sequence[Recording]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of both halves; one that the middle cuts is where most of it is."""
    sizes = [{name: len(rows) for name, rows in half.group_rows().items()} for half in halves]
    return tuple(
        tuple(
            str(name)
            for name in own
            if name is not None and own[name] >= sizes[1 - place].get(name, 0)
        )
        for place, own in enumerate(sizes)
    )


def judge_halves(
    request: Request, halves: Sequence[Recording], copies: int, window: Window
) -> tuple[Comparison, ...]:
    """Judge a placement of each half of the recording on the other."""
    gains = []
    for half, other, name in zip(halves, halves[::-1], ("first", "second"), strict=True):
        request.progress(f"a placement of the {name} half on the other")
        part = Part(request.seed, count_traffic(request, half), other)
        trial = try_out(request, part, copies)
        gains.append(_judge_gain(request, trial, window, request.units[window]))
    return tuple(gains)


def judge_groups(request: Request, copies: int) -> dict[str, dict[Window, Comparison]]:
    """Judge a placement of all other groups on each group."""
    gains: dict[str, dict[Window, Comparison]] = {}
    groups = request.traffic.group_rows()
    rows = groups.pop(None)
    for group, own_rows in groups.items():
        request.progress(f"a placement of all groups but {group}, on {group}")
        is_own = np.isin(rows, own_rows)
        own, others = request.traffic.take(is_own), request.traffic.take(~is_own)
        trial = try_out(request, Part(request.seed, count_traffic(request, others), own), copies)
        gains[str(group)] = {
            window: _judge_gain(request, trial, window, request.units_of(own, window))
            for window in request.windows
        }
    return gains


def judge_phases(request: Request, part: Part, copies: int) -> PhaseTimes | None:
    """Search shortly for prefill, for decode and for both, and predict each on each."""
    seen, unseen = split_recording(request, request.seed)
    rows, unseen_rows = seen.group_rows(), unseen.group_rows()
    has_phases = set(PHASES) <= rows.keys() & unseen_rows.keys()
    if not (seen.ordered and has_phases):
        return None
    problem = build_problem(request, part.statistics, copies)
    placements: dict[Key, Placement] = {"both": search_shortly(request, problem)}
    windows = {phase: request.windows[-1 if phase == "prefill" else 0] for phase in PHASES}
    for phase, window in windows.items():
        counted = count_traffic(request, seen.take(rows[phase]))
        phases = None if window is None else {window: 1.0}
        of_phase = build_problem(request, counted, copies, phases=phases)
        placements[phase] = search_shortly(request, of_phase)
    times: dict[str, dict[str, float]] = {str(name): {} for name in placements}
    for phase, window in windows.items():
        own = unseen.take(unseen_rows[phase])
        evaluated = evaluate_all(request, placements, own, [window])[window]
        for name, by_phase in times.items():
            by_phase[phase] = evaluated[name].predicted_layer_us or 0.0
    return PhaseTimes(times)


def compute_move_cost(request: Request, trial: Trial, saved_us: float) -> Moving:
    """Compute what it costs to leave what runs, and what memory experts take then."""
    size, topology = request.expert_bytes, request.topology
    running, proposed = trial.placements[RUNNING], trial.placements[PROPOSED]
    diff = running.diff(proposed, topology=topology, expert_bytes=size)
    copies = [(each.slots != EMPTY).sum(axis=(0, 2)) for each in (running, proposed)]
    total = int(copies[1].sum())
    if size is None:
        return Moving(diff.experts_moved, None, None, None, total, None, None)
    ports = busiest_ports(diff.pairs, topology)
    assert request.serving.cost_model is not None
    us = float(request.serving.cost_model.ports_us(ports, topology, bytes_each=size))
    return Moving(
        experts=diff.experts_moved,
        bytes=diff.bytes_moved,
        seconds=us / 1e6,
        steps=float(np.ceil(us / saved_us)) if saved_us > 0 else None,
        of_experts=total,
        of_bytes=total * size,
        device_bytes=(size * int(copies[0].max()), size * int(copies[1].max())),
    )


def judge_lp_split(
    request: Request, part: Part, placement: Placement, window: Window
) -> LpSplit | None:
    """Evaluate copies under a dispatcher by a linear programme, where the engine has one.

    Where nothing has copies, or the placement was computed for one, there is nothing to compare.
    """
    dividing = None if request.engine is None else request.engine.dividing
    if dividing is None or request.serving.rule.needs_windows or (placement.replicas == 1).all():
        return None
    counts = count_loads(without_groups(part.unseen), window=window, threads=request.threads)
    steps = np.flatnonzero(counts.is_step)
    if not steps.size:
        return None
    chosen = np.unique(np.linspace(0, steps.size - 1, DIVIDED_WINDOWS).round().astype(int))
    windows = RoutingStatistics.from_load(counts.window_load[steps[chosen]])

    def imbalance(split: Split) -> float:
        return evaluate(
            placement,
            windows,
            request.topology,
            split=split,
            cost_model=None,
            mixed=False,
            threads=request.threads,
        ).imbalance

    return LpSplit(imbalance(dividing[0]), imbalance(EVEN))
