"""The paper's method: cluster each layer's experts by load, then place the clusters by traffic.

Go and Mahajan, "MoETuner" (2025), arXiv 2502.06643, in the paper's symbols: stage 1 chooses x[e,c],
expert e in cluster c; stage 2 chooses y[l,c,d], cluster c of layer l on device d. Both start from
the native heuristics, which usually prove that there is nothing left to search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver import two_stage_ilp
from moetuner.solver.result import Candidate, Limits, Progress, Status

TOLERANCE = 0.025  # the paper's relative MIP tolerance
# Products y[l,c,d] * y[l+1,c',d'] that HiGHS is given at most; beyond, it spends minutes at its
# first node.
MAX_PRODUCTS = 8192
WAY_ILP = "ilp"


@dataclass(frozen=True)
class Clusters:
    """Stage 1: clusters of even load.

    Parameters
    ----------
    cluster
        Of every expert [L,E].
    deviation, bound
        Sum over clusters of abs(load - mean), over the mean [L], and a proven lower bound.
    searched
        Layers that HiGHS was called for [L]; the others were proven within the tolerance at once.
    status
        ``"gap_reached"`` if all layers are proven within the tolerance.
    """

    cluster: NDArray[np.int64]
    deviation: NDArray[np.float64]
    bound: NDArray[np.float64]
    searched: NDArray[np.bool_]
    status: Status

    @property
    def gap(self) -> NDArray[np.float64]:
        """How far from the optimum a layer can be at most, as a share of the mean load [L]."""
        return np.maximum(self.deviation - self.bound, 0.0)


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


def two_stage(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    tolerance: float = TOLERANCE,
    equal_sizes: bool | None = None,
) -> Candidate:
    """Solve by the paper's two stages.

    Parameters
    ----------
    problem
        What to place.
    seed
        For HiGHS.
    limits
        Of them, ``time_limit``, ``threads`` and ``progress`` apply.
    tolerance
        Stage 1: of the mean load. Stage 2, where HiGHS is called: of the objective.
    equal_sizes
        Whether clusters hold equally many experts; by default where the slots leave no choice.

    Returns
    -------
    Candidate
        Without a bound: the method bounds its own stages (in ``details``), not the problem.

    Raises
    ------
    ValueError
        If ``tolerance`` is not from 0 to 1.
    """
    limits = limits or Limits()
    layers, devices, experts = problem.layers, problem.devices, problem.experts
    if equal_sizes is None:
        equal_sizes = problem.slots == -(-experts // devices)
    clock = _Clock(limits)
    clusters = cluster_layers(
        problem.load,
        devices,
        equal_sizes=equal_sizes,
        largest=problem.slots,
        tolerance=tolerance,
        seed=seed,
        limits=clock.rest(),
    )
    details: dict[str, Any] = {
        "stage_1": {
            "sizes": "equal" if equal_sizes else "free",
            "layers_proven_without_search": int((~clusters.searched).sum()),
            "layers_searched": int(clusters.searched.sum()),
            "largest_gap": float(clusters.gap.max()),
            "largest_deviation": float(clusters.deviation.max()),
            "tolerance": tolerance,
        }
    }
    if experts < devices:
        details["stage_1"]["note"] = f"{experts} experts on {devices} devices: some stay empty"
    sizes = _sizes(clusters.cluster, devices)
    transitions = problem.statistics.transitions
    statuses = [clusters.status]
    if transitions is None and equal_sizes:
        device = np.broadcast_to(np.arange(devices), (layers, devices))
        details["stage_2"] = {"way": "skipped: no transitions were counted"}
    else:
        if transitions is None:
            transitions = np.zeros((layers - 1, experts, experts), dtype=np.uint64)
        traffic, cut = cluster_traffic(transitions, clusters.cluster, devices)
        placed = place_clusters(
            traffic,
            problem.topology.cost,
            sizes=None if equal_sizes else sizes,
            tolerance=tolerance,
            seed=seed,
            limits=clock.rest(),
        )
        device = placed.device
        statuses.append(placed.status)
        details["stage_2"] = {
            "way": placed.way,
            "bottleneck": placed.bottleneck << cut,
            "bound": placed.bound << cut,
            "gap": placed.gap,
        }
    held = np.zeros(devices, dtype=np.int64)
    np.add.at(held, device, sizes)
    details["stage_2"]["experts_per_device"] = [int(held.min()), int(held.max())]
    device_of = np.take_along_axis(device, clusters.cluster, axis=1)
    placement = Placement.from_assignment(device_of, devices, slots_per_device=problem.slots)
    status: Status = "feasible"
    for stopped in ("time_limit", "interrupted"):
        status = stopped if stopped in statuses else status
    return Candidate(placement.slots, status, details=details)


def cluster_layers(
    load: ArrayLike,
    clusters: int,
    *,
    equal_sizes: bool = True,
    largest: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    limits: Limits | None = None,
) -> Clusters:
    """Stage 1: minimise sum_c abs(load_c - mean) in every layer, to within ``tolerance`` * mean.

    A relative gap on deviations that are nearly zero means nothing, so the gap is measured against
    the mean cluster load.

    Parameters
    ----------
    load
        Tokens of every expert [L,E].
    clusters
        How many, D. None is empty unless there are fewer experts.
    equal_sizes
        Whether each holds E / D experts, rounded down or up.
    largest
        Experts that a cluster may hold where sizes are free; all by default.
    tolerance
        0 asks for a proven optimum.
    seed, limits
        As in `two_stage`.

    Raises
    ------
    ValueError
        If a number is out of range.
    """
    load = np.ascontiguousarray(load, dtype=np.uint64)
    _check_tolerance(tolerance)
    if load.ndim != 2 or 0 in load.shape:
        raise ValueError(f"load must be counts [layers, experts], got {list(load.shape)}")
    if not 1 <= clusters <= 65535:
        raise ValueError(f"clusters must be from 1 to 65535, got {clusters}")
    limits = limits or Limits()
    clock = _Clock(limits)
    experts = load.shape[1]
    largest = experts if largest is None else largest
    start, balance = _core.cluster(
        load, clusters, largest, equal_sizes=equal_sizes, threads=limits.threads
    )
    cluster = start.astype(np.int64)
    total = [max(sum(map(int, row)), 1) for row in load]
    # Both are `clusters` times a deviation, and the total is `clusters` times the mean.
    deviation = np.array([row[2] / t for row, t in zip(balance, total, strict=True)])
    bound = np.array([row[3] / t for row, t in zip(balance, total, strict=True)])
    searched = deviation - bound > tolerance
    fewest = experts // clusters if equal_sizes else int(experts >= clusters)
    most = -(-experts // clusters) if equal_sizes else min(largest, experts)
    status: Status = "gap_reached"
    for layer in np.flatnonzero(searched):
        found = two_stage_ilp.cluster(
            load[layer],
            cluster[layer],
            (fewest, most),
            clusters,
            deviation[layer],
            bound[layer],
            tolerance=tolerance,
            seed=seed,
            time_limit=clock.rest().time_limit,
            progress=clock.report(f"clusters of layer {layer}"),
        )
        cluster[layer], deviation[layer], bound[layer] = found.chosen, found.objective, found.bound
        if found.status in ("interrupted", "time_limit"):
            status = found.status
            # The layers not reached keep their start and their gap.
            searched[layer + 1 :] = False
            break
        if found.status == "feasible":
            status = "feasible"
    return Clusters(cluster, deviation, bound, searched, status)


def cluster_traffic(
    transitions: NDArray[np.uint64], cluster: NDArray[np.int64], clusters: int
) -> tuple[NDArray[np.uint64], int]:
    """Tokens from cluster to cluster of the next layer [L-1,D,D].

    Also the number of low bits cut off all counts so that their sums fit in 64 bits: 0 unless
    counts are huge.
    """
    high = (transitions >> np.uint64(32)).sum(dtype=np.uint64)
    cut = max(int(high).bit_length() - 30, 0)
    member = (cluster[:, :, None] == np.arange(clusters)).astype(np.uint64)
    traffic = np.zeros((len(transitions), clusters, clusters), dtype=np.uint64)
    for layer, table in enumerate(transitions):
        counts = table >> np.uint64(cut)
        traffic[layer] = member[layer].T @ counts @ member[layer + 1]
    return traffic, cut


def place_clusters(
    traffic: ArrayLike,
    cost: ArrayLike,
    *,
    sizes: ArrayLike | None = None,
    exact: Literal["ilp"] | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    limits: Limits | None = None,
) -> PlacedClusters:
    """Stage 2: minimise sum_l max_{d != d'} traffic_l(d,d') / bandwidth(d,d').

    Parameters
    ----------
    traffic
        Tokens from cluster to cluster of the next layer [L-1,D,D].
    cost
        Of a token from device to device [D,D], whole numbers in proportion to 1 / bandwidth, as
        `Topology.cost` gives them: rounded to sixteenths of the fastest link, so within 1/32.
    sizes
        Experts of every cluster [L,D]. Where given, every device gets the same number of experts
        over all layers, as nearly as the local search levels them; where not, cluster sizes are
        equal and nothing has to be levelled.
    exact
        ``"ilp"`` to use HiGHS also where sizes are equal. With sizes it is used where there are at
        most ``MAX_PRODUCTS`` products.
    tolerance
        Relative MIP tolerance.
    seed, limits
        As in `two_stage`.

    Raises
    ------
    ValueError
        If shapes do not fit or a number is out of range.
    """
    traffic = np.ascontiguousarray(traffic, dtype=np.uint64)
    cost = np.ascontiguousarray(cost, dtype=np.int64)
    _check_tolerance(tolerance)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not cost.size or cost.min() < 0:
        raise ValueError(f"cost must be counts [devices, devices], got {list(cost.shape)}")
    if traffic.ndim != 3 or traffic.shape[1:] != cost.shape:
        raise ValueError(f"traffic must be [L-1, {len(cost)}, {len(cost)}], got {traffic.shape}")
    limits = limits or Limits()
    clock = _Clock(limits)
    counts = None if sizes is None else np.ascontiguousarray(sizes, dtype=np.uint64)
    if counts is not None and counts.shape != (len(traffic) + 1, len(cost)):
        raise ValueError(f"sizes must be [{len(traffic) + 1}, {len(cost)}], got {counts.shape}")
    links = cost.astype(np.uint64)
    found, way, bound = _core.place_clusters(traffic, links, sizes=counts, threads=limits.threads)
    if counts is not None and not _level(found, counts):
        left = clock.rest().time_limit
        start = two_stage_ilp.level(counts, found.astype(np.int64), seed=seed, time_limit=left)
        found, way, bound = _core.place_clusters(
            traffic,
            links,
            sizes=counts,
            start=start.astype(np.uint16),
            threads=limits.threads,
        )
    device = found.astype(np.int64)
    products = len(traffic) * len(cost) ** 4
    few = counts is not None and products <= MAX_PRODUCTS
    bottleneck, total = _times(traffic, cost, device)
    status: Status = "feasible"
    if bottleneck - bound <= tolerance * bottleneck:
        status = "optimal" if bottleneck <= bound else "gap_reached"
    if exact == "ilp" or (few and bottleneck - bound > tolerance * bottleneck):
        solved = two_stage_ilp.place(
            traffic,
            cost,
            device,
            counts,
            bottleneck,
            bound,
            tolerance=tolerance,
            seed=seed,
            time_limit=clock.rest().time_limit,
            progress=clock.report("placing clusters"),
        )
        way, status = WAY_ILP, solved.status
        device, bound = solved.chosen, min(max(bound, int(solved.bound)), bottleneck)
        bottleneck, total = _times(traffic, cost, device)
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


def _sizes(cluster: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Experts of every cluster [L,D]."""
    sizes: NDArray[np.int64] = (cluster[:, :, None] == np.arange(clusters)).sum(axis=1)
    return sizes


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must be from 0 to 1, got {tolerance}")


class _Clock:
    """What is left of the limits, and where progress goes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.begin = time.monotonic()

    def rest(self) -> Limits:
        """Return the limits for what follows: the same, less the time that is gone."""
        left = self.limits.time_limit
        if left is not None:
            left = max(left - (time.monotonic() - self.begin), 0.0)
        return Limits(left, threads=self.limits.threads, progress=self.limits.progress)

    def report(self, phase: str) -> Callable[[float | None, float], None] | None:
        """Turn what HiGHS reports into `Progress` of a phase."""
        progress = self.limits.progress
        if progress is None:
            return None
        report = progress
        return lambda objective, bound: report(
            Progress(time.monotonic() - self.begin, phase, objective, bound)
        )
