"""The search alone: construct, anneal, recombine, polish, all in Rust. No integer programme."""

from __future__ import annotations

import numpy as np

from moetuner import _core
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver.result import Candidate, Details, Limits, Progress, SearchDetails, Status


def search_traffic(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Candidate:
    """Search for the least traffic of pairs under the load cap."""
    objective, follow = Objective(problem), problem.regime == "follow"
    # Without pairs all placements cost nothing, and the balanced one that the search starts from
    # is the answer.
    pairs = objective.pairs
    pointless = pairs is None or not pairs.any()

    def report(seconds: float, cost: int | None) -> None:
        if limits.progress is not None:
            share = None if cost is None else cost / objective.scale
            limits.progress(Progress(seconds, "search", share))

    slots, caps, trials, interrupted, shift = _core.search(
        problem.load,
        np.repeat(problem.caps.whole[:, None], problem.devices, axis=1),
        # Pairs that stand for visits cost more where they are of other nodes.
        problem.topology.cost if objective.counts_visits else objective.link_cost,
        problem.slots,
        transitions=None if pointless or not follow else pairs,
        coactivation=None if pointless or follow else pairs,
        seed=seed,
        trials=limits.iterations,
        time_limit=limits.time_limit,
        threads=limits.threads,
        progress=report if limits.progress is not None else None,
    )
    rounded = 1 << shift if shift else None
    details = Details(SearchDetails(trials, rounded))
    status: Status = "interrupted" if interrupted else "feasible"
    return Candidate(slots, status, details=details, caps=caps.max(axis=1))
