"""Judge whether expert placement pays for some traffic, with how many copies, and at what cost.

Placements are computed from one part of the traffic and judged on the other, over several splits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

from moetuner import _checks as check
from moetuner.cost import CostModel
from moetuner.evaluation.comparison import PRICE, Comparison
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.samples import Samples
from moetuner.placement import Placement
from moetuner.problem.goals import Goal
from moetuner.recording import Recording
from moetuner.report.advice.conclusion import conclude, find_costs, find_notes, write_judged_on
from moetuner.report.advice.copies import choose_copies
from moetuner.report.advice.drift import Drift, cut_in_half, measure_drift
from moetuner.report.advice.judging import (
    combine_phases,
    compute_move_cost,
    compute_trial_halves,
    judge_groups,
    judge_halves,
    judge_lp_split,
    judge_over_eplb,
    judge_phases,
    judge_trials,
    name_groups,
)
from moetuner.report.advice.request import (
    Holdout,
    Request,
    check_unseen,
    check_values,
    choose_phases,
    choose_windows,
    find_expert_bytes,
    find_memory,
    make_holdout,
    read_step_ms,
    resolve_serving,
    sort_copies,
)
from moetuner.report.advice.step import find_step
from moetuner.report.advice.sweep import sweep
from moetuner.report.advice.trial import PROPOSED, RUNNING, Trial, try_out
from moetuner.report.advice.values import (
    Advice,
    Copies,
    choose_main,
    compute_saved_us,
    share_of_step,
)
from moetuner.report.findings import Finding
from moetuner.report.recording import find_one_kind
from moetuner.serving import Serving
from moetuner.serving.arrival import Arrival
from moetuner.serving.engines import NO_ENGINES
from moetuner.serving.splits import Split
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

# Splits of the traffic, unless another number is requested.
SPLITS = 3
# Numbers of slots for copies to try, unless others are requested.
COPIES = (0, 1, 2, 4)


def advise(
    traffic: RoutingTrace | RoutingStatistics,
    topology: Topology | Serving,
    *,
    unseen: RoutingTrace | RoutingStatistics | None = None,
    initial: Placement | str = "contiguous",
    engine: str | None = None,
    copies: Sequence[int] = COPIES,
    window: int | None = None,
    splits: int = SPLITS,
    price: float = PRICE,
    prefill_share: float | None = None,
    waterfill: float | None = None,
    recorded_by: str | None = None,
    by_group: bool = False,
    objective: Goal | None = None,
    expert_bytes: float | None = None,
    kv_bytes: float | None = None,
    device_memory: float | None = None,
    step_ms: float | Sequence[float] | None = None,
    cost_model: CostModel | None = None,
    regime: Regime = "dispatch",
    split: Split | None = None,
    arrival: Arrival | None = None,
    in_order: bool = True,
    iterations: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Advice:
    """Return whether a better placement is worth a trial on this traffic, and why.

    The placement that is judged is ``solve(problem, seed=seed)`` of the part that is seen in the
    first split, with the number of copies that a short search chooses. Those of other splits, and
    of halves and groups, are searched with effort ``brief``: they show whether the gain is chance.

    Parameters
    ----------
    traffic
        A trace, which is split by sequence, or by kind where its sequences repeat few prompts; or
        statistics, whose loads are split by window. Where neighbouring windows are alike, and where
        a trace has no sequences, runs are held out. A single window cannot be split: the answer is
        then that there is not enough evidence.
    unseen
        Traffic to judge on, of the same kind and model. Placements are then computed from all of
        ``traffic``, once.
    topology
        The devices and links; or a ``Serving``, which has them and says how the model is served.
    initial
        The placement that runs: one of your own, ``"contiguous"``, ``"round_robin"``, or
        ``"eplb"``, which EPLB computes from the same traffic; ``"eplb:32"`` has 32 redundant
        experts over all devices.
    engine
        Engine that serves the model, by its name in ``engine_settings``. It decides which copy
        serves a token, whether there may be copies, whether all slots must be full and equally
        many in all layers, and whether a window has tokens of sequences that are served together
        or of one sequence after the other.
    copies
        Numbers of slots of a device in a layer, beyond one slot for each expert, to try. Numbers
        that take more memory than the running placement are tried as long as each gains on the seen
        traffic; the largest is tried where the first one does not. Of
        several numbers the one is proposed that pays: what its slots gain in the phase that gains
        least is more than the share of the KV cache that they take. A single one is proposed
        whatever it costs.
    window
        Tokens of a window, whose load is balanced together. By default 512 for decode, and for
        prefill 8192, or 4096 or 2048 where the recording does not fill two windows of that size.
        Load tables bring their own windows.
    splits
        Number of random choices of the half that is seen.
    price
        Share of the predicted time that a change must save to be worth the trouble.
    prefill_share
        Share of the serving time that is prefill. Placements are computed for it, and the answer is
        on the gain of prefill and decode together, instead of on the better one of the two. By
        default neither phase is to lose much, as ``Problem`` says of ``phases``.
    waterfill
        As for ``evaluate``. The advice then says what the proposed placement gains where the
        dispatcher gives the shared expert's work to devices that wait.
    recorded_by
        Program that recorded the traffic, such as ``"vllm"`` or ``"llama.cpp"``. Where it places no
        experts on devices, and no engine is named, the answer is that there is nothing to place.
    by_group
        If True, judge, on each group, a placement that was computed from all other groups.
    objective
        As for ``Problem``; time by default.
    expert_bytes
        Bytes of one expert of one layer; by default that of the model's experts, where known.
    kv_bytes
        Bytes of KV cache of a token; by default the model's in 16 bits, where its attention is
        known.
    device_memory
        Bytes of memory of a device; by default the machine's, else the cost model's GPU's.
    step_ms
        Milliseconds that a step of the engine takes, in decode, or in decode and in prefill. The
        answer is then on gains of a step, instead of the MoE layers'.
    cost_model, regime, split, arrival
        As for ``Problem``; split and arrival by default the engine's, else even and in bursts.
    in_order
        True if traffic was recorded in the order of serving. If not, a difference between the
        halves of the recording does not count against a gain.
    iterations
        Search steps of each start. By default short searches choose the number of copies, and the
        search for the proposed placement takes as many steps as ``solve``.
    time_limit
        Time limit per solve, in seconds. Results then depend on the machine.
    seed
        Random seed of splits and searches.
    threads
        Threads to use, all cores by default; the answer does not depend on it.
    progress
        Called with a few words on each step of the computation, when it begins.

    Raises
    ------
    ValueError
        If the traffic has no tokens, the placement is not of this model and machine, or an argument
        is out of range.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> load = np.tile([[[90, 80, 5, 5, 5, 5, 5, 5]]], (40, 1, 1))
    >>> advice = mt.advise(mt.RoutingStatistics.from_load(1000 * load), mt.Topology(4))
    >>> advice.answer
    'worth a trial'
    """
    machine = topology.topology if isinstance(topology, Serving) else topology
    check_values(traffic, machine, price, initial)
    check.one_of("regime", regime, get_args(Regime))
    check.callable_or_none("progress", progress)
    if unseen is not None:
        check_unseen(traffic, unseen)
        unseen = unseen.without_pairs()
    windows = choose_windows(traffic, unseen, check.window_in(window))
    phases = choose_phases(traffic, prefill_share, window, windows)
    traffic = traffic.without_pairs()
    options = {"regime": regime, "split": split, "arrival": arrival, "cost_model": cost_model}
    serving = resolve_serving(topology, traffic, options, engine=engine, waterfill=waterfill)
    expert_bytes = find_expert_bytes(traffic, expert_bytes)
    memory = find_memory(traffic, serving, expert_bytes, kv_bytes, device_memory, initial)
    request = Request(
        traffic=traffic,
        unseen=unseen,
        serving=replace(serving, phases=phases),
        initial=initial,
        copies=sort_copies(copies),
        windows=windows,
        objective=objective,
        expert_bytes=expert_bytes,
        memory=memory,
        step_ms=read_step_ms(step_ms, windows),
        price=price,
        prefill_share=prefill_share,
        recorded_by=recorded_by,
        by_group=by_group,
        in_order=in_order,
        iterations=iterations,
        time_limit=time_limit,
        seed=check.seed_in(seed),
        threads=threads,
        progress=progress or (lambda _: None),
    )
    return _advise(request, check.whole_number("splits", splits, highest=100))


def _advise(request: Request, splits: int) -> Advice:
    """Split the traffic, sweep numbers of copies, judge on every split, and conclude."""
    # Other splits would be the same where nothing is held out, and where unseen traffic was given.
    splits = splits if request.is_held_out and request.unseen is None else 1
    request.progress("counting the seen traffic")
    holdout = make_holdout(request, check.nth_seed(request.seed, 0))
    swept = sweep(request, holdout)
    choice = choose_copies(
        swept.rows,
        request.running_copies,
        price=request.price,
        prefill_share=request.prefill_share,
        parts=swept.parts,
        requested=request.copies[0] if len(request.copies) == 1 else None,
    )
    trials = _try_splits(request, holdout, choice.chosen, splits)
    judgements = _judge_splits(request, trials)
    first, main = trials[0], choose_main(judgements)
    drift, halves = _compare_halves(request, request.units[main.window])
    gains_of_halves = judge_halves(request, halves, choice.chosen, main.window) if halves else ()
    of_step = _compute_gains_of_step(request, judgements)
    request.progress("comparing moves and phases")
    advice = Advice(
        answer="not enough evidence",
        findings=(),
        judged=judgements,
        over_eplb=judge_over_eplb(request, trials),
        copies=_complete_copies(swept.rows, judgements),
        chosen_copies=choice.chosen,
        fewer_copies=choice.fewer,
        larger_copies=choice.larger,
        moving=compute_move_cost(request, first, compute_saved_us(main)),
        phases=judge_phases(request, holdout, choice.chosen, swept.placements.get(choice.chosen)),
        lp_split=judge_lp_split(request, holdout, first.placements[PROPOSED], main.window),
        drift=drift,
        halves=gains_of_halves,
        groups_of_halves=name_groups(halves),
        placements=(first.placements[RUNNING], first.placements[PROPOSED]),
        result=first.result,
        units=request.units[main.window],
        problem=first.problem,
        judged_on=write_judged_on(request, holdout.unseen),
        one_kind=find_one_kind(request.traffic, request.unseen),
        prefill_lacks=request.prefill_lacks,
        total=combine_phases(request, judgements, of_step),
        by_group=judge_groups(request, choice.chosen) if request.by_group else {},
        of_step=of_step,
        memory=request.memory,
        settings=request.settings(splits, first.problem.shares),
    )
    return _conclude(request, advice, first, holdout)


def _try_splits(request: Request, holdout: Holdout, copies: int, splits: int) -> list[Trial]:
    """Return a trial of every split; the first is searched at length, the others briefly."""
    trials: list[Trial] = []
    for number in range(splits):
        request.progress(f"split {number + 1} of {splits}: solving and judging")
        split = make_holdout(request, check.nth_seed(request.seed, number)) if number else holdout
        effort = "brief" if number else "default"
        trial = try_out(request, split, copies, by_group=not number, effort=effort)
        # Only the first problem is read later: without theirs the others' counts can be freed.
        trials.append(replace(trial, problem=trials[0].problem) if number else trial)
    return trials


def _judge_splits(request: Request, trials: Sequence[Trial]) -> tuple[Judgement, ...]:
    """Judge the proposed beside the running placement of all splits, in each size of windows."""
    request.progress("judging")
    compute_trial_halves(request, trials[0], [RUNNING, PROPOSED], by_group=True)
    return tuple(
        judge_trials(request, trials, RUNNING, window, request.units[window], by_group=True)
        for window in request.windows
    )


def _complete_copies(
    rows: tuple[Copies, ...], judgements: Sequence[Judgement]
) -> tuple[Copies, ...]:
    """Return numbers of slots with their gains; a single number is not searched for."""
    if len(rows) > 1:
        return rows
    gains: dict[int | None, tuple[float, ...]]
    gains = {judgement.window: (judgement.gain.gain,) for judgement in judgements}
    return (replace(rows[0], gains=gains),)


def _compare_halves(request: Request, units: Samples) -> tuple[Drift | None, Sequence[Recording]]:
    """Return how far the halves of the recording differ, and the halves if beyond chance."""
    request.progress("comparing the halves of the recording")
    if request.unseen is not None:
        return None, ()
    drift = measure_drift(request.traffic, units, seed=request.seed)
    has_drifted = request.in_order and drift is not None and drift.is_beyond_chance
    return drift, cut_in_half(request.traffic) if has_drifted else ()


def _compute_gains_of_step(
    request: Request, judgements: Sequence[Judgement]
) -> dict[int | None, Comparison]:
    """Return the gain of a whole step by window, where the time of a step is known."""
    return {
        judgement.window: share_of_step(
            judgement.gain, judgement.layers, request.step_ms[judgement.window]
        )
        for judgement in judgements
        if judgement.window in request.step_ms
    }


def _conclude(request: Request, advice: Advice, trial: Trial, holdout: Holdout) -> Advice:
    """Return the advice with its answer and findings, and the step that few moves reach."""
    advice = conclude(advice, find_notes(request, advice), request.judged_recording.length)
    if request.serving.engine is None and request.recorded_by in NO_ENGINES:
        numbers = {"engine": request.recorded_by}
        advice = advice.overruled(Finding("nothing to place", numbers, forces="not now"))
    if advice.answer == "not now":
        advice = replace(advice, moving=advice.moving.stay())
    request.progress("comparing fewer moves")
    advice = replace(advice, step=find_step(request, trial, holdout, advice))
    return replace(advice, findings=(*advice.findings, *find_costs(advice)))
