"""The placement of ``balance`` under a problem's rules: a start of searches, and their floor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver import effort
from moetuner.solver.result import Candidate


def balanced(problem: Problem, *, trials: int = effort.PATIENT) -> NDArray[np.int32]:
    """Balance the load over all windows as ``balance`` does: slots [L,D,S] that keep all rules."""
    return _core.replicate_experts(
        problem.load.astype(np.float64),
        problem.capacity,
        problem.topology.time_of_device,
        trials=trials,
        copies=problem.may_copy,
        forbidden=problem.rules.forbidden,
        pinned=problem.rules.pinned,
    )


def no_worse(problem: Problem, found: Candidate) -> Candidate:
    """Return what ``balance`` would place where a search for traffic ended behind it.

    Such searches know single copies only, and may have had no time at all.
    """
    objective = Objective(problem)

    def rank(slots: NDArray[np.int32]) -> tuple[float, float]:
        placement = Placement(slots, num_experts=problem.experts)
        return float(problem.caps.excess(placement).sum()), objective.value(placement)

    slots = balanced(problem)
    if np.array_equal(slots, found.slots) or rank(slots) >= rank(found.slots):
        return found
    status = found.status if found.status in ("time_limit", "interrupted") else "feasible"
    return replace(
        found,
        slots=slots,
        status=status,
        bound=None,
        bound_source=None,
        details=found.details.searched(found_by="balance"),
        certificate=None,
        caps=None,
    )
