"""The paper's method: how near stage 1 comes to its proven bound, and what both stages take.

    python bench/stage_1.py [--seeds 3]

Stage 1 packs the experts of every layer into clusters of equal size; the bound of the largest
cluster's load is proven by counting, layer by layer. The whole method then runs at the paper's own
scale, 32 layers of 8 experts on 4 devices, on routing drawn with structure between layers.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from balance import loads
from numpy.typing import NDArray

import moetuner as mt
from moetuner import _core
from moetuner.solver.two_stage.cluster import TOLERANCE, cluster_layers
from moetuner.solver.two_stage.place import cluster_traffic, place_clusters

SIZES = [(94, 128, 8), (58, 256, 32)]  # layers, experts, clusters
LAYERS, EXPERTS, TOP_K, DEVICES, TOKENS = 32, 8, 2, 4, 100_000


def structured_routing(seed: int) -> NDArray[np.uint8]:
    """Expert ids [T,L,K]: an expert of one layer favours some experts of the next."""
    generator = np.random.default_rng(seed)
    ids = np.empty((TOKENS, LAYERS, TOP_K), dtype=np.uint8)
    score = generator.normal(size=(1, EXPERTS))
    for layer in range(LAYERS):
        noise = generator.gumbel(size=(TOKENS, EXPERTS))
        ids[:, layer] = np.argsort(-(score + noise), axis=1)[:, :TOP_K]
        favours = generator.normal(size=(EXPERTS, EXPERTS))
        score = favours[ids[:, layer]].sum(axis=1)
    return ids


def packing(seeds: int) -> None:
    """Print the largest cluster load over its bound, and the time, for every size."""
    header = f"{'layers x experts, clusters':28} {'largest load / bound':>22} {'mean':>8}"
    print(f"{header} {'proven':>8} {'core alone':>12} {'stage 1':>10}")
    for layers, experts, clusters in SIZES:
        ratios: list[float] = []
        seconds: list[tuple[float, float]] = []
        proven = 0
        for seed in range(seeds):
            load = loads(layers, experts, seed)
            begin = time.perf_counter()
            _, balance, _ = _core.cluster(load, clusters, experts // clusters, tolerance=TOLERANCE)
            middle = time.perf_counter()
            found = cluster_layers(load, clusters)
            end = time.perf_counter()
            seconds.append((middle - begin, end - middle))
            bounds = np.array([float(row[1]) for row in balance])
            of_cluster = np.zeros((layers, clusters))
            np.add.at(of_cluster, (np.arange(layers)[:, None], found.cluster), load)
            ratios.extend((of_cluster.max(axis=1) / bounds).tolist())
            proven += int((found.gap <= TOLERANCE).sum())
        alone, whole = (statistics.median(column) for column in zip(*seconds, strict=True))
        label = f"{layers} x {experts}, {clusters}"
        print(
            f"{label:28} {max(ratios):20.6f} * {statistics.mean(ratios):8.6f} "
            f"{proven:4}/{layers * seeds:<4} {alone:10.3f} s {whole:8.3f} s"
        )
    print(
        f"* the worst of all layers and seeds; proven: within the paper's tolerance of {TOLERANCE}"
    )


def both_stages(seeds: int) -> None:
    """Print time and gap of both stages at the paper's scale."""
    print(f"\n{'seed':>4} {'stage 1':>9} {'gap':>7} {'stage 2':>9} {'gap':>7}  {'way':30}", end="")
    print(f" {'solve()':>9} {'crossing':>9} {'contiguous':>11}")
    topology = mt.Topology(DEVICES)
    for seed in range(seeds):
        trace = mt.RoutingTrace.from_arrays(structured_routing(seed), num_experts=EXPERTS)
        counts = mt.RoutingStatistics.from_trace(trace)
        assert counts.transitions is not None
        begin = time.perf_counter()
        clusters = cluster_layers(counts.total_load, DEVICES)
        middle = time.perf_counter()
        traffic, _ = cluster_traffic(counts.transitions, clusters.cluster, DEVICES)
        placed = place_clusters(traffic, topology.cost)
        end = time.perf_counter()
        problem = mt.Problem(counts, topology, regime="follow")
        result = mt.solve(problem, "paper")
        contiguous = mt.solve(problem, "contiguous")
        print(
            f"{seed:4} {(middle - begin) * 1e3:7.1f}ms {clusters.gap.max():7.4f} "
            f"{(end - middle) * 1e3:7.1f}ms {placed.gap:7.4f}  {placed.way:30} "
            f"{result.seconds * 1e3:7.1f}ms {result.objective:9.4f} {contiguous.objective:11.4f}"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    packing(seeds)
    both_stages(seeds)


if __name__ == "__main__":
    main()
