"""Clusters of windows whose loads are alike, whose means stand for them in a search."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.chunks import by_chunk, chunks

Floats = NDArray[np.float64]
Cluster = tuple[int, NDArray[np.int64], Floats]

# Many windows are merged into so many clusters of similar windows, plus at most one per group. That
# bounds the memory of a search.
MERGED = 128
# Number of features by which windows are clustered.
FEATURES = 64
# Rounds of the clustering.
ROUNDS = 5
# Largest feature: sums of products of features are exact, so clusters are the same on all machines.
LARGEST = 1 << 20


def find_clusters(
    load: NDArray[Any], weight: Floats, group: NDArray[np.int64] | None
) -> list[Cluster]:
    """Return clusters of similar windows: their group, their numbers, and their mean [L,E].

    Of windows of loads [W,L,E] and weights [W] those with a weight count. A cluster is of one group
    [W]; a group has as large a share of the clusters as of the windows, and at least one.
    """
    features = _compute_features(load)
    used = np.flatnonzero(weight > 0)
    labels = np.zeros(len(load), dtype=np.int64) if group is None else group
    clusters = []
    for label in np.unique(labels[used]).tolist():
        in_group = used[labels[used] == label]
        cluster = _cluster(features[in_group], max(len(in_group) * MERGED // len(used), 1))
        for number in np.unique(cluster):
            members = in_group[cluster == number]
            loads = [load[members[chunk]] for chunk in chunks(len(members), load[0].size)]
            total = np.sum([part.sum(axis=0, dtype=np.float64) for part in loads], axis=0)
            clusters.append((label, members, total / len(members)))
    return clusters


def _compute_features(load: NDArray[Any]) -> Floats:
    """Compute integer features [W,n] of windows [W,L,E]: their loads, summed with random signs.

    They keep distances between windows in expectation (Johnson and Lindenstrauss, 1984; with signs
    Achlioptas, 2003). Loads are shares of their window's tokens.
    """
    size = load[0].size
    signs = np.random.default_rng(0).integers(0, 2, (size, FEATURES)) * 2.0 - 1
    features = np.empty((len(load), FEATURES))
    for chunk in chunks(len(load), size):
        rows = load[chunk].reshape(-1, size)
        total = rows.sum(axis=1, dtype=np.float64)
        # Sums of whole numbers below 2^24 are exact in single precision, in any order.
        kind = np.float32 if total.max(initial=0) < 1 << 24 else np.float64
        features[chunk] = rows.astype(kind) @ signs.astype(kind)
        features[chunk] /= np.maximum(total, 1)[:, None]
    scale = LARGEST / max(float(np.abs(features).max()), 1e-300)
    return np.rint(features * scale)


def _cluster(points: Floats, count: int) -> NDArray[np.int64]:
    """Return the cluster of every point [n], of integer points [n,d] (k-means, Lloyd, 1982).

    The first centres are evenly spaced points, so from all times.
    """
    centre = points[np.linspace(0, len(points) - 1, count).round().astype(np.int64)]
    for _ in range(ROUNDS):
        square = (centre**2).sum(axis=1)
        nearest = by_chunk(points, lambda rows: (square - 2 * rows @ centre.T).argmin(axis=1))  # noqa: B023
        size = np.bincount(nearest, minlength=count)
        total = np.stack(
            [np.bincount(nearest, column, minlength=count) for column in points.T], axis=1
        )
        mean = np.rint(total / np.maximum(size, 1)[:, None])
        centre = np.where(size[:, None] > 0, mean, centre)
    return nearest
