"""The paper's method: cluster each layer's experts by load, then place the clusters by traffic.

Go and Mahajan, "MoETuner" (2025), arXiv 2502.06643. Stage 1 chooses x[e,c], expert e in cluster c;
stage 2 chooses y[l,c,d], cluster c of layer l on device d. Both start from the native heuristics,
which usually prove that there is nothing left to search.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.solver.result import (
    Candidate,
    Clock,
    ClusterStage,
    Details,
    Limits,
    PlaceStage,
    SearchDetails,
    Status,
)
from moetuner.solver.two_stage.cluster import TOLERANCE, cluster_layers
from moetuner.solver.two_stage.place import cluster_traffic, place_clusters

__all__ = ["cluster_layers", "cluster_traffic", "place_clusters", "two_stage"]


def two_stage(
    problem: Problem,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    equal_sizes: bool | None = None,
) -> Candidate:
    """Solve by the paper's two stages.

    ``equal_sizes`` says whether clusters hold equally many experts; by default they do where the
    slots leave no choice. Of the limits, ``time_limit``, ``threads`` and ``progress`` apply. The
    answer has no bound: the method bounds its own stages (in ``details``), not the problem.
    """
    limits = limits or Limits()
    layers, devices, experts = problem.layers, problem.devices, problem.experts
    if equal_sizes is None:
        equal_sizes = problem.slots == -(-experts // devices)
    clock = Clock(limits)
    clusters = cluster_layers(
        problem.load,
        devices,
        equal_sizes=equal_sizes,
        largest=problem.slots,
        seed=seed,
        limits=clock.within(),
    )
    few = f"{experts} experts on {devices} devices: some stay empty"
    stage_1 = ClusterStage(
        sizes="equal" if equal_sizes else "free",
        layers_proven_without_search=int((~clusters.searched).sum()),
        layers_searched=int(clusters.searched.sum()),
        largest_gap=float(clusters.gap.max()),
        largest_deviation=float(clusters.deviation.max()),
        tolerance=TOLERANCE,
        note=few if experts < devices else None,
    )
    sizes = _sizes(clusters.cluster, devices)
    transitions = problem.statistics.transitions
    statuses = [clusters.status]
    if transitions is None and np.ptp(sizes) == 0:
        device = np.broadcast_to(np.arange(devices), (layers, devices))
        stage_2: dict[str, Any] = {"way": "skipped: no transitions were counted"}
    else:
        if transitions is None:
            transitions = np.zeros((layers - 1, experts, experts), dtype=np.uint64)
        traffic, cut = cluster_traffic(transitions, clusters.cluster, devices)
        placed = place_clusters(
            traffic,
            problem.topology.cost,
            # Where they differ, devices are to hold equally many experts over all layers.
            sizes=None if np.ptp(sizes) == 0 else sizes,
            seed=seed,
            limits=clock.within(),
        )
        device = placed.device
        statuses.append(placed.status)
        stage_2 = {
            "way": placed.way,
            "bottleneck": placed.bottleneck << cut,
            "bound": placed.bound << cut,
            "gap": placed.gap,
        }
    held = np.zeros(devices, dtype=np.int64)
    np.add.at(held, device, sizes)
    per_device = int(held.min()), int(held.max())
    placing = PlaceStage(experts_per_device=per_device, **stage_2)
    device_of = np.take_along_axis(device, clusters.cluster, axis=1)
    placement = Placement.from_assignment(device_of, devices, slots_per_device=problem.slots)
    status: Status = "feasible"
    for stopped in ("time_limit", "interrupted"):
        status = stopped if stopped in statuses else status
    return Candidate(
        placement.slots,
        status,
        details=Details(SearchDetails(stage_1=stage_1, stage_2=placing)),
    )


def _sizes(cluster: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Return experts of every cluster [L,D]."""
    sizes: NDArray[np.int64] = (cluster[:, :, None] == np.arange(clusters)).sum(axis=1)
    return sizes
