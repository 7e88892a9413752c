"""The searches, whatever the problem is about: for traffic alone, or for all that a layer has."""

from __future__ import annotations

from moetuner.problem import Problem
from moetuner.solver.heuristic import heuristic
from moetuner.solver.layers import layers
from moetuner.solver.result import Candidate, Limits


def searched(problem: Problem, *, seed: int, limits: Limits) -> Candidate:
    """Search, without an integer programme and without a bound."""
    search = heuristic if problem.is_plain else layers
    return search(problem, seed=seed, limits=limits)
