"""What a placement is worth to a problem: balance, time, traffic. And what no placement can beat.

Time is made of the same parts as in ``CostModel``, but so that it adds up, which a search needs:
every token more on the slowest device costs ``token_us``, and every row over a link what it costs
if ports are evenly used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moetuner import _split
from moetuner.placement import EMPTY, Placement
from moetuner.topology import Topology

if TYPE_CHECKING:
    from moetuner.problem import Problem

Floats = NDArray[np.float64]


def balance(problem: Problem, placement: Placement) -> float:
    """Max / mean load of devices, each over its speed, in the problem's windows and risk."""
    return problem.windows.outcome(slowest_time(problem, placement), mean_time(problem))


def slowest_time(problem: Problem, placement: Placement) -> Floats:
    """Largest load over speed of a device in every window [W], summed over layers."""
    windows, speed = problem.windows, problem.topology.speed_of_device
    slots = placement.slots
    filled = slots != EMPTY
    if np.count_nonzero(filled) == placement.layers * placement.num_experts:
        # One copy each.
        cell = slots + np.arange(placement.layers)[:, None, None] * placement.num_experts
        of_slot = windows.load.reshape(len(windows.load), -1).take(cell, axis=1)
        if not filled.all():
            of_slot *= filled
        each: Floats = (of_slot.sum(axis=3) / speed).max(axis=2).sum(axis=1)
        return each
    slowest = np.zeros(len(windows.load))
    for layer, share in enumerate(_split.shares(placement, problem.topology, problem.split)):
        slowest += (windows.load[:, layer] @ share.T / speed).max(axis=1)
    return slowest


def mean_time(problem: Problem) -> Floats:
    """Load over speed, if every device had its part, in every window [W], summed over layers."""
    mean: Floats = problem.windows.load.sum(axis=(1, 2)) / problem.topology.speed_of_device.sum()
    return mean


def time(problem: Problem, placement: Placement) -> float:
    """Predicted microseconds of a layer and window."""
    return compute_us(problem, balance(problem, placement)) + traffic_us(problem, placement)


def compute_us(problem: Problem, imbalance: float) -> float:
    """Microseconds that the slowest device of a layer and window computes at an imbalance."""
    windows = problem.windows
    assert problem.cost_model is not None
    mean = float((windows.weight * mean_time(problem)).sum() / windows.weight.sum())
    return problem.cost_model.token_us * imbalance * mean / problem.layers


def link_us(problem: Problem) -> Floats:
    """Microseconds of a pair of experts that meet over a link [D,D].

    A token's state goes to the next layer's experts once each, but is counted with each of its own
    experts: in pairs, it is a top-k-th of a row.
    """
    assert problem.cost_model is not None
    topology = problem.topology
    weights = problem.cost_model.weights(topology, returns=problem.regime == "dispatch")
    if topology.link_cost is None:
        row = weights.crossing_us[topology.tier]
    else:
        cost = topology.cost.astype(np.float64)
        row = cost / cost[cost > 0].min() * weights.crossing_us[1] if cost.any() else cost
    return row / top_k(problem)


def top_k(problem: Problem) -> float:
    """Experts that a token visits in a layer, from the counts; 1 where they do not tell."""
    pairs = problem.statistics.transitions
    load = float(problem.load[:-1].sum())
    return max(float(pairs.sum()) / load, 1.0) if pairs is not None and load else 1.0


def traffic_us(problem: Problem, placement: Placement) -> float:
    """Microseconds of a layer and window for what moves from device to device."""
    if problem.counts_visits:
        return visits(problem, placement) * visit_us(problem)
    if problem.regime != "follow" or problem.statistics.transitions is None:
        return 0.0
    price = link_us(problem)
    total = float(sum((moved * price).sum() for moved in _moved(problem, placement)))
    return total / (problem.layers * problem.statistics.windows)


def visit_us(problem: Problem) -> float:
    """Microseconds of a layer and window if every token visited one more device.

    Of D devices that are visited alike, a token is at home on one.
    """
    assert problem.cost_model is not None
    assert problem.statistics.sets is not None
    crossing = problem.cost_model.weights(problem.topology, returns=True).crossing_us
    tokens = float(problem.statistics.sets[0].counts.sum()) / problem.statistics.windows
    return float(crossing[min(1, len(crossing) - 1)]) * tokens * (1 - 1 / problem.devices)


def traffic(problem: Problem, placement: Placement) -> float:
    """Expect a cost of pairs, with any copies of their experts, over ``Problem.cost_scale``.

    0 where no pairs were counted.
    """
    if not problem.has_pairs:
        return 0.0
    if problem.regime == "follow":
        cost = problem.topology.cost
        total = sum((moved * cost).sum() for moved in _moved(problem, placement))
        return float(total) / problem.cost_scale
    shares = _split.shares(placement, problem.topology, problem.split)
    apart = 0.0
    for share, table in zip(shares, problem.statistics.coactivation_or_empty, strict=True):
        pairs = table.astype(np.float64)
        apart += (pairs * (1 - share.T @ share)).sum() / 2
    return float(apart) / problem.cost_scale


def visits(problem: Problem, placement: Placement) -> float:
    """Devices that a token visits in a layer, and nodes at their price, on average.

    Copies are taken to be chosen independently of each other.
    """
    assert problem.statistics.sets is not None
    device_cost, node_cost = visit_costs(problem.topology)
    node = problem.topology.node_of_device
    shares = _split.shares(placement, problem.topology, problem.split)
    total = tokens = 0.0
    for share, sets in zip(shares, problem.statistics.sets, strict=True):
        # Share of a set's tokens that do not visit a device [N,D], or a node.
        missed = np.ones((len(sets.counts), problem.devices))
        far = np.ones((len(sets.counts), problem.topology.nodes))
        in_node = np.stack([share[node == n].sum(axis=0) for n in range(problem.topology.nodes)])
        for expert in sets.ids.T:
            missed *= 1 - share.T[expert]
            far *= 1 - in_node.T[expert]
        cost = device_cost * (1 - missed).sum(axis=1) + node_cost * (1 - far).sum(axis=1)
        total += float(cost @ sets.counts)
        tokens += float(sets.counts.sum())
    return total / tokens if tokens else 0.0


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


def _moved(problem: Problem, placement: Placement) -> list[Floats]:
    """Pairs from device to device [D,D] of every two neighbouring layers."""
    shares = _split.shares(placement, problem.topology, problem.split)
    return [
        here @ table.astype(np.float64) @ there.T
        for here, table, there in zip(
            shares[:-1], problem.statistics.transitions_or_empty, shares[1:], strict=True
        )
    ]


def least_balance(problem: Problem) -> float:
    """Below this no placement's ``balance`` can be.

    A window's slowest device takes at least the mean, and at least what the heaviest expert takes
    on the fastest devices that can hold all the copies there is room for.
    """
    windows, speed = problem.windows, np.sort(problem.topology.speed_of_device)[::-1]
    devices = int((problem.rooms > 0).sum(axis=1).min())
    spare = problem.rooms.sum(axis=1) - problem.experts
    bound = np.zeros(len(windows.load))
    for layer in range(problem.layers):
        load = windows.load[:, layer]
        copies = min(int(spare[layer]) + 1, devices) if problem.may_copy else 1
        heaviest = load.max(axis=1)
        if problem.split == "nearest":
            # Uneven parts are at least those that make all copies equally slow.
            one = heaviest / speed[:copies].sum()
        else:
            one = heaviest / copies / speed[0]
        bound += np.maximum(load.sum(axis=1) / problem.topology.speed_of_device.sum(), one)
    return windows.outcome(bound, mean_time(problem))


def least_visits(problem: Problem) -> float:
    """Below this no placement's ``visits`` can be: a token's experts fill the fewest devices."""
    assert problem.statistics.sets is not None
    device_cost, node_cost = visit_costs(problem.topology)
    width = problem.statistics.sets[0].ids.shape[1]
    return float(device_cost * -(-width // problem.slots) + node_cost)
