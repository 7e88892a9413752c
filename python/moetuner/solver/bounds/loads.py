"""Lower bounds on balance and time by loads alone; bounds on time also have the cost of pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.pins import NO_RULES
from moetuner.solver.arrays import Floats
from moetuner.solver.bounds import pairs
from moetuner.solver.budget import Budget
from moetuner.solver.result import LOADS
from moetuner.solver.run import Bound, Run, Stage

# Sums of floats may be off by this part.
SUM_ROUNDING = 1e-10
# Loads of windows, layers and experts up to which heavy experts that must share are counted.
MOST_SORTED = 20_000_000


def _prove(run: Run, budget: Budget) -> None:
    """Bound balance or time from below; traffic only where no token crosses a link.

    The minimum of a sum is at least the sum of the minima, so the parts of a time, compute and
    traffic, are bounded one by one.
    """
    problem, source = run.problem, LOADS
    if not problem.aim.costs_loads:
        placement = Placement(run.best.slots, num_experts=problem.num_experts)
        if problem.objective_function.value(placement) > 0:
            return  # no bound on traffic with copies is known
        least = 0.0
    elif problem.aim.predicts_time:
        moved = _least_pairs_us(problem, budget)
        least = least_time(problem, 0.0 if moved is None else moved[0])
        source = LOADS if moved is None else f"loads + {moved[1]}"
    else:
        least = least_balance(problem)
    # Takes off what rounding may have added; it is below the digits that are shown.
    run.prove(Bound(least * (1 - SUM_ROUNDING) * run.scale, source))


def proves_pairs(problem: Problem) -> bool:
    """Return whether a bound on pairs is proven: with single copies on equal devices only."""
    alike = problem.topology.has_equal_devices and not problem.may_copy
    joins_layers = problem.aim.predicts_time and problem.serving.way.joins_layers
    return joins_layers and alike and problem.devices > 1


def least_balance(problem: Problem) -> float:
    """Compute a lower bound on the balance of every placement."""
    least = problem.windows.map(lambda load: least_slowest(problem, load).sum(axis=1))
    return float(problem.objective_function.compute_values(least))


def least_time(problem: Problem, pairs_us: float = 0.0) -> float:
    """Compute a lower bound on the time of every placement whose pairs cost ``pairs_us`` or more.

    With overlap, the time is convex in compute and communication, so the mean over layers is at
    least the time of the mean layer.
    """
    assert problem.cost_model is not None
    compute = problem.windows.map(lambda load: _least_compute(problem, load).mean(axis=1))
    if problem.serving.way.visits_devices:
        moved = problem.windows.map(lambda load: _least_rows_us(problem, load).mean(axis=1))
    else:
        moved = pairs_us * _least_part(problem) / problem.layers
    times = problem.cost_model.layer_us(compute[:, None], moved)
    return float(problem.objective_function.compute_values(times))


def least_slowest(problem: Problem, load: Floats) -> Floats:
    """Compute the least load over speed of the slowest device [W,L] of windows of load [W,L,E].

    It is at least the mean. It is at least the load of the heaviest expert, spread over as many
    copies as there is room for, on the fastest devices. And it is at least the load of heavy
    experts that must share a device.
    """
    speed = np.sort(problem.topology.speed_of_device)[::-1]
    devices = int((problem.capacity > 0).sum(axis=1).min())
    spare = problem.capacity.sum(axis=1) - problem.num_experts
    is_small = len(problem.windows) * problem.layers * problem.num_experts <= MOST_SORTED
    least = np.empty(load.shape[:2])
    for layer in range(problem.layers):
        layer_load = load[:, layer]
        spare_slots = int(spare[layer]) if problem.may_copy else 0
        copies = min(spare_slots + 1, devices)
        heaviest = layer_load.max(axis=1)
        if not problem.serving.rule.is_even:
            # Uneven parts are at least those that make all copies equally slow.
            one = heaviest / speed[:copies].sum()
        else:
            one = heaviest / copies / speed[0]
        least[:, layer] = np.maximum(layer_load.sum(axis=1) / speed.sum(), one)
        if is_small and spare_slots < problem.num_experts:
            together = (
                least_shared(layer_load, int((problem.capacity[layer] > 0).sum()), spare_slots)
                / speed[0]
            )
            least[:, layer] = np.maximum(least[:, layer], together)
    return least


def least_shared(load: Floats, devices: int, copied: int) -> Floats:
    """Compute the least load of a device on which experts must share [W], of loads [W,E].

    At most ``copied`` experts have copies; the bound is lowest if those are the heaviest. Take the
    k * devices + 1 heaviest of the others: k + 1 of them share a device (pigeonhole), and their
    load is at least that of the k + 1 lightest among them.
    """
    single = np.sort(load, axis=1)[:, ::-1][:, copied:]
    least = np.zeros(len(load))
    for k in range(1, (single.shape[1] - 1) // devices + 1):
        least = np.maximum(least, single[:, k * (devices - 1) : k * devices + 1].sum(axis=1))
    return least


def _least_compute(problem: Problem, load: Floats) -> Floats:
    """Compute the least microseconds of the slowest device [W,L], of windows of load [W,L,E]."""
    assert problem.cost_model is not None
    # The copies of an expert are active at least as often, in all, as one copy would be.
    active = np.minimum(load, 1.0) if problem.may_copy else load > 0
    return problem.cost_model.least_compute_us(
        least_slowest(problem, load),
        active.sum(axis=2),
        load.sum(axis=2),
        problem.topology.speed_of_device,
        are_single=not problem.may_copy,
    )


def _least_rows_us(problem: Problem, load: Floats) -> Floats:
    """Compute the least microseconds of rows to devices and back [W,L], of load [W,L,E]."""
    model, topology = problem.cost_model, problem.topology
    assert model is not None
    tokens: Floats = load.sum(axis=2)
    if problem.serving.rule.by_home and problem.may_copy:
        return np.zeros_like(tokens)
    if problem.statistics.sets is not None:
        # A visit is of as many experts as a token has, and a device holds, at most.
        tokens = tokens / min(problem.statistics.sets[0].top_k, problem.slots)
    elif problem.statistics.top_k_of_layer is not None:
        # Estimated visits are of as many experts as a token has at most.
        tokens = tokens / np.array(problem.statistics.top_k_of_layer)
    tiers = np.arange(1, len(topology.levels) + 1)
    elsewhere = (topology.tier[:, :, None] == tiers).mean(axis=(0, 1))
    if model.once_per == "node":
        elsewhere[1:] = 0
    rows = tokens[:, :, None] * elsewhere / topology.devices
    back = model.ports_us(rows, topology, bytes_each=model.bytes_back)
    return model.ports_us(rows, topology) + back


def _least_part(problem: Problem) -> Floats:
    """Compute the least part of the cost of all pairs that each window [W] pays."""
    load = problem.windows.map(lambda load: load.sum(axis=2))[:, 1:]
    if problem.statistics.transitions is None:
        return np.zeros(len(load))
    counted = problem.statistics.transitions.sum(axis=(1, 2), dtype=np.float64)
    window_share = load / np.maximum(counted, 1)
    least: Floats = window_share.min(axis=1, initial=np.inf) * problem.objective_function.top_k
    return np.where(np.isfinite(least), least, 0.0)


def _least_pairs_us(problem: Problem, budget: Budget) -> tuple[float, str] | None:
    """Compute the least microseconds of pairs on links with evenly used ports, and the proof."""
    assert problem.cost_model is not None
    short = budget.seconds_left is not None and budget.seconds_left < pairs.least_seconds(problem)
    if not proves_pairs(problem) or short:
        return None
    plain = replace(
        problem,
        objective="traffic",
        max_imbalance=None,
        **NO_RULES,
        # Overlap is subtracted from the sum of both parts.
        cost_model=replace(problem.cost_model, overlap=0.0),
    )
    proven = pairs.bound(plain, plain.caps.whole, budget=budget)
    if proven is None:
        return None
    if proven.interrupted:
        raise KeyboardInterrupt
    price, cost = plain.objective_function.link_us, problem.topology.cost
    dearer = cost > 0
    per_cost = float((price[dearer] / cost[dearer]).min()) if dearer.any() else 0.0
    return proven.value * per_cost, proven.source


def _applies(run: Run) -> bool:
    is_proven = run.objective.has_expert_sets or pairs.is_of_pairs(run)
    return run.problem.aim.costs_loads or not is_proven


LOAD_BOUND = Stage(
    _prove,
    applies=_applies,
    least=lambda _: -1.0,
    reserve=lambda run, seconds_left: (
        pairs.reserve(run.problem, seconds_left) * proves_pairs(run.problem)
    ),
)
