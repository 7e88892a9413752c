"""Annealing within a time limit: cut off before it is cold, it is worth little.

A quick one tells how much there is time for, and is what the other begins from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moetuner.solver.result import Clock, Limits

Slots = NDArray[np.int32]
# Slots [L,D,S], trials and restarts in; better slots, and whether it was interrupted, out.
Anneal = Callable[[Slots, int, int, Limits], tuple[Slots, bool]]

# The part of the trials that is timed, and the part of the time left that the others may take.
QUICK, SAFE = 50, 0.9


def paced(
    anneal: Anneal, slots: Slots, *, trials: int, restarts: int, limits: Limits
) -> tuple[Slots, bool]:
    """Anneal with as many trials as there is time for; all of them without a time limit."""
    clock, quick = Clock(limits), trials // QUICK
    if limits.time_limit is not None and limits.iterations is None and quick:
        slots, interrupted = anneal(slots, quick, 1, limits)
        left = clock.within().time_limit or 0.0
        each = (limits.time_limit - left) / quick
        most = int(SAFE * left / max(each, 1e-9))
        restarts = min(restarts, max(most // trials, 1))
        trials = min(trials, most // restarts)
        if interrupted or not trials:
            return slots, interrupted
    return anneal(slots, trials, restarts, clock.within())
