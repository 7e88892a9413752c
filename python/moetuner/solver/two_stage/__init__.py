"""The paper's method: cluster each layer's experts by load, then place the clusters by traffic.

Go and Mahajan, "MoETuner" (2025), arXiv 2502.06643. Stage 1 chooses x[e,c], expert e in cluster c;
stage 2 chooses y[l,c,d], cluster c of layer l on device d. Both start from the native heuristics,
which usually prove that there is nothing left to search.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.solver.budget import Budget
from moetuner.solver.result import ClusterStage, PlaceStage, SearchDetails, Status
from moetuner.solver.run import Run, Stage
from moetuner.solver.terms import core_layers, make_site
from moetuner.solver.two_stage.cluster import TOLERANCE, Clusters, cluster_layers
from moetuner.solver.two_stage.place import PlacedClusters, cluster_traffic, place_clusters

__all__ = ["PAPER", "cluster_layers", "cluster_traffic", "place_clusters", "two_stage"]


def two_stage(
    problem: Problem,
    *,
    seed: int = 0,
    budget: Budget | None = None,
    equal_sizes: bool | None = None,
) -> tuple[NDArray[np.int32], Status, SearchDetails]:
    """Return slots [L,D,S] by the paper's two stages, their status, and details of the search.

    ``equal_sizes`` says whether clusters hold equally many experts; by default they do where the
    slots leave no choice. The stages know one number of slots for all devices: where a device has
    fewer, experts that are beyond them go to other devices in the end. The budget's
    ``time_limit``, ``threads`` and ``progress`` apply. The method bounds its own stages, not the
    problem.
    """
    budget, devices = budget or Budget(), problem.devices
    if equal_sizes is None:
        equal_sizes = problem.slots == problem.single_slots
    clusters = cluster_layers(
        problem.load,
        devices,
        equal_sizes=equal_sizes,
        largest=problem.slots,
        seed=seed,
        budget=budget.within(),
    )
    sizes = (clusters.cluster[:, :, None] == np.arange(devices)).sum(axis=1)
    have_unequal_sizes, transitions = bool(np.ptp(sizes)), problem.statistics.transitions
    placed = None
    device = np.broadcast_to(np.arange(devices), sizes.shape)
    if transitions is not None or have_unequal_sizes:
        if transitions is None:
            transitions = np.zeros(
                (problem.layers - 1, problem.num_experts, problem.num_experts), np.uint64
            )
        traffic = cluster_traffic(transitions, clusters.cluster, devices)
        placed = place_clusters(
            traffic,
            problem.topology.cost,
            sizes=sizes if have_unequal_sizes else None,
            seed=seed,
            budget=budget.within(),
        )
        device = placed.device
    device_of = np.take_along_axis(device, clusters.cluster, axis=1)
    placement = Placement.from_assignment(device_of, devices, slots_per_device=problem.slots)
    statuses = [clusters.status] if placed is None else [clusters.status, placed.status]
    stopped: tuple[Status, ...] = ("interrupted", "time_limit")
    status: Status = next((status for status in stopped if status in statuses), "feasible")
    totals = np.bincount(device.ravel(), sizes.ravel()).astype(np.int64)
    search = SearchDetails(
        stage_1=_describe_clusters(problem, clusters, equal_sizes=equal_sizes),
        stage_2=_describe_placing(placed, totals),
    )
    return _keep_capacity(problem, placement.slots), status, search


def _solve(run: Run, budget: Budget) -> None:
    slots, status, search = two_stage(run.problem, seed=run.seed, budget=budget)
    run.details, run.cut = replace(run.details, search=search), status == "time_limit"
    run.offer(slots, "paper", interrupted=status == "interrupted")


PAPER = Stage(_solve)


def _keep_capacity(problem: Problem, slots: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return slots [L,D,S] without the lightest experts that are beyond the slots of a device.

    They go to devices with free slots, so that loads are balanced.
    """
    kept = slots.copy()
    excess = (kept != EMPTY).sum(axis=2) - problem.capacity
    for layer, device in np.argwhere(excess > 0):
        experts = kept[layer, device]
        load = np.where(experts == EMPTY, np.inf, problem.load[layer][experts])
        experts[np.argsort(load, kind="stable")[: excess[layer, device]]] = EMPTY
    if (excess <= 0).all():
        return kept
    windows = problem.windows.searched
    layers = core_layers(windows.load, windows.weight, make_site(problem))
    return layers.complete(pad_slots(kept, problem.capacity))


def _describe_clusters(problem: Problem, clusters: Clusters, *, equal_sizes: bool) -> ClusterStage:
    """Return what stage 1 did, for the details of a result."""
    experts, devices = problem.num_experts, problem.devices
    text = f"{experts} experts on {devices} devices: some stay empty"
    return ClusterStage(
        sizes="equal" if equal_sizes else "free",
        layers_proven_without_search=int((~clusters.searched).sum()),
        layers_searched=int(clusters.searched.sum()),
        largest_gap=float(clusters.gap.max()),
        largest_deviation=float(clusters.deviation.max()),
        tolerance=TOLERANCE,
        note=text if experts < devices else None,
    )


def _describe_placing(placed: PlacedClusters | None, totals: NDArray[np.int64]) -> PlaceStage:
    """Return what stage 2 did; ``totals`` are the experts of every device over all layers [D]."""
    experts = int(totals.min()), int(totals.max())
    if placed is None:
        return PlaceStage("skipped: no transitions were counted", experts)
    return PlaceStage(placed.way, experts, placed.bottleneck, placed.bound, placed.gap)
