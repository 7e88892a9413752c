"""What a placement is worth to a problem: balance, time, traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import copies, expected, figures, replay
from moetuner.placement import Placement
from moetuner.topology import Topology

if TYPE_CHECKING:
    from moetuner.problem import Problem

Floats = NDArray[np.float64]


def outcome(problem: Problem, placement: Placement) -> float:
    """Objective balance or time, in the problem's windows and risk.

    Balance is max / mean load of devices, each over its speed. Time is the predicted microseconds
    of a layer, as ``evaluate`` predicts them for the problem's own statistics.
    """
    return problem.windows.outcome(shares(problem, placement).sum(axis=1), measure(problem))


def shares(problem: Problem, placement: Placement) -> Floats:
    """Say what every window and layer [W,L] adds to balance or time."""
    return shares_of(problem, placement, problem.statistics, problem.windows.load)


def shares_of(
    problem: Problem, placement: Placement, statistics: replay.Counted, load: Floats
) -> Floats:
    """Say the same of other layers, as parts of the problem's: of windows of load [W,n,E].

    Pairs and sets are those of the statistics.
    """
    if problem.goal == "time":
        return _layer_times(problem, placement, statistics, load) / problem.layers
    return slowest_times(problem, placement, load)


def measure(problem: Problem) -> Floats:
    """Say what the shares of a window's layers are measured by [W]: 1 for time, else the mean.

    The mean is load over speed, if every device had its part.
    """
    if problem.goal == "time":
        return np.ones(len(problem.windows.load))
    return _even_times(problem)


def imbalances(problem: Problem, placement: Placement) -> Floats:
    """Return what every layer [L] adds to max / mean load, whatever the objective is."""
    slowest, mean = slowest_times(problem, placement, problem.windows.load), _even_times(problem)
    return np.array([problem.windows.outcome(of, mean) for of in slowest.T])


def _even_times(problem: Problem) -> Floats:
    """Load over speed of every window's layers [W], if every device had its part."""
    speed = problem.topology.speed_of_device
    mean: Floats = problem.windows.load.sum(axis=(1, 2)) / speed.sum()
    return mean


def slowest_times(problem: Problem, placement: Placement, load: Floats) -> Floats:
    """Largest load over speed of a device in every window and layer [W,L]."""
    speed = problem.topology.speed_of_device
    share = copies.copy_shares(placement, problem.topology, problem.split)
    each = copies.served(placement, share, load)
    slowest: Floats = (each / speed).max(axis=2)
    return slowest


def _layer_times(
    problem: Problem, placement: Placement, statistics: replay.Counted, load: Floats
) -> Floats:
    """Predicted microseconds of every window and layer [W,L]."""
    assert problem.cost_model is not None
    rules = replay.Rules(
        placement,
        problem.topology,
        window=None,
        split=problem.split,
        with_active=problem.cost_model.expert_us > 0,
        threads=None,
        with_mixed=False,
    )
    counts = replay.Expected(statistics, rules).counts(load)
    return figures.layer_us(counts, problem.topology, problem.cost_model, problem.regime)


def traffic(problem: Problem, placement: Placement) -> float:
    """Expect a cost of pairs, with any copies of their experts, over ``Problem.cost_scale``.

    0 where no pairs were counted.
    """
    if not problem.has_pairs:
        return 0.0
    if problem.regime == "follow":
        tables = problem.statistics.transitions_or_empty
        moved = expected.followed(placement, problem.topology, problem.split, tables)
        return float((moved * problem.topology.cost).sum()) / problem.cost_scale
    return float(_apart(problem, placement).sum())


def layers_traffic(problem: Problem, placement: Placement) -> Floats:
    """Return what every layer [L] adds to the traffic, if that is of dispatch; else 0.

    0 too where neither expert sets nor pairs were counted.
    """
    if problem.counts_visits:
        return _visits(problem, placement)
    pairs = problem.regime == "dispatch" and problem.has_pairs
    return _apart(problem, placement) if pairs else np.zeros(problem.layers)


def _apart(problem: Problem, placement: Placement) -> Floats:
    """Share of all co-activated pairs that are apart, by layer [L]."""
    shares = copies.shares(placement, problem.topology, problem.split)
    apart = [
        (table.astype(np.float64) * (1 - share.T @ share)).sum() / 2
        for share, table in zip(shares, problem.statistics.coactivation_or_empty, strict=True)
    ]
    return np.array(apart) / problem.cost_scale


def visits(problem: Problem, placement: Placement) -> float:
    """Devices that a token visits in a layer, and nodes at their price, on average.

    Copies are taken to be chosen independently of each other.
    """
    return float(_visits(problem, placement).sum())


def _visits(problem: Problem, placement: Placement) -> Floats:
    """Return what every layer [L] adds to the visits."""
    assert problem.statistics.sets is not None
    device_cost, node_cost = visit_costs(problem.topology)
    shares = copies.shares(placement, problem.topology, problem.split)
    sets = problem.statistics.sets
    devices, nodes = expected.visits(shares, sets, problem.topology.node_of_device)
    tokens = sum(float(of.counts.sum()) for of in sets)
    total: Floats = device_cost * devices.sum(axis=1) + node_cost * nodes.sum(axis=1)
    return total / max(tokens, 1.0)


def visit_costs(topology: Topology) -> tuple[float, float]:
    """Cost of a token's visit of a device and, on top of it, of a node.

    A token crosses to a node once and is handed on inside it, so a node costs a link between nodes
    where a device costs one inside.
    """
    if topology.nodes < 2 or topology.node_size < 2:
        return 1.0, 0.0
    node = topology.node_of_device
    beyond = np.not_equal.outer(node, node)
    cost = topology.cost
    inside = cost[~beyond & (cost > 0)].mean() if (cost[~beyond] > 0).any() else 1.0
    return 1.0, float(cost[beyond].mean() / inside)
