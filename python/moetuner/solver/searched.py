"""The searches, whatever the problem is about: for traffic alone, or for all that a layer has."""

from __future__ import annotations

from moetuner.problem import Problem
from moetuner.solver.dispatch import dispatch
from moetuner.solver.heuristic import heuristic
from moetuner.solver.layers import layers
from moetuner.solver.result import Candidate, Limits


def searched(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Search, without an integer programme and without a bound."""
    if not problem.is_plain:
        return layers(problem, seed=seed, limits=limits)
    if problem.counts_visits:
        return dispatch(problem, seed=seed, limits=limits, copies=problem.may_copy)
    return heuristic(problem, seed=seed, limits=limits)
