"""Regularisation of the search for unseen traffic.

A search that minimises the largest device load of the windows it has seen fits their noise. Three
things make it generalise: a norm over devices instead of the maximum, a part of experts' variance
that no window tells of the next one, and, of large layers in many windows, the mean of all windows
as one more, for traffic of all kinds at once. How much of each is fixed (docs/experiments.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.solver.result import UnseenDetails

Floats = NDArray[np.float64]

# The norm that stands for the slowest device, and the part of experts' variance among windows that
# no window tells of the next one (docs/experiments.md).
NORM, NOISE = 8, 0.25
# One window is what it is: nothing tells what of it repeats.
FEWEST_WINDOWS = 2
# How much the mean of all windows counts, as a part of what they all count.
MIXED = 1.0


@dataclass(frozen=True)
class SearchSetting:
    """What stands for the largest device load of a window: a norm over devices, 0 for the maximum.

    ``noise`` is the part of experts' variance among windows that counts as their own, ``mixed`` how
    much the mean of all windows counts besides. Details are None before windows are seen.
    """

    norm: int = 0
    noise: float = 0.0
    mixed: float = 0.0
    details: UnseenDetails | None = None


def setting_for(load: Floats, weight: Floats, *, large: bool) -> SearchSetting:
    """Return how to search on windows [W,L,E] of weights [W], of ``large`` layers or not."""
    used = np.count_nonzero((weight > 0) & load.any(axis=(1, 2)))
    if used < FEWEST_WINDOWS:
        return SearchSetting(details=UnseenDetails("maximum", "too few windows"))
    chosen = f"norm {NORM}, noise" + (", mixed" if large else "")
    mixed = MIXED if large else 0.0
    return SearchSetting(NORM, NOISE, mixed, UnseenDetails(chosen, f"for {used} windows"))
