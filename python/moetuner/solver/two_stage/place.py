"""Stage 2 of the paper's method: clusters on devices, so that the busiest links are less busy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.solver import effort
from moetuner.solver.result import Clock, Limits, Status
from moetuner.solver.two_stage import programmes
from moetuner.solver.two_stage.cluster import TOLERANCE


@dataclass(frozen=True)
class PlacedClusters:
    """Stage 2: clusters on devices.

    Parameters
    ----------
    device
        Of every cluster [L,D].
    way
        ``"exact: uniform links"``, ``"exact: dynamic programming"``, ``"heuristic: local search"``
        or ``"ilp"``.
    bottleneck, bound
        Sum over boundaries of the busiest pair's tokens * cost, and a proven lower bound of it.
    total
        Sum of tokens * cost over all pairs, which decides between equal bottlenecks.
    status
        How the search ended.
    """

    device: NDArray[np.int64]
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
    transitions: NDArray[np.uint64], cluster: NDArray[np.int64], clusters: int
) -> tuple[NDArray[np.uint64], int]:
    """Return tokens from cluster to cluster of the next layer [L-1,D,D].

    Also the number of low bits cut off all counts so that their sums fit in 64 bits: 0 unless
    counts are huge.
    """
    high = (transitions >> np.uint64(32)).sum(dtype=np.uint64)
    cut = max(int(high).bit_length() - 30, 0)
    traffic = np.zeros((len(transitions), clusters, clusters), dtype=np.uint64)
    for layer, table in enumerate(transitions):
        rows = _merged(table >> np.uint64(cut), cluster[layer], clusters)
        traffic[layer] = _merged(rows.T, cluster[layer + 1], clusters).T
    return traffic, cut


def _merged(
    counts: NDArray[np.uint64], cluster: NDArray[np.int64], clusters: int
) -> NDArray[np.uint64]:
    """Add up the rows [E,N] of every cluster [D,N]; some may have none."""
    order = np.argsort(cluster, kind="stable")
    some, first = np.unique(cluster[order], return_index=True)
    merged = np.zeros((clusters, counts.shape[1]), dtype=np.uint64)
    merged[some] = np.add.reduceat(counts[order], first, axis=0)
    return merged


def place_clusters(
    traffic: ArrayLike,
    cost: ArrayLike,
    *,
    sizes: ArrayLike | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    limits: Limits | None = None,
) -> PlacedClusters:
    """Minimise sum_l max_{d != d'} traffic_l(d,d') / bandwidth(d,d'): stage 2.

    Parameters
    ----------
    traffic
        Tokens from cluster to cluster of the next layer [L-1,D,D].
    cost
        Of a token from device to device [D,D], whole numbers in proportion to 1 / bandwidth, as
        `Topology.cost` gives them: rounded to sixteenths of the fastest link, so within 1/32.
    sizes
        Experts of every cluster [L,D]. Where given, HiGHS helps where there are at most
        ``effort.MOST_PRODUCTS`` products, and every device gets the same number of experts
        over all layers, as nearly as the local search levels them; where not, cluster sizes are
        equal and nothing has to be levelled.
    tolerance
        Relative MIP tolerance.
    seed, limits
        As in `two_stage.two_stage`.
    """
    traffic = np.ascontiguousarray(traffic, dtype=np.uint64)
    cost = np.ascontiguousarray(cost, dtype=np.int64)
    limits = limits or Limits()
    clock = Clock(limits)
    counts = None if sizes is None else np.ascontiguousarray(sizes, dtype=np.uint64)
    links = cost.astype(np.uint64)
    found, way, bound, interrupted = _core.place_clusters(
        traffic,
        links,
        sizes=counts,
        time_limit=limits.time_limit,
        threads=limits.threads,
    )
    left = clock.within().time_limit
    if counts is not None and not _level(found, counts) and not interrupted and left != 0:
        start = programmes.level(counts, found.astype(np.int64), seed=seed, time_limit=left)
        found, way, bound, interrupted = _core.place_clusters(
            traffic,
            links,
            sizes=counts,
            start=start.astype(np.uint16),
            time_limit=clock.within().time_limit,
            threads=limits.threads,
        )
    device = found.astype(np.int64)
    products = len(traffic) * len(cost) ** 4
    few = counts is not None and products <= effort.MOST_PRODUCTS
    bottleneck, total = _times(traffic, cost, device)
    status: Status = "feasible"
    if bottleneck - bound <= tolerance * bottleneck:
        status = "optimal" if bottleneck <= bound else "gap_reached"
    if interrupted:
        status = "interrupted"
    elif few and bottleneck - bound > tolerance * bottleneck:
        solved = programmes.place(
            traffic,
            cost,
            device,
            counts,
            bottleneck,
            bound,
            tolerance=tolerance,
            seed=seed,
            time_limit=clock.within().time_limit,
            progress=clock.report("placing clusters"),
        )
        way, device = "ilp", solved.chosen
        bottleneck, total = _times(traffic, cost, device)
        # Costs are whole numbers: what is proven in fractions is proven of the next whole one.
        bound = max(bound, math.ceil(solved.bound))
        status = solved.status
        if bottleneck <= bound:
            status = "optimal"
        elif status == "optimal":  # within the tolerance, or what HiGHS proves in floats
            status = "gap_reached"
    return PlacedClusters(device, way, bottleneck, min(bound, bottleneck), total, status)


def _times(
    traffic: NDArray[np.uint64], cost: NDArray[np.int64], device: NDArray[np.int64]
) -> tuple[int, int]:
    """Sum over boundaries of the busiest pair's tokens * cost, and of all pairs', exactly."""
    bottleneck = total = 0
    for layer, table in enumerate(traffic):
        costs = cost[np.ix_(device[layer], device[layer + 1])]
        time = table.astype(object) * costs.astype(object)
        bottleneck, total = bottleneck + int(time.max()), total + int(time.sum())
    return bottleneck, total


def _level(device: NDArray[np.uint16], sizes: NDArray[np.uint64]) -> bool:
    """Whether totals of experts per device are as equal as whole numbers can be."""
    held = np.bincount(device.ravel(), sizes.ravel().astype(np.float64))
    return bool(held.max() - held.min() <= (held.sum() % len(held) != 0))
