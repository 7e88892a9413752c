"""Levels of groups: the mean of the windows of each, around which they are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Groups of fewer windows on average have no level of their own.
FEW_PER_GROUP = 4


def number_groups(windows: int, group: NDArray[np.integer[Any]] | None) -> NDArray[np.int64]:
    """Return the number of each window's group [W]; all 0 where groups have few windows."""
    if group is None:
        return np.zeros(windows, dtype=np.int64)
    names, label = np.unique(group, return_inverse=True)
    if windows < FEW_PER_GROUP * len(names):
        return np.zeros(windows, dtype=np.int64)
    number: NDArray[np.int64] = label.astype(np.int64)
    return number


def subtract_levels(share: Floats, group: NDArray[np.integer[Any]] | None) -> None:
    """Subtract from shares [W,F], in place, the mean of their group, if that has enough windows."""
    label = number_groups(len(share), group)
    for number in range(int(label.max(initial=0)) + 1):
        # A slice of all windows is no copy.
        members = label == number if label.any() else slice(None)
        share[members] -= share[members].mean(axis=0)
