"""Transitions: moetuner's counter against numpy's bincount, one thread each, in one run.

    python bench/transitions.py [--repeat 5]

Both count the same random, skewed routing; the medians of interleaved runs are compared.
"""

from __future__ import annotations

import statistics

import numpy as np
from harness import Table, arguments, in_turns
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


def main() -> None:
    """Print a row per size."""
    repeat = arguments(__doc__, repeat=5).repeat
    row = Table(
        *(
            "tokens x layers x top-k of experts <36",
            "moetuner, ms 12.1f",
            "numpy, ms 10.1f",
            "ratio 7.1f",
        )
    )
    for tokens, layers, top_k, experts in ROWS:
        ids = routing(tokens, layers, top_k, experts)
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)

        def ours(trace: mt.RoutingTrace = trace) -> mt.RoutingStatistics:
            return mt.RoutingStatistics.from_trace(
                trace, window=None, coactivation=False, threads=1
            )

        def peer(ids: NDArray[np.uint8] = ids, experts: int = experts) -> NDArray[np.int64]:
            return with_numpy(ids, experts)

        assert np.array_equal(ours().transitions, peer())
        times = in_turns({"ours": ours, "numpy": peer}, repeat)
        mine, theirs = (1e3 * statistics.median(column) for column in times.values())
        row(f"{tokens} x {layers} x {top_k} of {experts}", mine, theirs, theirs / mine)


if __name__ == "__main__":
    main()
