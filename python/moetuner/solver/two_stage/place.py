"""Stage 2 of the paper's method: clusters on devices, so that the busiest links are less busy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.milp.highs import Ilp, Solution
from moetuner.solver.result import Status
from moetuner.solver.two_stage.cluster import TOLERANCE

Devices = NDArray[np.int64]


@dataclass(frozen=True)
class PlacedClusters:
    """The result of stage 2: the device of every cluster [L,D], and what it costs.

    ``bottleneck`` is the sum over boundaries of the busiest pair's tokens * cost, and ``bound`` a
    proven lower bound of it. ``total`` is the sum over all pairs; it decides between equal
    bottlenecks. ``way`` is the search that ended it.
    """

    device: Devices
    way: str
    bottleneck: int
    bound: int
    total: int
    status: Status

    @property
    def gap(self) -> float:
        """(bottleneck - bound) / bottleneck."""
        return (self.bottleneck - self.bound) / self.bottleneck if self.bottleneck else 0.0


def cluster_traffic(
    transitions: NDArray[np.uint64], cluster: Devices, clusters: int
) -> NDArray[np.uint64]:
    """Return tokens from cluster to cluster [L-1,D,D], by the cluster of every expert [L,E]."""
    traffic = np.zeros((len(transitions), clusters, clusters), dtype=np.uint64)
    for layer, table in enumerate(transitions):
        pair = cluster[layer][:, None] * clusters + cluster[layer + 1]
        np.add.at(traffic[layer].reshape(-1), pair, table)
    return traffic


def place_clusters(
    traffic: ArrayLike,
    cost: ArrayLike,
    *,
    sizes: ArrayLike | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    budget: Budget | None = None,
) -> PlacedClusters:
    """Return devices that minimise sum_l max_{d != d'} traffic_l(d,d') / bandwidth(d,d').

    Stage 2 places clusters. It is exact where links are alike and cluster sizes equal; else it is a
    local search. Where sizes differ, HiGHS goes on from its answer if there are at most
    ``effort.MOST_PRODUCTS`` products.

    ``traffic`` [L-1,D,D] are tokens from cluster to cluster of the next layer. ``cost`` [D,D] is
    that of a token from device to device: whole numbers in proportion to 1 / bandwidth, as
    ``Topology.cost`` rounds them to sixteenths of the fastest link, so within 1/32. With ``sizes``,
    experts of every cluster [L,D], devices get as equal numbers over all layers as whole clusters
    allow.
    """
    traffic = np.ascontiguousarray(traffic, dtype=np.uint64)
    cost = np.ascontiguousarray(cost, dtype=np.int64)
    counts = None if sizes is None else np.ascontiguousarray(sizes, dtype=np.uint64)
    budget = budget or Budget()
    tables = (traffic, cost.astype(np.uint64))
    search = partial(_core.place_clusters, *tables, sizes=counts, threads=budget.threads)
    placed, way, bound, interrupted = search(time_limit=budget.seconds_left)
    if counts is not None and not interrupted and not budget.is_over():
        totals = np.bincount(placed.ravel(), counts.ravel().astype(np.float64))
        if totals.max() - totals.min() > (totals.sum() % len(totals) != 0):
            # Exchanges do not even out totals, but keep them even from a start that has them so.
            even_device = _even_totals(counts, placed.astype(np.int64), seed=seed, budget=budget)
            start = even_device.astype(np.uint16)
            placed, way, bound, interrupted = search(start=start, time_limit=budget.seconds_left)
    device = placed.astype(np.int64)
    bottleneck, total = _compute_costs(traffic, cost, device)
    status: Status = "interrupted" if interrupted else "feasible"
    is_small = counts is not None and len(traffic) * len(cost) ** 4 <= effort.MOST_PRODUCTS
    if not interrupted and bottleneck - bound <= tolerance * bottleneck:
        status = "gap_reached"
    elif not interrupted and is_small:
        solution, device = place_by_ilp(
            traffic,
            cost,
            device,
            counts,
            (bottleneck, bound),
            tolerance=tolerance,
            seed=seed,
            budget=budget,
        )
        proven = (solution.bound - 1e-6) * max(bottleneck, 1)  # HiGHS proves in floating point
        bottleneck, total = _compute_costs(traffic, cost, device)
        # Costs are whole numbers: a bound with a fraction is raised to the next whole one.
        bound = max(bound, math.ceil(proven))
        # Optimal within the tolerance, or by what HiGHS proves in floats.
        way, status = "ilp", "gap_reached" if solution.status == "optimal" else solution.status
    if bottleneck <= bound and not interrupted:
        status = "optimal"
    return PlacedClusters(device, way, bottleneck, min(bound, bottleneck), total, status)


def _compute_costs(traffic: NDArray[np.uint64], cost: Devices, device: Devices) -> tuple[int, int]:
    """Sum over boundaries tokens * cost of the busiest pair, and of all pairs, exactly."""
    bottleneck = total = 0
    for layer, table in enumerate(traffic):
        costs = cost[np.ix_(device[layer], device[layer + 1])]
        time = table.astype(object) * costs.astype(object)
        bottleneck, total = bottleneck + int(time.max()), total + int(time.sum())
    return bottleneck, total


def _even_totals(
    sizes: NDArray[np.uint64], start: Devices, *, seed: int, budget: Budget
) -> Devices:
    """Return devices of clusters [L,D] for as equal totals of experts as can be, without traffic.

    ``sizes`` are the experts of every cluster [L,D].
    """
    layers, n = sizes.shape
    y = np.arange(layers * n * n).reshape(layers, n, n)
    t = y.size + np.arange(n)
    ilp = Ilp(
        np.r_[np.zeros(y.size), np.ones(n)],
        upper=np.r_[np.ones(y.size), np.full(n, np.inf)],
        integer=np.r_[np.ones(y.size), np.zeros(n)],
    )
    _add_permutations(ilp, y)
    total, count = int(sizes.sum()), np.repeat(sizes.ravel().astype(np.float64), n)
    ilp.add_deviations(np.indices(y.shape)[2], y, count, total / n, t)
    # Whole totals: below this sum of differences no placement is.
    above = total % n
    ilp.add_rows(2 * above * (n - above) / n, np.inf, np.zeros(n, dtype=np.int64), t)
    placed = start[:, :, None] == np.arange(n)
    spread = np.abs((placed * count.reshape(y.shape)).sum(axis=(0, 1)) - total / n)
    values = np.r_[placed.ravel(), spread]
    solution = ilp.solve(
        values, seed=seed, nodes=effort.STAGE_NODES, time_limit=budget.seconds_left
    )
    device: Devices = solution.values[y].argmax(axis=2)
    return device


def place_by_ilp(
    traffic: NDArray[np.uint64],
    cost: Devices,
    start: Devices,
    sizes: NDArray[np.uint64] | None,
    proven: tuple[int, int],
    *,
    tolerance: float,
    seed: int,
    budget: Budget,
) -> tuple[Solution, Devices]:
    """Return the solution of stage 2 by HiGHS, and the device of every cluster [L,D].

    The integer programme is that of the paper: it minimises sum_l t_l with t_l >= traffic_l(d,d') /
    bandwidth(d,d'). The variable y[l,c,d] says whether cluster c of layer l is on device d. A
    product w[l,c,c',d,d'] = y[l,c,d] * y[l+1,c',d'] is continuous; its sums over d' and over d are
    its two factors.

    The search begins at ``start``, devices of clusters [L,D]. ``proven`` is the start's objective,
    which is the unit of the solution's, and a lower bound. Totals of experts per device stay as
    even as those of the start.
    """
    scale = float(max(proven[0], 1))
    boundaries, n = len(traffic), len(cost)
    y = np.arange((boundaries + 1) * n * n).reshape(-1, n, n)
    w = y.size + np.arange(boundaries * n**4).reshape(boundaries, n, n, n, n)
    t = y.size + w.size + np.arange(boundaries)
    objective, integer, upper = np.zeros((3, y.size + w.size + boundaries))
    objective[t] = integer[y] = 1
    upper[: y.size + w.size] = 1
    upper[t] = np.inf
    ilp = Ilp(objective, upper=upper, integer=integer)
    _add_permutations(ilp, y)
    placed = (start[:, :, None] == np.arange(n)).astype(np.float64)
    if sizes is not None:
        count = np.repeat(sizes.ravel().astype(np.float64), n).reshape(y.shape)
        totals = (placed * count).sum(axis=(0, 1))
        ilp.add_rows(np.full(n, totals.min()), totals.max(), np.indices(y.shape)[2], y, count)
    l, c, c2, d, d2 = (index.ravel() for index in np.indices(w.shape))  # noqa: E741
    # sum_d' w[l,c,c',d,d'] = y[l,c,d] and sum_d w[l,c,c',d,d'] = y[l+1,c',d'].
    for factor, device in ((y[l, c, d], d), (y[l + 1, c2, d2], d2)):
        row = ((l * n + c) * n + c2) * n + device
        rows, at = np.unique(row, return_index=True)
        entries = np.r_[row, rows], np.r_[w.ravel(), factor[at]]
        ilp.add_rows(np.zeros(len(rows)), 0, *entries, np.r_[np.ones(w.size), -np.ones(len(rows))])
    # t_l >= sum_cc' traffic_l(c,c') w[l,c,c',d,d'] / bandwidth(d,d')
    time = traffic.astype(np.float64)[l, c, c2] * cost[d, d2] / scale
    rows = np.arange(boundaries * n * n)
    entries = np.r_[(l * n + d) * n + d2, rows], np.r_[w.ravel(), np.repeat(t, n * n)]
    ilp.add_rows(np.zeros(len(rows)), np.inf, *entries, np.r_[-time, np.ones(len(rows))])
    ilp.add_rows(proven[1] / scale, np.inf, np.zeros(boundaries, dtype=np.int64), t)
    products = placed[:-1, :, None, :, None] * placed[1:, None, :, None, :]
    busiest = (products.ravel() * time).reshape(boundaries, -1).max(axis=1)
    solution = ilp.solve(
        np.r_[placed.ravel(), products.ravel(), busiest],
        seed=seed,
        gap=tolerance,
        nodes=effort.PLACE_NODES,
        time_limit=budget.seconds_left,
        progress=budget.report("placing clusters"),
    )
    return solution, solution.values[y].argmax(axis=2)


def _add_permutations(ilp: Ilp, y: Devices) -> None:
    """Add rows that give every layer one cluster on each device, of y[l,c,d]."""
    layer, c, d = np.indices(y.shape)
    rows = np.ones(y.shape[0] * y.shape[1])
    for index in (c, d):
        ilp.add_rows(rows, 1, layer * y.shape[1] + index, y)
