"""The paper's method: how near stage 1 comes to its proven bound, and what both stages take.

    python bench/stage_1.py [--seeds 3]

Stage 1 packs the experts of every layer into clusters of equal size; the bound of the largest
cluster's load is proven by counting, layer by layer. The whole method then runs at the paper's own
scale, 32 layers of 8 experts on 4 devices, on generated routing.
"""

from __future__ import annotations

import statistics

import numpy as np
from harness import Table, arguments, skewed_loads, timed
from instances import problem

import moetuner as mt
from moetuner import _core
from moetuner.solver.two_stage.cluster import TOLERANCE, cluster_layers
from moetuner.solver.two_stage.place import cluster_traffic, place_clusters

SIZES = [(94, 128, 8), (58, 256, 32)]  # layers, experts, clusters


def packing(seeds: int) -> None:
    """Print the largest cluster load over its bound, and the time, for every size."""
    row = Table(
        *("layers x experts, clusters <28", "largest load / bound * 22.6f", "mean 8.6f"),
        *("proven 10s", "core alone, s 13.3f", "stage 1, s 10.3f"),
    )
    for layers, experts, clusters in SIZES:
        ratios: list[float] = []
        seconds: list[tuple[float, float]] = []
        proven = 0
        for seed in range(seeds):
            load = skewed_loads(layers, experts, seed).astype(np.uint64)
            core = (load, clusters, (experts // clusters,) * 2)
            (_, balance, _), alone, _ = timed(lambda: _core.pack(*core, tolerance=TOLERANCE))
            stage, whole, _ = timed(lambda: cluster_layers(load, clusters))
            seconds.append((alone, whole))
            of_cluster = np.zeros((layers, clusters))
            np.add.at(of_cluster, (np.arange(layers)[:, None], stage.cluster), load)
            ratios.extend(of_cluster.max(axis=1) / [float(bounds[1]) for bounds in balance])
            proven += int((stage.gap <= TOLERANCE).sum())
        medians = (statistics.median(column) for column in zip(*seconds, strict=True))
        label, share = f"{layers} x {experts}, {clusters}", f"{proven}/{layers * seeds}"
        row(label, max(ratios), statistics.mean(ratios), share, *medians)
    print(f"* the worst of all layers and seeds; proven within the paper's tolerance, {TOLERANCE}")


def both_stages(seeds: int) -> None:
    """Print time and gap of both stages at the paper's scale."""
    row = Table(
        *("\nseed 4d", "stage 1, ms 11.1f", "gap 7.4f", "stage 2, ms 11.1f", "gap 7.4f", "way <24"),
        *("solve(), ms 11.1f", "crossing 9.4f", "contiguous 11.4f"),
    )
    for seed in range(seeds):
        instance = problem("paper", seed=seed)
        counts, topology = instance.statistics, instance.topology
        clusters, first, _ = timed(lambda: cluster_layers(counts.total_load, topology.devices))
        traffic = cluster_traffic(counts.transitions, clusters.cluster, topology.devices)
        placed, second, _ = timed(lambda: place_clusters(traffic, topology.cost))
        result = mt.solve(instance, "paper")
        contiguous = mt.solve(instance, "contiguous").objective
        stages = 1e3 * first, clusters.gap.max(), 1e3 * second, placed.gap, placed.way
        row(seed, *stages, 1e3 * result.seconds, result.objective, contiguous)


def main() -> None:
    """Print both tables."""
    seeds = arguments(__doc__, seeds=3).seeds
    packing(seeds)
    both_stages(seeds)


if __name__ == "__main__":
    main()
