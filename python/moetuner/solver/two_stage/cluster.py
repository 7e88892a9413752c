"""Stage 1 of the paper's method: the experts of every layer in clusters of even load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner.solver.result import Clock, Limits, Status
from moetuner.solver.two_stage import programmes

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
    limits: Limits | None = None,
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
    seed, limits
        As in `two_stage.two_stage`.
    """
    load = np.ascontiguousarray(load, dtype=np.uint64)
    limits = limits or Limits()
    clock = Clock(limits)
    experts = load.shape[1]
    largest = experts if largest is None else largest
    start, balance, interrupted = _core.cluster(
        load,
        clusters,
        largest,
        equal_sizes=equal_sizes,
        tolerance=tolerance,
        time_limit=limits.time_limit,
        threads=limits.threads,
    )
    cluster = start.astype(np.int64)
    total = [max(sum(map(int, row)), 1) for row in load]
    # Both are `clusters` times a deviation, and the total is `clusters` times the mean.
    deviation = np.array([row[2] / t for row, t in zip(balance, total, strict=True)])
    bound = np.array([row[3] / t for row, t in zip(balance, total, strict=True)])
    searched = deviation - bound > tolerance
    fewest = experts // clusters if equal_sizes else int(experts >= clusters)
    most = -(-experts // clusters) if equal_sizes else min(largest, experts)
    status: Status = "interrupted" if interrupted else "gap_reached"
    for layer in np.flatnonzero(searched):
        left = clock.within().time_limit
        if interrupted or left == 0:
            # The layers not reached keep their start and their gap.
            status = "interrupted" if interrupted else "time_limit"
            searched[layer:] = False
            break
        found = programmes.cluster(
            load[layer],
            cluster[layer],
            (fewest, most),
            clusters,
            deviation[layer],
            bound[layer],
            tolerance=tolerance,
            seed=seed,
            time_limit=left,
            progress=clock.report(f"clusters of layer {layer}"),
        )
        cluster[layer], deviation[layer], bound[layer] = found.chosen, found.objective, found.bound
        if found.status in ("interrupted", "time_limit"):
            status = found.status
            searched[layer + 1 :] = False
            break
        if found.status == "feasible":
            status = "feasible"
    return Clusters(cluster, deviation, bound, searched, status)
