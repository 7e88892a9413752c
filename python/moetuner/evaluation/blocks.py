"""Split tables into runs of windows that fit memory: there may be thousands of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bytes of a run in double precision.
BLOCK_BYTES = 64 << 20


def blocks(windows: int, size: int) -> Iterator[slice]:
    """Yield runs of ``windows`` windows of ``size`` numbers each; none of no windows."""
    step = max(BLOCK_BYTES // (8 * max(size, 1)), 1)
    for first in range(0, windows, step):
        yield slice(first, min(first + step, windows))


def by_block(table: NDArray[Any], compute: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
    """Apply a function of windows to a table [W,...], a run of windows at a time."""
    runs = list(blocks(len(table), table[0].size if len(table) else 1))
    if len(runs) < 2:
        return compute(table)
    return np.concatenate([compute(table[run]) for run in runs])
