"""The dispatch regime on expert sets: the fewest devices, and nodes, that tokens visit.

Pairs first: co-activated experts that share a device are a fast stand-in, and a good start. Then
the exact count, layer by layer: a token that visits a device pays once, however many of its experts
are there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.result import Candidate, Clock, Limits, Progress, Status
from moetuner.solver.search.traffic import search_traffic
from moetuner.statistics import ExpertSets


def most_trials(sets: tuple[ExpertSets, ...]) -> int:
    """Return how many trials of every layer are affordable: each looks at the layer's sets."""
    return int(effort.MOST_VISIT_WORK / sum(len(of) / 64 + effort.UNITS_PER_TRIAL for of in sets))


def dispatch(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    start: NDArray[np.int32] | None = None,
) -> Candidate:
    """Search for the least fanout under the load cap, of statistics with expert sets.

    ``iterations`` are trials of every layer. It begins from slots [L,D,S] with one copy of each
    expert, by default those that a search of pairs finds.
    """
    sets = problem.statistics.sets
    if sets is None:
        raise ValueError("statistics must have expert sets: count them with sets=True")
    objective = Objective(problem)
    clock = Clock(limits)
    trials, slots_of_layer = limits.iterations, problem.devices * problem.slots
    wide = slots_of_layer >= effort.WIDE_SLOTS
    of_pairs = effort.WIDE_PAIR_TRIALS if wide else effort.PAIR_TRIALS
    pairs = replace(
        clock.within(effort.PAIR_SHARE),
        iterations=of_pairs if trials is None else min(trials, of_pairs),
    )
    if start is None:
        # Their cost is in another unit.
        found = search_traffic(problem, seed=seed, limits=pairs.muted())
    else:
        found = Candidate(start)
    device_cost, node_cost = objective.visit_costs
    details = found.details.searched(device_cost=device_cost, node_cost=node_cost)
    if found.status == "interrupted" or problem.devices < 2:
        return replace(found, details=details)
    if clock.is_over():
        return replace(found, details=details, status="time_limit")

    if trials is None:
        trials = min(effort.VISIT_TRIALS * slots_of_layer, most_trials(sets))
    progress = limits.progress
    layers = _core.Layers(
        problem.load[None].astype(np.float64),
        # Windows that weigh nothing: balance is a cap here, not a cost.
        np.zeros(1),
        np.full((problem.layers, problem.devices), problem.slots),
        problem.topology.node_of_device.tolist(),
        [1.0] * problem.devices,
        nearest=False,
        norm=0,
    )
    layers.limit(problem.caps.kept(found.slots).astype(np.float64).tolist())
    kinds = [(of.ids, of.counts) for of in sets]
    layers.price_visits(kinds, device_cost=device_cost, node_cost=node_cost)

    # Layers of few slots have valleys that one descent does not leave, and descents that agree.
    restarts = effort.VISIT_RESTARTS if slots_of_layer <= effort.VISIT_FEW_SLOTS else 1
    limits = clock.within()
    slots, interrupted = layers.place(
        found.slots,
        trials=max(trials // restarts, 1),
        copies=problem.may_copy,
        restarts=restarts,
        seed=seed,
        time_limit=limits.time_limit,
        threads=limits.threads,
        progress=progress and (lambda seconds, _: progress(Progress(seconds, "fanout"))),
    )
    status: Status = "interrupted" if interrupted else "feasible"
    # The caps that the start had to raise say nothing of copies.
    details = details.searched(trials=trials)
    return Candidate(slots, status, details=details, caps=None if problem.may_copy else found.caps)
