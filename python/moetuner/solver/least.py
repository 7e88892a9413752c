"""What no placement can beat, where balance or time is the objective."""

from __future__ import annotations

from dataclasses import replace

from moetuner import objective
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver.bound import bound
from moetuner.solver.result import Candidate, Limits


def bounded(problem: Problem, found: Candidate, limits: Limits) -> Candidate:
    """Add the best bound to what was found.

    The least of a sum is no less than the sum of the least: a time's parts, compute and traffic,
    are bounded one by one. Traffic is bounded for one copy of each expert on equal devices only.
    """
    if problem.objective == "traffic":
        return found
    value = problem.value(Placement(found.slots, num_experts=problem.experts))
    least = objective.least_balance(problem)
    source = "load"
    if problem.objective == "time":
        least = objective.compute_us(problem, least)
        moved = _least_traffic_us(problem, limits)
        if moved is not None:
            least, source = least + moved[0], f"load + {moved[1]}"
    # Rounding of the sums above, far below what anybody reads of an objective.
    least *= 1 - 1e-9
    status = "optimal" if least >= value * (1 - 1e-6) else found.status
    return replace(found, bound=min(least, value), bound_source=source, status=status)


def _least_traffic_us(problem: Problem, limits: Limits) -> tuple[float, str] | None:
    alike = problem.topology.has_equal_devices and not problem.has_spare_slots
    if problem.regime != "follow" or not alike or problem.devices == 1:
        return None
    plain = replace(problem, objective="traffic", max_imbalance=None, pinned=(), forbidden=())
    proven = bound(plain, plain.caps, limits=limits)
    if proven is None:
        return None
    price, cost = objective.link_us(problem), problem.topology.cost
    dearer = cost > 0
    per_cost = float((price[dearer] / cost[dearer]).min()) if dearer.any() else 0.0
    windows = problem.layers * problem.statistics.windows
    return proven.cost * per_cost / windows, proven.source
