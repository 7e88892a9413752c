"""The joint method: device and cluster chosen at once, and how far from the optimum that can be.

Where a layer has few partitions, dynamic programming over all of them is the optimum. Elsewhere:
construct and search; prove a bound; and while the gap is wider than asked for and time is left, let
HiGHS work on the whole co-location programme, where that fits.
"""

from __future__ import annotations

from dataclasses import replace

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.bounds.loads import bounded, proves_pairs
from moetuner.solver.bounds.pairs import bound
from moetuner.solver.exact.partitions import chain
from moetuner.solver.milp.colocation import colocation, fits
from moetuner.solver.result import Candidate, Clock, Limits
from moetuner.solver.search.traffic import heuristic
from moetuner.solver.searched import searched


def joint(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Solve the joint problem within limits.

    Parameters
    ----------
    problem
        Of any size and regime.
    seed
        Of all random choices.
    limits
        Without ``time_limit`` no integer programme is run, so that the answer depends on the
        problem and the seed alone and comes in seconds.
    """
    clock = Clock(limits)
    objective = Objective(problem)
    if not problem.is_plain or objective.counts_visits or problem.may_copy:
        share = effort.SEARCH_SHARE if proves_pairs(problem) else 1.0
        found = searched(problem, seed=seed, limits=clock.within(share))
        return bounded(problem, found, clock.within())

    if limits.time_limit != 0:
        exact = chain(problem, seed=seed, limits=clock.within())
        if exact is not None:
            return exact

    found = heuristic(problem, seed=seed, limits=clock.within(effort.SEARCH_SHARE))
    if found.status == "interrupted":
        return found
    rest = clock.within().time_limit
    if rest == 0:
        return replace(found, status="time_limit")

    cost = objective.cost(Placement(found.slots, num_experts=problem.experts))
    share = effort.BOUND_SHARE / (1 - effort.SEARCH_SHARE)
    worthwhile = rest is not None and (1 - share) * rest >= effort.PROGRAMME_LEAST
    programme = worthwhile and problem.regime == "follow" and fits(problem)
    if not programme:
        share = 1.0
    caps = problem.caps.kept(found.slots)
    proven = bound(problem, caps, limits=clock.within(share), target=cost)
    if proven is not None:
        found = replace(
            found,
            bound=proven.cost,
            bound_source=proven.source,
            certificate=proven.certificate,
            status="interrupted" if proven.interrupted else found.status,
            details={**found.details, "bound": proven.details},
        )
        if proven.cost >= cost:
            return replace(found, status="optimal")
        if limits.gap is not None and cost - proven.cost <= limits.gap * cost:
            return replace(found, status="gap_reached")
    if found.status == "interrupted" or rest is None:
        return found
    if programme and found.bound is not None:
        found = colocation(problem, seed=seed, limits=clock.within(), start=found)
    return found if found.status != "feasible" else replace(found, status="time_limit")
