"""Regularisation of the search for unseen traffic.

A search that minimises the largest device load of the windows seen fits their noise. Three things
make it generalise: a norm over devices instead of the maximum; a part of experts' variance between
windows, which is noise that the next window does not repeat; and, for large layers in many windows,
the mean of all windows as one more, which stands for traffic of all kinds at once. Their amounts
are fixed ("Unseen windows" in docs/experiments.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetuner.solver.arrays import Floats
from moetuner.solver.result import UnseenDetails

# Order of the norm that stands for the slowest device ("Unseen windows").
NORM = 8
# Share of experts' variance between windows that counts as noise.
NOISE = 0.25
# Fewest windows with which noise can be told from structure.
FEWEST_WINDOWS = 2
# Weight of the mean of all windows, as a part of the weight of all windows.
MEAN_WEIGHT = 1.0


@dataclass(frozen=True)
class SearchSetting:
    """How a search stands in for unseen windows.

    ``norm`` is the order of the norm that stands for the largest device load of a window; 0 for the
    maximum. ``noise`` is the part of experts' variance between windows that counts as noise, and
    ``mean_weight`` the weight of the mean of all windows. Details are None before windows are seen.
    """

    norm: int = 0
    noise: float = 0.0
    mean_weight: float = 0.0
    details: UnseenDetails | None = None


def choose_search_setting(load: Floats, weight: Floats, *, large: bool) -> SearchSetting:
    """Return how to search on windows [W,L,E] of weights [W], of ``large`` layers or not."""
    used = np.count_nonzero((weight > 0) & load.any(axis=(1, 2)))
    if used < FEWEST_WINDOWS:
        return SearchSetting(details=UnseenDetails("maximum", "too few windows"))
    chosen = f"norm {NORM}, noise" + (", mixed" if large else "")
    mean_weight = MEAN_WEIGHT if large else 0.0
    return SearchSetting(NORM, NOISE, mean_weight, UnseenDetails(chosen, f"for {used} windows"))
