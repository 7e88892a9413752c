"""Balance in windows within milliseconds: a start that sees every window, and exchanges from there.

The core's quick search, with what it is told besides the windows: how many trials, and how much of
what experts do differently from window to window is taken for noise. Both are fixed, so there is
nothing to choose.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.solver import effort

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]


def level(
    windows: Floats,
    room: NDArray[np.int64],
    time: Floats,
    start: Slots | None = None,
    *,
    price: float = 0.0,
    forbidden: NDArray[np.bool_] | None = None,
) -> Slots:
    """Return slots [L,D,S] whose slowest device of every window has little to do.

    The answer is a function of the arguments alone; all work is done in the calling thread. From a
    start it is no worse than that, else no worse than a packing of the sum of all windows, in the
    mean over windows of the slowest device.

    Parameters
    ----------
    windows
        Tokens [W,L,E].
    room, time
        Slots of every device [L,D], and its time per token, as a share of the slowest one's [D].
    start
        What runs [L,D,S], -1 where a slot is empty; anew where a layer is empty.
    price
        What a copy must gain that is not there at the start, as a share of the mean device's time.
    forbidden
        Where experts must not be [L,E,D].
    """
    found, _ = _core.level_windows(
        np.ascontiguousarray(windows),
        np.ones(len(windows)),
        room,
        time,
        trials=quick_trials(int(room.sum(axis=1).max()), len(windows)),
        noise=effort.LEVEL_NOISE,
        start=None if start is None else np.ascontiguousarray(start),
        price=price,
        forbidden=forbidden,
        alone=True,
    )
    return found


def quick_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows, which are looked at LANES at a time."""
    lanes = -(-windows // effort.LANES)
    trials = max(effort.LEVEL_TRIALS * slots, effort.LEAST_LEVEL)
    return min(trials, effort.LEVEL_WORK * slots // lanes)


def full_trials(slots: int, windows: int) -> int:
    """Return the same where there is no hurry."""
    return effort.LEVEL_FULL * slots // -(-windows // effort.LANES)
