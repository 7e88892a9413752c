"""Small problems, and their optimum by trying every placement."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import moetuner as mt


def small_problem(
    seed: int,
    layers: int = 3,
    experts: int = 6,
    devices: int = 3,
    *,
    slots: int | None = None,
    regime: str = "follow",
    max_imbalance: float | None = 1.2,
    devices_per_node: int | None = None,
    largest: int = 30,
) -> mt.Problem:
    """Make a problem of random counts; cost between nodes is three times that within."""
    random = np.random.default_rng(seed)
    load = random.integers(0, largest, (1, layers, experts), dtype=np.uint64)
    transitions = random.integers(0, largest, (layers - 1, experts, experts), dtype=np.uint64)
    half = np.triu(random.integers(0, largest, (layers, experts, experts), dtype=np.uint64), 1)
    statistics = mt.RoutingStatistics(load, transitions, half + half.transpose(0, 2, 1))
    topology = mt.Topology(
        devices,
        devices_per_node=devices_per_node,
        intra_node_bandwidth=3e9,
        inter_node_bandwidth=1e9,
    )
    return mt.Problem(
        statistics,
        topology,
        slots_per_device=slots,
        regime=regime,
        max_imbalance=max_imbalance,
        objective="traffic",
    )


def every_placement(problem: mt.Problem) -> Iterator[mt.Placement]:
    """Give every placement with at least one copy of each expert, slots in order of ids."""
    layers = [list(every_layer(problem, slots)) for slots in problem.capacity.tolist()]
    for chosen in itertools.product(*layers):
        yield mt.Placement(np.array(chosen), num_experts=problem.num_experts)


def every_layer(problem: mt.Problem, capacity: list[int]) -> Iterator[list[list[int]]]:
    """Contents [D,S] of a layer's devices."""
    experts, width = range(problem.num_experts), problem.slots
    contents = [
        [chosen for n in range(slots + 1) for chosen in itertools.combinations(experts, n)]
        for slots in capacity
    ]
    for devices in itertools.product(*contents):
        if len(set().union(*devices)) == problem.num_experts:
            yield [[*chosen, *[-1] * (width - len(chosen))] for chosen in devices]


def least_value_of_layer(problem: mt.Problem) -> float:
    """Least value of the only layer of a problem on equal devices.

    All that devices may hold are judged at once, as the layers of one placement.
    """
    experts = range(problem.num_experts)
    sets = [
        chosen
        for number in range(problem.slots + 1)
        for chosen in itertools.combinations(experts, number)
    ]
    contents = [
        [(*chosen, *[-1] * (problem.slots - len(chosen))) for chosen in devices]
        for devices in itertools.combinations_with_replacement(sets, problem.devices)
        if len(set().union(*devices)) == problem.num_experts
    ]
    load = np.repeat(problem.statistics.window_load, len(contents), axis=1)
    many = replace(problem, statistics=mt.RoutingStatistics.from_load(load)).objective_function
    costs = many.window_cost(mt.Placement(np.array(contents), num_experts=problem.num_experts))
    return float(many.compute_values(costs.T).min()) * len(contents)


def optimum(problem: mt.Problem, caps: NDArray[np.integer] | None = None) -> int | None:
    """Least `Objective.cost` under caps [L] or [L,D]; None if no placement keeps them.

    Every device of every expert, layer by layer: the cost is a chain, so the least cost that ends
    in a given layer is all that has to be remembered.
    """
    D, E = problem.devices, problem.num_experts
    caps = problem.caps.whole if caps is None else caps
    caps = np.broadcast_to(np.atleast_2d(caps.T).T, (problem.layers, D))
    all_ways = np.array(list(itertools.product(range(D), repeat=E)))
    is_on = (all_ways[:, :, None] == np.arange(D)).astype(np.int64)
    all_ways, is_on = (
        x[(is_on.sum(axis=1) <= problem.slots).all(axis=1)] for x in (all_ways, is_on)
    )
    value, before = None, None
    for layer in range(problem.layers):
        load = np.einsum("e,wed->wd", problem.load[layer].astype(np.int64), is_on)
        fits = (load <= caps[layer].astype(np.int64)).all(axis=1)
        ways, on = all_ways[fits], is_on[fits]
        if not len(ways):
            return None
        own = np.zeros(len(ways), dtype=np.int64)
        if problem.regime == "dispatch":
            together = problem.statistics.coactivation_or_empty[layer].astype(np.int64)
            apart = ways[:, :, None] != ways[:, None, :]
            own = (together * apart).sum(axis=(1, 2)) // 2
        if value is None or before is None:
            value = own
        elif problem.regime == "dispatch":
            value = value.min() + own
        else:
            table = problem.statistics.transitions_or_empty[layer - 1].astype(np.int64)
            flow = np.einsum("wed,ef->wdf", before, table)
            price = np.einsum("wdf,dc->wfc", flow, problem.topology.cost)
            step = price.reshape(len(price), -1) @ on.reshape(len(on), -1).T
            value = (value[:, None] + step).min(axis=0) + own
        before = on
    assert value is not None
    return int(value.min())


def rank(problem: mt.Problem, placement: mt.Placement) -> tuple[float, float]:
    """Load above caps, then the value: lower is better."""
    return float(problem.caps.excess(placement).sum()), problem.value(placement)


def raised_caps(problem: mt.Problem, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Caps [L], raised to the loads of a placement that breaks them."""
    device_of = mt.Placement(slots, num_experts=problem.num_experts).device_of
    load = np.zeros((problem.layers, problem.devices), dtype=np.uint64)
    np.add.at(load, (np.arange(problem.layers)[:, None], device_of), problem.load)
    return np.maximum(problem.caps.whole, load.max(axis=1))
