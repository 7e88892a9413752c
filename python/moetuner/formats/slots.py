"""Counts of slots, which balancers keep, turned into counts of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def by_expert(load: NDArray[Any], table: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """Add the counts of slots [W,L,P] by the expert in each slot [L,P]; gives [W,L,E].

    Raises
    ------
    ValueError
        If there is an expert that the model does not have.
    """
    if table.size and (table.min() < 0 or table.max() >= experts):
        raise ValueError(
            f"slots must hold experts from 0 to {experts - 1}, got {table.min()} to {table.max()}"
        )
    windows, layers = load.shape[:2]
    cell = table + np.arange(layers)[:, None] * experts
    found = np.zeros((layers * experts, windows), dtype=np.int64)
    slots = load.astype(np.int64).reshape(windows, -1).T
    np.add.at(found, cell.ravel(), slots)
    return np.ascontiguousarray(found.T.reshape(windows, layers, experts))
