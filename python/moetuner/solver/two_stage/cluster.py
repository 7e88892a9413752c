"""Stage 1 of the paper's method: the experts of every layer in clusters of even load."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.milp.highs import Ilp, Solution
from moetuner.solver.result import Status

TOLERANCE = 0.025  # the paper's relative MIP tolerance


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
    seed, budget
        As in `two_stage.two_stage`.
    """
    load = np.ascontiguousarray(load, dtype=np.uint64)
    budget = budget or Budget()
    experts = load.shape[1]
    largest = experts if largest is None else largest
    start, balance, interrupted = _core.cluster(
        load,
        clusters,
        largest,
        equal_sizes=equal_sizes,
        tolerance=tolerance,
        time_limit=budget.left,
        threads=budget.threads,
    )
    cluster = start.astype(np.int64)
    total = [max(sum(map(int, row)), 1) for row in load]
    # Both are `clusters` times a deviation, and the total is `clusters` times the mean.
    deviation = np.array([row[2] / t for row, t in zip(balance, total, strict=True)])
    bound = np.array([row[3] / t for row, t in zip(balance, total, strict=True)])
    searched = deviation - bound > tolerance
    fewest = experts // clusters if equal_sizes else int(experts >= clusters)
    most = -(-experts // clusters) if equal_sizes else min(largest, experts)
    clusters_of = Clusters(
        cluster, deviation, bound, searched, "interrupted" if interrupted else "gap_reached"
    )
    if interrupted:
        searched[:] = False
        return clusters_of
    status = _search(
        clusters_of, load, (fewest, most), clusters, tolerance=tolerance, seed=seed, budget=budget
    )
    return replace(clusters_of, status=status)


def _search(
    layers: Clusters,
    load: NDArray[np.uint64],
    sizes: tuple[int, int],
    clusters: int,
    *,
    tolerance: float,
    seed: int,
    budget: Budget,
) -> Status:
    """Solve the layers that are to be searched, in place; those that are left keep their start."""
    status = layers.status
    for layer in np.flatnonzero(layers.searched):
        if budget.is_over():
            layers.searched[layer:] = False
            return "time_limit"
        solution, chosen = solve_layer(
            load[layer],
            layers.cluster[layer],
            sizes,
            clusters,
            (layers.deviation[layer], layers.bound[layer]),
            tolerance=tolerance,
            seed=seed,
            budget=budget,
            phase=f"clusters of layer {layer}",
        )
        if solution.objective is not None and solution.objective < layers.deviation[layer]:
            layers.cluster[layer], layers.deviation[layer] = chosen, solution.objective
        # HiGHS proves in floating point: what it proves counts a hair less.
        proven = max(layers.bound[layer], solution.bound - 1e-6)
        layers.bound[layer] = min(proven, layers.deviation[layer])
        if solution.status in ("interrupted", "time_limit"):
            layers.searched[layer + 1 :] = False
            return solution.status
        if solution.status == "feasible":
            status = "feasible"
    return status


def solve_layer(
    load: NDArray[np.uint64],
    start: NDArray[np.int64],
    sizes: tuple[int, int],
    clusters: int,
    worth: tuple[float, float],
    *,
    tolerance: float,
    seed: int,
    budget: Budget,
    phase: str,
) -> tuple[Solution, NDArray[np.int64]]:
    """Solve stage 1 of a layer as printed: sum_c t_c with t_c >= +-(load_c - mean).

    Takes load [E], a start [E], the fewest and the most experts of a cluster, and the start's
    objective with a proven bound, in units of the mean. Returns the cluster of every expert [E].
    """
    experts = len(load)
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
    ilp.add_rows(worth[1], np.inf, np.zeros(clusters, dtype=np.int64), t)

    names = list(dict.fromkeys(start[order].tolist()))
    named = np.array([names.index(name) for name in start[order].tolist()])
    spread = np.abs(np.bincount(named, weight, minlength=clusters) - 1)
    solution = ilp.solve(
        start=np.r_[(named[:, None] == np.arange(clusters)).ravel(), spread],
        start_objective=worth[0],
        seed=seed,
        absolute_gap=tolerance,
        nodes=effort.CLUSTER_NODES,
        time_limit=budget.left,
        progress=budget.report(phase),
    )
    assert solution.values is not None
    chosen = np.empty(experts, dtype=np.int64)
    chosen[order] = solution.values[x].argmax(axis=1)
    return solution, chosen
