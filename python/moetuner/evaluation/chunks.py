"""Split tables into chunks of windows that fit memory: there may be thousands of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bytes of a chunk in double precision.
CHUNK_BYTES = 16 << 20


def chunks(windows: int, size: int) -> Iterator[slice]:
    """Yield the chunks of ``windows`` windows of ``size`` numbers each; none of no windows."""
    step = max(CHUNK_BYTES // (8 * max(size, 1)), 1)
    for first in range(0, windows, step):
        yield slice(first, min(first + step, windows))


def by_chunk(table: NDArray[Any], compute: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[Any]:
    """Apply a function of windows to a table [W,...], a chunk of windows at a time."""
    slices = list(chunks(len(table), table[0].size if len(table) else 1))
    if len(slices) < 2:
        return compute(table)
    return np.concatenate([compute(table[chunk]) for chunk in slices])
