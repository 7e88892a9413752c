"""Runs of windows that are worked on at once: of thousands there is no room for all in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bytes of a run in double precision.
BLOCK_BYTES = 64 << 20


def blocks(windows: int, size: int) -> Iterator[slice]:
    """Yield runs of so many windows that hold ``size`` numbers each; none where there are none."""
    step = max(BLOCK_BYTES // (8 * max(size, 1)), 1)
    for first in range(0, windows, step):
        yield slice(first, min(first + step, windows))


def by_block(table: NDArray[Any], compute: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
    """Compute something of every window of a table [W,...], a run of them at a time."""
    runs = list(blocks(len(table), table[0].size if len(table) else 1))
    if len(runs) < 2:
        return compute(table)
    return np.concatenate([compute(table[run]) for run in runs])
