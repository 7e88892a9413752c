"""The chain: where a layer has few partitions, dynamic programming over all of them is the optimum.

Every objective is a chain, a cost of each layer alone plus a cost of neighbouring layers, so the
best sequence of partitions is a shortest path. No integer programme is needed.
"""

from __future__ import annotations

import numpy as np

from moetuner import _core
from moetuner.problem import Problem
from moetuner.solver.caps import raised
from moetuner.solver.result import Candidate, Limits

# Steps of the dynamic programme, about a nanosecond each on one core: what a solve may take.
STEPS = 4_000_000_000
STEPS_PER_SECOND = 500_000_000

BOUND_SOURCE = "complete dynamic programme"


def chain(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits | None = None,
) -> Candidate | None:
    """Find the proven optimum, or None where this is out of reach.

    Parameters
    ----------
    problem
        Its links may be of one or of two tiers (devices within nodes).
    seed
        Of no effect: the optimum knows no chance.
    limits
        Of them, ``threads`` and ``time_limit`` apply: no attempt is made that would take longer.

    Returns
    -------
    Candidate or None
        None where a layer has too many partitions (105 for 8 experts on 4 devices are few).
    """
    limits = limits or Limits()
    steps = STEPS
    if limits.time_limit is not None:
        steps = int(min(steps, limits.time_limit * STEPS_PER_SECOND))
    follow = problem.regime == "follow"
    cost = problem.topology.cost
    found = _core.exact_chain(
        problem.load,
        np.repeat(problem.caps[:, None], problem.devices, axis=1),
        # Co-activated pairs count the same on whatever two devices they are: see `Problem.cost`.
        cost if follow else (cost > 0).astype(np.int64),
        problem.slots,
        transitions=problem.statistics.transitions if follow else None,
        coactivation=None if follow else problem.statistics.coactivation,
        work=steps,
        threads=limits.threads,
    )
    if found is None:
        return None
    slots, value, caps = found
    details: dict[str, object] = {"way": "dynamic programming over all partitions"}
    details |= raised(problem, caps, threads=limits.threads)
    return Candidate(slots, "optimal", value, BOUND_SOURCE, details)
