"""The chain: where a layer has few partitions, dynamic programming over all of them is the optimum.

Every objective is a chain, a cost of each layer alone plus a cost of neighbouring layers, so the
best sequence of partitions is a shortest path. No integer programme is needed.
"""

from __future__ import annotations

from moetuner.problem import Problem
from moetuner.solver import effort
from moetuner.solver.bounds.caps import raised
from moetuner.solver.bounds.certificate import Method
from moetuner.solver.bounds.pairs import certified, complete
from moetuner.solver.result import Candidate, Limits

BOUND_SOURCE: Method = "complete dynamic programme"


def chain(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits | None = None,
) -> Candidate | None:
    """Find the proven optimum of one copy of each expert, or None where this is out of reach.

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
    steps = effort.PARTITION_STEPS
    if limits.time_limit is not None:
        steps = int(min(steps, limits.time_limit * effort.PARTITION_STEPS_PER_SECOND))
    found = complete(problem, problem.caps.whole, steps=steps, threads=limits.threads)
    if found is None:
        return None
    slots, value, caps = found
    details: dict[str, object] = {"way": "dynamic programming over all partitions"}
    details |= raised(problem, caps, threads=limits.threads)
    certificate = certified(problem, caps, BOUND_SOURCE, value)
    return Candidate(slots, "optimal", value, BOUND_SOURCE, details, certificate)
