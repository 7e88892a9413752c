"""Transitions: moetuner's counter against numpy's bincount, one thread each, in one run.

    python bench/transitions.py [--repeat 5]

Both count the same random, skewed routing; the medians of interleaved runs are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

import moetuner as mt

Ids = NDArray[np.uint8] | NDArray[np.uint16]

# tokens, layers, top-k, experts
ROWS = [
    (200_000, 32, 2, 8),
    (100_000, 24, 4, 32),
    (100_000, 16, 8, 64),
    (60_000, 48, 8, 128),
    (40_000, 58, 8, 256),
    (20_000, 16, 8, 384),
    (20_000, 16, 8, 512),
    (20_000, 16, 4, 512),
]


def routing(tokens: int, layers: int, top_k: int, experts: int, seed: int = 0) -> Ids:
    """Expert ids [T,L,K]: the top-k of random scores, with popular and unpopular experts."""
    generator = np.random.default_rng(seed)
    popularity = np.linspace(1, 2, experts, dtype=np.float32)
    ids = np.empty((tokens, layers, top_k), dtype=np.uint8 if experts <= 256 else np.uint16)
    for layer in range(layers):
        scores = generator.random((tokens, experts), dtype=np.float32) * popularity
        ids[:, layer] = np.argpartition(scores, experts - top_k, axis=1)[:, experts - top_k :]
    return ids


def with_numpy(ids: Ids, experts: int) -> NDArray[np.int64]:
    """Transitions [L-1,E,E] by one bincount per pair of layers."""
    layers = ids.shape[1]
    tables = np.empty((layers - 1, experts, experts), dtype=np.int64)
    for layer in range(layers - 1):
        left, right = ids[:, layer].astype(np.int64), ids[:, layer + 1].astype(np.int64)
        pairs = left[:, :, None] * experts + right[:, None, :]
        tables[layer] = np.bincount(pairs.ravel(), minlength=experts * experts).reshape(experts, -1)
    return tables


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print(f"{'tokens x layers x top-k of experts':36} {'moetuner':>10} {'numpy':>10} {'ratio':>7}")
    for tokens, layers, top_k, experts in ROWS:
        ids = routing(tokens, layers, top_k, experts)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)

        def ours(trace: mt.RoutingTrace = trace) -> mt.RoutingStatistics:
            return mt.RoutingStatistics.from_trace(trace, coactivation=False, threads=1)

        def peer(ids: NDArray[np.uint8] = ids, experts: int = experts) -> NDArray[np.int64]:
            return with_numpy(ids, experts)

        assert np.array_equal(ours().transitions, peer())
        times = [(seconds(ours), seconds(peer)) for _ in range(repeat)]
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        label = f"{tokens} x {layers} x {top_k} of {experts}"
        print(f"{label:36} {mine * 1e3:8.1f}ms {theirs * 1e3:8.1f}ms {theirs / mine:6.1f}x")


if __name__ == "__main__":
    main()
