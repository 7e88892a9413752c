"""The dispatch regime on expert sets: the fewest devices, and nodes, that tokens visit.

Pairs first: co-activated experts that share a device are a fast stand-in, and a good start. Then
the exact count, layer by layer: a token that visits a device pays once, however many of its experts
are there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import visit_costs, visits
from moetuner.solver.bounds.caps import caps_of, exceeded
from moetuner.solver.exact.enumeration import fewest_visits
from moetuner.solver.result import Candidate, Clock, Limits, Progress
from moetuner.solver.search.traffic import heuristic
from moetuner.statistics import ExpertSets

# Trials of each start on pairs, and the share of a time limit that they get.
PAIR_TRIALS = 200_000
PAIR_SHARE = 0.3
# Trials per slot of the exact search, and the work that all layers may be at the most: 64 sets of a
# trial are a unit.
TRIALS_PER_SLOT = 30_000
MOST_WORK = 1.5e10
# What a trial costs besides its sets.
UNITS_PER_TRIAL = 100
# Searches of a layer of at most so many slots.
SMALL, RESTARTS = 16, 8


def most_trials(sets: tuple[ExpertSets, ...]) -> int:
    """Return how many trials of every layer are affordable: each looks at the layer's sets."""
    return int(MOST_WORK / sum(len(of) / 64 + UNITS_PER_TRIAL for of in sets))


def dispatch(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    copies: bool = False,
) -> Candidate:
    """Search for the least fanout under the load cap.

    Parameters
    ----------
    problem
        Its statistics must have ``sets``.
    seed
        Of all random choices.
    limits
        ``iterations`` are trials of every layer. Without ``time_limit`` the answer depends on the
        problem and the seed alone.
    copies
        Whether slots to spare may hold second copies of experts.

    Raises
    ------
    ValueError
        If no sets were counted.
    """
    sets = problem.statistics.sets
    if sets is None:
        raise ValueError("statistics must have expert sets: count them with sets=True")
    if limits.time_limit != 0 and copies == problem.may_copy:
        least = fewest_visits(problem, caps_of(problem))
        if least is not None:
            bound = visits(problem, Placement(least, num_experts=problem.experts))
            told = exceeded(problem, least)
            return Candidate(least, "optimal", bound, "every placement", details=told)
    clock = Clock(limits)
    trials = limits.iterations
    pairs = replace(
        clock.within(PAIR_SHARE),
        iterations=PAIR_TRIALS if trials is None else min(trials, PAIR_TRIALS),
        # Their cost is in another unit.
        progress=None,
    )
    found = heuristic(problem, seed=seed, limits=pairs)
    device_cost, node_cost = visit_costs(problem.topology)
    details = {**found.details, "device_cost": device_cost, "node_cost": node_cost}
    if found.status == "interrupted" or problem.devices < 2:
        return replace(found, details=details)

    if trials is None:
        trials = min(TRIALS_PER_SLOT * problem.devices * problem.slots, most_trials(sets))
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
    layers.limit(problem.kept_caps(found.slots).astype(np.float64).tolist())
    kinds = [(of.ids, of.counts) for of in sets]
    layers.price_visits(kinds, device_cost=device_cost, node_cost=node_cost)

    limits = clock.within()
    slots, interrupted = layers.place(
        found.slots,
        trials=trials,
        copies=copies,
        # Layers of few slots have valleys that one descent does not leave.
        restarts=RESTARTS if problem.devices * problem.slots <= SMALL else 1,
        seed=seed,
        time_limit=limits.time_limit,
        threads=limits.threads,
        progress=progress and (lambda seconds, _: progress(Progress(seconds, "fanout"))),
    )
    details["trials"] = trials
    if copies:
        # What was told of the start is not true of copies.
        for name in ("caps_raised", "caps_infeasible"):
            details.pop(name, None)
        details |= exceeded(problem, slots)
    return Candidate(slots, "interrupted" if interrupted else "feasible", details=details)
