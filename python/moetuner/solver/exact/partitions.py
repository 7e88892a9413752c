"""The chain: where a layer has few partitions, dynamic programming over all of them is the optimum.

Every objective is a chain, a cost of each layer alone plus a cost of neighbouring layers, so the
best sequence of partitions is a shortest path. No integer programme is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.result import Candidate, Details, Limits, SearchDetails

BOUND_SOURCE = "complete dynamic programme"


def chain(problem: Problem, *, limits: Limits | None = None) -> Candidate | None:
    """Find the proven optimum of one copy of each expert, or None where this is out of reach.

    It is where links are not of one or two tiers (devices within nodes), or a layer has too many
    partitions (105 for 8 experts on 4 devices are few). Of the limits, ``threads`` and
    ``time_limit`` apply: no attempt is made that would take longer.
    """
    limits = limits or Limits()
    steps = effort.PARTITION_STEPS
    if limits.time_limit is not None:
        steps = int(min(steps, limits.time_limit * effort.PARTITION_STEPS_PER_SECOND))
    found = complete(
        problem,
        problem.caps.whole,
        steps=steps,
        time_limit=limits.time_limit,
        threads=limits.threads,
    )
    if found is None:
        return None
    slots, value, caps = found
    details = Details(SearchDetails(way="dynamic programming over all partitions"))
    return Candidate(slots, "optimal", value, BOUND_SOURCE, details, caps=caps)


def complete(
    problem: Problem,
    caps: NDArray[np.uint64],
    *,
    steps: int = effort.PARTITION_STEPS,
    time_limit: float | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.int32], int, NDArray[np.uint64]] | None:
    """Find the optimum by dynamic programming over all partitions, of one copy of each expert.

    Returns
    -------
    tuple or None
        Slots [L,D,S], their cost, and the caps [L], raised to the least that can be kept. None
        where it would take more steps or seconds, or devices differ.
    """
    follow = problem.regime == "follow"
    return _core.exact_chain(
        problem.load,
        np.repeat(caps[:, None], problem.devices, axis=1),
        Objective(problem).link_cost,
        problem.slots,
        transitions=problem.statistics.transitions if follow else None,
        coactivation=None if follow else problem.statistics.coactivation,
        work=steps,
        time_limit=time_limit,
        threads=threads,
    )
