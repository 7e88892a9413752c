"""Judge proposed placements beside running ones, in windows, halves, groups and phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moetuner.cost import compute_move_us
from moetuner.evaluation import evaluate
from moetuner.evaluation.comparison import Comparison, with_splits
from moetuner.evaluation.halves import halve_each
from moetuner.evaluation.intervals import Spread
from moetuner.evaluation.judgement import Judgement, judge
from moetuner.evaluation.replay import drop_groups
from moetuner.evaluation.samples import Samples
from moetuner.placement import EMPTY, Placement
from moetuner.recording import Recording
from moetuner.recording.labelling import evenly_spaced
from moetuner.report.advice.request import (
    Holdout,
    Request,
    Window,
    build_problem,
    count_traffic,
    split_seen_unseen,
)
from moetuner.report.advice.trial import (
    EPLB,
    PROPOSED,
    RUNNING,
    Key,
    Trial,
    evaluate_all,
    search_shortly,
    try_out,
)
from moetuner.report.advice.values import LpSplit, Moving, PhaseTimes
from moetuner.report.recording import PHASES
from moetuner.serving.splits import EVEN, Split
from moetuner.statistics import RoutingStatistics, count_loads

# Most windows, evenly spaced, whose tokens the linear programme splits.
LP_WINDOWS = 256


def judge_trials(
    request: Request,
    trials: Sequence[Trial],
    key: Key,
    window: Window,
    units: Samples,
    *,
    by_group: bool = False,
) -> Judgement:
    """Judge the proposed placement beside another one, with intervals of the first split."""
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
    pairs = [(by_key[key], by_key[PROPOSED]) for by_key in evaluations]
    comparisons = {
        measure: with_splits(comparison, pairs) for measure, comparison in judgement.whole.items()
    }
    return replace(judgement, whole=comparisons)


def compute_trial_halves(
    request: Request, trial: Trial, keys: Sequence[Key], *, by_group: bool
) -> None:
    """Compute the halves that intervals need, of some placements in windows of all sizes at once.

    The tokens are read once for all of them. Judgements find these halves in their cache.
    """
    units = [request.units[window] for window in request.windows]
    if any(samples is not units[0] for samples in units):
        return  # samples that are windows differ by the size of windows
    evaluations = [trial.evaluations[window][key] for window in request.windows for key in keys]
    replays = [evaluation.replayed for evaluation in evaluations if evaluation.replayed is not None]
    settings = [replay.setting for replay in replays]
    halve_each(replays[0].traffic, settings, units[0], by_group=by_group)


def judge_over_eplb(request: Request, trials: Sequence[Trial]) -> dict[Window, Judgement]:
    """Judge the proposed placement beside EPLB's, by window; nothing if EPLB's runs."""
    first = trials[0].placements
    if first[EPLB] == first[RUNNING]:
        return {}
    compute_trial_halves(request, trials[0], [EPLB], by_group=False)
    return {
        window: judge_trials(request, trials, EPLB, window, request.units[window])
        for window in request.windows
    }


def combine_phases(
    request: Request, judgements: Sequence[Judgement], of_step: Mapping[Window, Comparison]
) -> Comparison | None:
    """Combine the gains of decode and prefill, weighted by their shares of the serving time.

    They are gains of a step where the time of both steps is known. None where the share of prefill
    is unknown. Both gains are of the same sequences, so their errors add up.
    """
    if request.prefill_share is None:
        return None
    share = request.prefill_share
    is_known = len(of_step) == len(judgements)
    decode, prefill = (
        of_step[judgement.window] if is_known else judgement.gain for judgement in judgements
    )

    def combine(in_decode: float, in_prefill: float) -> float:
        return share * in_prefill + (1 - share) * in_decode

    changes = (decode.change, prefill.change)
    errors = [change.error for change in changes if change.error is not None]
    change = Spread(
        combine(decode.change.value, prefill.change.value),
        combine(errors[0], errors[1]) if len(errors) == len(changes) else None,
        min(change.freedom for change in changes),
        min(change.units for change in changes),
    )
    return replace(
        decode,
        before=1.0,
        after=1 + change.value,
        change=change,
        splits=tuple(map(combine, decode.splits, prefill.splits)),
    )


def name_groups(halves: Sequence[Recording]) -> tuple[tuple[str, ...], ...]:
    """Return the groups of both halves; a group in both counts where most of its rows are."""
    sizes = [{name: len(rows) for name, rows in half.group_rows().items()} for half in halves]
    names = []
    for size_in_half, size_in_other in zip(sizes, reversed(sizes), strict=True):
        names.append(
            tuple(
                str(name)
                for name, size in size_in_half.items()
                if name is not None and size >= size_in_other.get(name, 0)
            )
        )
    return tuple(names)


def judge_halves(
    request: Request, halves: Sequence[Recording], copies: int, window: Window
) -> tuple[Comparison, ...]:
    """Judge a placement computed from each half of the recording on the other half."""
    gains = []
    for half, other, name in zip(halves, halves[::-1], ("first", "second"), strict=True):
        request.progress(f"a placement of the {name} half on the other")
        holdout = Holdout(request.seed, count_traffic(request, half), other)
        trial = try_out(request, holdout, copies)
        judgement = judge_trials(request, [trial], RUNNING, window, request.units[window])
        gains.append(judgement.gain)
    return tuple(gains)


def judge_groups(request: Request, copies: int) -> dict[str, dict[Window, Comparison]]:
    """Judge, on each group, a placement computed from all other groups."""
    gains: dict[str, dict[Window, Comparison]] = {}
    groups = request.traffic.group_rows()
    all_rows = groups.pop(None)
    for group, rows in groups.items():
        request.progress(f"a placement of all groups but {group}, on {group}")
        is_in_group = np.isin(all_rows, rows)
        unseen, others = request.traffic.take(is_in_group), request.traffic.take(~is_in_group)
        holdout = Holdout(request.seed, count_traffic(request, others), unseen)
        trial = try_out(request, holdout, copies)
        gains[str(group)] = {}
        for window in request.windows:
            samples = request.find_samples(unseen, window)
            judgement = judge_trials(request, [trial], RUNNING, window, samples)
            gains[str(group)][window] = judgement.gain
    return gains


def judge_phases(
    request: Request, holdout: Holdout, copies: int, both: Placement | None = None
) -> PhaseTimes | None:
    """Predict times of both phases under brief placements for prefill, for decode and for both.

    Traffic of a phase is what is labelled so; else all, in windows of the phase's size. None where
    the traffic has not both phases, seen and unseen, or where one placement is known to do: without
    labels and copies each phase is within 0.6 % of what a search for it alone finds. ``both`` is
    the brief placement for both, if there is one.
    """
    seen, unseen = split_seen_unseen(request, request.seed)
    rows, unseen_rows = seen.group_rows(), unseen.group_rows()
    is_labelled = set(PHASES) <= rows.keys() & unseen_rows.keys()
    has_windows = len(request.windows) > 1 and request.prefill_share is None and copies
    if not (seen.ordered and (is_labelled or has_windows)):
        return None
    if both is None:
        both = search_shortly(request, build_problem(request, holdout.statistics, copies))
    placements: dict[Key, Placement] = {"both": both}
    windows = {phase: request.windows[-1 if phase == "prefill" else 0] for phase in PHASES}
    for phase, window in windows.items():
        counts = holdout.statistics
        if is_labelled:
            counts = count_traffic(request, seen.take(rows[phase]))
        phases = None if window is None else {window: 1.0}
        problem = build_problem(request, counts, copies, phases=phases)
        placements[phase] = search_shortly(request, problem)
    times: dict[str, dict[str, float]] = {str(name): {} for name in placements}
    for phase, window in windows.items():
        of_phase = unseen.take(unseen_rows[phase]) if is_labelled else unseen
        evaluations = evaluate_all(request, placements, of_phase, [window])[window]
        for name, by_phase in times.items():
            by_phase[phase] = evaluations[name].predicted_layer_us or 0.0
    return PhaseTimes(times)


def compute_move_cost(request: Request, trial: Trial, saved_us: float) -> Moving:
    """Compute the cost of moving from the running to the proposed placement, and its memory.

    ``saved_us`` are the microseconds that the proposed placement saves in a step of the model.
    """
    size, topology = request.expert_bytes, request.topology
    running, proposed = trial.placements[RUNNING], trial.placements[PROPOSED]
    diff = running.diff(proposed, topology=topology, expert_bytes=size)
    before, after = (
        (placement.slots != EMPTY).sum(axis=(0, 2)) for placement in (running, proposed)
    )
    total = int(after.sum())
    if size is None:
        return Moving(diff.experts_moved, None, None, None, total, None, None)
    assert request.serving.cost_model is not None
    us = compute_move_us(request.serving.cost_model, diff.pairs, topology, size)
    return Moving(
        experts=diff.experts_moved,
        bytes=diff.bytes_moved,
        seconds=us / 1e6,
        steps=float(np.ceil(us / saved_us)) if saved_us > 0 else None,
        of_experts=total,
        of_bytes=total * size,
        device_bytes=(size * int(before.max()), size * int(after.max())),
    )


def judge_lp_split(
    request: Request, holdout: Holdout, placement: Placement, window: Window
) -> LpSplit | None:
    """Compute the imbalance of a placement if a linear programme splits the tokens of its copies.

    None where the engine has no such dispatcher, no expert has copies, or the placement was
    computed for such a dispatcher.
    """
    window_split = None if request.engine is None else request.engine.window_split
    if (
        window_split is None
        or request.serving.rule.needs_windows
        or (placement.replicas == 1).all()
    ):
        return None
    counts = count_loads(drop_groups(holdout.unseen), window=window, threads=request.threads)
    steps = np.flatnonzero(counts.is_full_window)
    if not steps.size:
        return None
    spaced = steps[evenly_spaced(steps.size, LP_WINDOWS)]
    windows = RoutingStatistics.from_load(counts.window_load[spaced])

    def measure_imbalance(split: Split) -> float:
        return evaluate(
            placement,
            windows,
            request.topology,
            split=split,
            cost_model=None,
            mixed=False,
            threads=request.threads,
        ).imbalance

    return LpSplit(measure_imbalance(window_split[0]), measure_imbalance(EVEN))
