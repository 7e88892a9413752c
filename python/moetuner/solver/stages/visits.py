"""Search for the fewest devices, and nodes, that tokens visit: regime dispatch on expert sets.

A search of co-activated pairs comes first: it is fast and gives a good start. Then a search of the
exact count follows, layer by layer: a token pays once for a device, however many of its experts are
there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.run import Role, Run, Stage
from moetuner.solver.stages.chain import search_traffic
from moetuner.solver.terms import Terms, core_layers, make_site, visit_costs


def units_of_trial(run: Run, *, has_tokens_alone: bool = False) -> float:
    """Return the work of one trial in every layer: its windows, and its sets in words of 64 bits.

    A trial for time costs as much as one for balance where tokens are all that takes time.
    """
    sets, copies = run.objective.sets or (), run.problem.may_copy
    parts = effort.SET_PARTS if copies else 1
    words = sum(float(np.minimum(layer_sets.counts, parts).sum()) for layer_sets in sets) / 64
    per_trial = effort.UNITS_PER_TRIAL + len(run.objective.windows)
    is_of_times = run.problem.aim.predicts_time and not has_tokens_alone
    times = effort.TIME_UNITS if is_of_times else 1
    units = run.problem.layers * per_trial * times + words
    return units * (effort.COPY_UNITS if copies and sets else 1)


def is_of_visits(run: Run) -> bool:
    """Return whether a problem is about visits alone, on equal devices without rules."""
    return run.problem.is_plain and run.objective.has_expert_sets


def _pairs(run: Run, budget: Budget) -> None:
    """Search co-activated pairs for a start; their cost has another unit, so it is not reported."""
    wide = run.problem.devices * run.problem.slots >= effort.WIDE_SLOTS
    trials = effort.WIDE_PAIR_TRIALS if wide else effort.PAIR_TRIALS
    if budget.iterations is not None:
        trials = min(trials, budget.iterations)
    short = replace(budget.muted(), iterations=trials)
    search_traffic(run, run.problem, short)


def _visits(run: Run, budget: Budget) -> None:
    """Search visits under the load cap, from single copies; ``iterations`` are for a layer."""
    problem, start = run.problem, _start(run)
    slots_of_layer = problem.devices * problem.slots
    costs = visit_costs(problem)
    run.details = run.details.with_search_facts(
        device_cost=costs.device_cost, node_cost=costs.node_cost
    )
    if problem.devices < 2:
        return
    trials = budget.iterations
    if trials is None:
        work = effort.VISIT_TRIALS * budget.work.layer_work / units_of_trial(run)
        trials = int(min(effort.most_trials(slots_of_layer, 1), work))
    run.details = run.details.with_search_facts(trials=trials)
    # The window has weight 0: balance is a cap here, not a cost.
    load = problem.load[None].astype(np.float64)
    caps = problem.caps.raised_for(start).astype(np.float64)
    site = make_site(problem, caps=caps, nearest=False)
    layers = core_layers(load, np.zeros(1), site, terms=Terms(visits=costs))
    # Small layers have local optima that one descent does not leave.
    restarts = effort.VISIT_SEARCHES if slots_of_layer <= effort.FEW_SLOTS else 1
    slots, interrupted = layers.place(
        start,
        trials=max(trials // restarts, 1),
        restarts=restarts,
        seed=run.seed,
        time_limit=budget.seconds_left,
        threads=budget.threads,
        progress=budget.phase("fanout"),
    )
    run.offer(slots, "fanout", interrupted=interrupted)


def _start(run: Run) -> np.ndarray:
    """Return the slots [L,D,S] of single copies or of pairs, else those of the floor."""
    starts = run.with_role(Role.SINGLE)
    return starts[-1].slots if starts else run.best.slots


def _has_no_start(run: Run) -> bool:
    return is_of_visits(run) and not run.with_role(Role.SINGLE)


PAIRS = Stage(_pairs, applies=_has_no_start, share=lambda _: effort.SEARCH_SHARE)
VISITS = Stage(_visits, applies=is_of_visits)
