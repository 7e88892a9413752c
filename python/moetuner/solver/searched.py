"""The searches, whatever the problem is about: for traffic alone, or for all that a layer has."""

from __future__ import annotations

from dataclasses import replace

from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.result import Candidate, Clock, Limits
from moetuner.solver.search.fanout import dispatch
from moetuner.solver.search.layerwise import Search, layers
from moetuner.solver.search.traffic import heuristic


def searched(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Search, without an integer programme and without a bound."""
    if not problem.is_plain:
        return layers(problem, seed=seed, limits=limits)
    if Objective(problem).counts_visits:
        return dispatch(problem, seed=seed, limits=limits, copies=problem.may_copy)
    if not problem.may_copy:
        return heuristic(problem, seed=seed, limits=limits)
    # The best with one copy of each expert is a start; copies must better it.
    clock = Clock(limits)
    single = heuristic(problem, seed=seed, limits=clock.within(effort.SINGLE_SHARE))
    if single.status == "interrupted":
        return single
    rest = clock.within()
    if rest.time_limit == 0:
        return replace(single, status="time_limit")
    return Search(problem, seed).run(rest, start=single.slots)
