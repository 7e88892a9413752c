"""Steps of windows of counters: scaled to a number of choices, or drawn at random."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from moetuner.statistics.tables import Loads


def scale_window(load: Loads, choices: int) -> Loads:
    """Scale a window [L,E] to a number of choices in its busiest layer, by largest remainder."""
    shares, wanted = _compute_shares(load, choices)
    exact = shares * wanted[:, None]
    scaled = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(scaled - exact, axis=1, kind="stable"), axis=1)
    scaled += rank < (wanted - scaled.sum(axis=1))[:, None]
    return scaled.astype(np.uint64)


def draw_window(load: Loads, choices: int, seeds: list[int]) -> Loads:
    """Draw a window [L,E] with a number of choices in its busiest layer, in proportion to load."""
    shares, wanted = _compute_shares(load, choices)
    # The loads are part of the seed, so that another file's window of the same number differs.
    rng = np.random.default_rng([*seeds, zlib.crc32(shares.tobytes())])
    return np.stack(
        [
            rng.multinomial(count, share) if count else np.zeros(share.size, np.int64)
            for share, count in zip(shares, wanted.tolist(), strict=True)
        ]
    ).astype(np.uint64)


def _compute_shares(load: Loads, choices: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return shares of experts [L,E], and choices of layers [L], the busiest of which has all."""
    total = load.astype(np.float64).sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = load / np.maximum(total, 1)
    return shares, np.rint(choices * (total / total.max()))[:, 0].astype(np.int64)
