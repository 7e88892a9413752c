"""What no placement can beat: proven bounds of balance, of time, and of the visits of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.solver.bounds.pairs import bound
from moetuner.solver.result import Candidate, Limits

Floats = NDArray[np.float64]

# Sums of floats may be off by this part.
ROUNDING = 1e-10


def bounded(problem: Problem, found: Candidate, limits: Limits) -> Candidate:
    """Add the best bound to what was found.

    The least of a sum is no less than the sum of the least: a time's parts, compute and traffic,
    are bounded one by one. Traffic from layer to layer is bounded for one copy of each expert on
    equal devices only.
    """
    if found.status == "optimal":
        return found
    objective = Objective(problem)
    value = objective.value(Placement(found.slots, num_experts=problem.experts))
    source = "load"
    if problem.goal == "traffic":
        if not objective.counts_visits and value > 0:
            return found  # what copies of experts cost at least is not known
        least = least_visits(problem) if objective.counts_visits else 0.0
    elif problem.goal == "balance":
        least = least_balance(problem)
    else:
        # Who interrupts wants no proof.
        interrupted = found.status == "interrupted"
        moved = None if interrupted else _least_pairs_us(problem, limits)
        least = least_time(problem, 0.0 if moved is None else moved[0])
        source = "load" if moved is None else f"load + {moved[1]}"
    # Rounding of the sums above, far below what anybody reads of an objective.
    least *= 1 - ROUNDING
    status = "optimal" if least >= value * (1 - 10 * ROUNDING) else found.status
    return replace(found, bound=least, bound_source=source, status=status)


def proves_pairs(problem: Problem) -> bool:
    """Whether `bounded` proves what pairs cost at least, which takes time; all else is instant."""
    alike = problem.topology.has_equal_devices and not problem.may_copy
    follows = problem.goal == "time" and problem.regime == "follow"
    return follows and alike and problem.devices > 1


def least_balance(problem: Problem) -> float:
    """Compute what no placement's balance is below."""
    least = problem.windows.each(lambda load: least_slowest(problem, load).sum(axis=1))
    return problem.windows.value(least, Objective(problem).reference)


def least_time(problem: Problem, pairs_us: float = 0.0) -> float:
    """Compute what no placement's time is below whose pairs cost at least so much in all [us].

    What compute and communication overlap is convex in both, so the mean over layers is no less
    than what the means would take.
    """
    assert problem.cost_model is not None
    compute = problem.windows.each(lambda load: _least_compute(problem, load).mean(axis=1))
    if problem.regime == "dispatch":
        moved = problem.windows.each(lambda load: _least_rows_us(problem, load).mean(axis=1))
    else:
        moved = pairs_us * _least_part(problem) / problem.layers
    times = problem.cost_model.layer_us(compute[:, None], moved)
    return problem.windows.value(times, np.ones(len(times)))


def least_visits(problem: Problem) -> float:
    """Compute what no placement's visits are below: a token's experts fill the fewest devices."""
    device_cost, node_cost = Objective(problem).visit_costs
    assert problem.statistics.sets is not None
    fewest = -(-problem.statistics.sets[0].top_k // problem.slots)
    return float(device_cost * fewest + node_cost)


def least_slowest(problem: Problem, load: Floats) -> Floats:
    """Compute the least load over speed of the slowest device [W,L] of windows of load [W,L,E].

    It takes at least the mean, and at least what the heaviest expert takes on the fastest devices
    that can hold all the copies there is room for.
    """
    speed = np.sort(problem.topology.speed_of_device)[::-1]
    devices = int((problem.capacity > 0).sum(axis=1).min())
    spare = problem.capacity.sum(axis=1) - problem.experts
    least = np.empty(load.shape[:2])
    for layer in range(problem.layers):
        mine = load[:, layer]
        copies = min(int(spare[layer]) + 1, devices) if problem.may_copy else 1
        heaviest = mine.max(axis=1)
        if problem.split == "nearest":
            # Uneven parts are at least those that make all copies equally slow.
            one = heaviest / speed[:copies].sum()
        else:
            one = heaviest / copies / speed[0]
        least[:, layer] = np.maximum(mine.sum(axis=1) / speed.sum(), one)
    return least


def _least_compute(problem: Problem, load: Floats) -> Floats:
    """Compute the least microseconds of the slowest device [W,L], of windows of load [W,L,E]."""
    model, speed = problem.cost_model, problem.topology.speed_of_device
    assert model is not None
    # An idle device starts as well.
    least = max(model.base_us, model.start_us) / speed.min()
    tokens = model.start_us / speed.max() + model.token_us * least_slowest(problem, load)
    # Copies of an expert are active in all at least as often as one would be, or have a token.
    active = np.minimum(load, 1.0) if problem.may_copy else load > 0
    count = active.sum(axis=2)
    weights = (model.base_us * problem.devices + model.expert_us * count) / speed.sum()
    found: Floats = np.maximum(least, np.maximum(tokens, weights))
    if not problem.may_copy and np.ptp(speed) == 0:
        whole = (model.base_us + model.expert_us * np.ceil(count / problem.devices)) / speed[0]
        found = np.maximum(found, whole)
    return found


def _least_rows_us(problem: Problem, load: Floats) -> Floats:
    """Compute the least microseconds of rows to devices and back [W,L], of load [W,L,E].

    The busiest port carries no less than the mean one.
    """
    model, topology = problem.cost_model, problem.topology
    assert model is not None
    tokens: Floats = load.sum(axis=2)
    if problem.split == "nearest" and problem.may_copy:
        return np.zeros_like(tokens)
    if problem.statistics.sets is not None:
        # A visit is of as many experts as a token has, and a device holds, at most.
        tokens = tokens / min(problem.statistics.sets[0].top_k, problem.slots)
    elsewhere = (topology.tier[:, :, None] == np.arange(1, len(topology.levels) + 1)).mean(
        axis=(0, 1)
    )
    if model.once_per == "node":
        elsewhere[1:] = 0
    rows = tokens[:, :, None] * elsewhere / topology.devices
    return model.ports_us(rows, topology) + model.ports_us(
        rows, topology, bytes_each=model.bytes_back
    )


def _least_part(problem: Problem) -> Floats:
    """Compute the part of all pairs' cost that every window [W] pays at least."""
    load = problem.windows.each(lambda load: load.sum(axis=2))[:, 1:]
    if problem.statistics.transitions is None:
        return np.zeros(len(load))
    pairs = problem.statistics.transitions.sum(axis=(1, 2), dtype=np.float64)
    part = load / np.maximum(pairs, 1)
    least: Floats = part.min(axis=1, initial=np.inf) * Objective(problem).top_k
    return np.where(np.isfinite(least), least, 0.0)


def _least_pairs_us(problem: Problem, limits: Limits) -> tuple[float, str] | None:
    """Compute the least microseconds of pairs on links with evenly used ports, and the proof."""
    assert problem.cost_model is not None
    if not proves_pairs(problem) or limits.time_limit == 0:
        return None
    plain = replace(
        problem,
        objective="traffic",
        max_imbalance=None,
        pinned=(),
        forbidden=(),
        # What overlaps is taken off the sum of both parts.
        cost_model=replace(problem.cost_model, overlap=0.0),
    )
    proven = bound(plain, plain.caps.whole, limits=limits)
    if proven is None:
        return None
    price, cost = Objective(plain).link_us, problem.topology.cost
    dearer = cost > 0
    per_cost = float((price[dearer] / cost[dearer]).min()) if dearer.any() else 0.0
    return proven.cost * per_cost, proven.source
