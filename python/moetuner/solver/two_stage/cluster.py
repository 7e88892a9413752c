"""Stage 1 of the paper's method: cluster the experts of every layer by even load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.milp.highs import Ilp
from moetuner.solver.result import Status

TOLERANCE = 0.025  # the paper's relative MIP tolerance


@dataclass
class Clusters:
    """Stage 1: the cluster of every expert [L,E], of even load.

    The deviation is the sum over clusters of abs(load - mean), over the mean [L], with a proven
    lower bound; HiGHS ``searched`` the layers that were not proven within the tolerance at once.
    Once all are, the status is ``"gap_reached"``.
    """

    cluster: NDArray[np.int64]
    deviation: NDArray[np.float64]
    bound: NDArray[np.float64]
    searched: NDArray[np.bool_]
    status: Status = "gap_reached"

    @property
    def gap(self) -> NDArray[np.float64]:
        """Largest possible distance from the optimum, as a share of the mean load [L]."""
        return np.maximum(self.deviation - self.bound, 0.0)


def cluster_layers(
    load: ArrayLike,
    clusters: int,
    *,
    equal_sizes: bool = True,
    largest: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    budget: Budget | None = None,
) -> Clusters:
    """Minimise sum_c abs(load_c - mean) in every layer, to within ``tolerance`` * mean: stage 1.

    A relative gap on deviations that are nearly zero means nothing, so the gap is measured against
    the mean cluster load. Layers that the core's packing leaves open go to HiGHS.

    Each cluster gets E / D of the experts of ``load`` [L,E], rounded down or up; where sizes are
    free, at most the ``largest`` number. None is empty unless clusters are more than experts.
    """
    load = np.ascontiguousarray(load, dtype=np.uint64)
    budget = budget or Budget()
    experts = load.shape[1]
    sizes = int(experts >= clusters), experts if largest is None else largest
    if equal_sizes:
        sizes = experts // clusters, -(-experts // clusters)
    start, balance, interrupted = _core.pack(
        load,
        clusters,
        sizes,
        tolerance=tolerance,
        time_limit=budget.seconds_left,
        threads=budget.threads,
    )
    total = [max(sum(map(int, row)), 1) for row in load]
    # Both are `clusters` times a deviation, and the total is `clusters` times the mean.
    deviation = np.array([row[2] / t for row, t in zip(balance, total, strict=True)])
    bound = np.array([row[3] / t for row, t in zip(balance, total, strict=True)])
    layers = Clusters(start.astype(np.int64), deviation, bound, deviation - bound > tolerance)
    if interrupted:
        layers.searched[:] = False
        layers.status = "interrupted"
    for layer in np.flatnonzero(layers.searched).tolist():
        if budget.is_over():
            layers.searched[layer:] = False
            layers.status = "time_limit"
            break
        status = solve_layer(
            layers,
            layer,
            load[layer],
            sizes,
            clusters,
            tolerance=tolerance,
            seed=seed,
            budget=budget,
        )
        if status != "gap_reached":
            layers.status = status
        if status in ("interrupted", "time_limit"):
            layers.searched[layer + 1 :] = False
            break
    return layers


def solve_layer(
    layers: Clusters,
    layer: int,
    load: NDArray[np.uint64],
    sizes: tuple[int, int],
    clusters: int,
    *,
    tolerance: float,
    seed: int,
    budget: Budget,
) -> Status:
    """Solve stage 1 of a layer as printed: sum_c t_c with t_c >= +-(load_c - mean).

    Takes load [E] and the fewest and the most experts of a cluster. The layer's clusters are the
    start, and are replaced where others have less deviation.
    """
    experts, start = len(load), layers.cluster[layer]
    # Clusters have no names: the i-th heaviest expert goes to one of the first i + 1, which is all
    # that distinguishes them.
    order = np.argsort(load, kind="stable")[::-1]
    weight = load[order].astype(np.float64)
    weight *= clusters / weight.sum()
    e, c = np.indices((experts, clusters))
    x = np.arange(experts * clusters).reshape(experts, clusters)
    t = x.size + np.arange(clusters)
    ilp = Ilp(
        np.r_[np.zeros(x.size), np.ones(clusters)],
        upper=np.r_[(c <= e).ravel(), np.full(clusters, np.inf)],
        integer=np.r_[np.ones(x.size), np.zeros(clusters)],
    )
    ilp.add_rows(np.ones(experts), 1, e, x)
    ilp.add_rows(np.full(clusters, sizes[0]), sizes[1], c, x)
    ilp.add_deviations(c, x, np.repeat(weight, clusters), 1.0, t)
    ilp.add_rows(layers.bound[layer], np.inf, np.zeros(clusters, dtype=np.int64), t)

    names = list(dict.fromkeys(start[order].tolist()))
    named = np.array([names.index(name) for name in start[order].tolist()])
    spread = np.abs(np.bincount(named, weight, minlength=clusters) - 1)
    solution = ilp.solve(
        np.r_[(named[:, None] == np.arange(clusters)).ravel(), spread],
        seed=seed,
        absolute_gap=tolerance,
        nodes=effort.STAGE_NODES,
        time_limit=budget.seconds_left,
        progress=budget.report(f"clusters of layer {layer}"),
    )
    if solution.objective < layers.deviation[layer]:
        layers.cluster[layer, order] = solution.values[x].argmax(axis=1)
        layers.deviation[layer] = solution.objective
    # HiGHS proves in floating point: what it proves counts a hair less.
    proven = max(layers.bound[layer], solution.bound - 1e-6)
    layers.bound[layer] = min(proven, layers.deviation[layer])
    return "gap_reached" if solution.status == "optimal" else solution.status
