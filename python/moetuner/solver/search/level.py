"""Balance in windows within milliseconds: a start that sees every window, and exchanges from there.

The core's search of layers on the norm that stands for the slowest device, with few trials.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.solver import effort

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# The norm that stands for the slowest device, and the part of experts' variance among windows that
# no window tells of the next one (bench/RESULTS.md).
NORM, NOISE = 8, 0.25


def level(
    windows: Floats,
    capacity: NDArray[np.int64],
    time: Floats,
    start: Slots | None = None,
    *,
    price: float = 0.0,
    forbidden: NDArray[np.bool_] | None = None,
) -> Slots:
    """Compute slots [L,D,S] whose slowest device of every window has little to do.

    The answer is a function of the arguments alone; all work is done in the calling thread. From a
    start it is no worse than that, else no worse than a packing of the sum of all windows, in the
    mean over windows of the slowest device.

    Parameters
    ----------
    windows
        Tokens [W,L,E].
    capacity, time
        Slots of every device [L,D], and its time per token, as a share of the slowest one's [D].
    start
        What runs [L,D,S], -1 where a slot is empty.
    price
        What a copy must gain that is not there at the start, as a share of the mean device's time.
    forbidden
        Where experts must not be [L,E,D].
    """
    layers = _core.Layers(
        np.ascontiguousarray(windows),
        np.ones(len(windows)),
        capacity,
        [0] * len(time),
        time.tolist(),
        nearest=False,
        norm=NORM,
        noise=NOISE,
    )
    layers.rule(forbidden=forbidden)
    if start is None:
        start = layers.construct(windows=True, alone=True)
    elif price:
        # Ranks on different processors must find the same: sums that do not depend on them.
        mean = windows.sum(axis=(0, 2)) / math.fsum((1 / time).tolist())
        layers.hold(copy_prices(start, windows.shape[2], price * mean))
    trials = quick_trials(int(capacity.sum(axis=1).max()), len(windows))
    start = np.ascontiguousarray(start)
    return layers.place(start, trials=trials, empties=False, quick=True, alone=True)[0]


def copy_prices(slots: Slots, experts: int, price: Floats) -> Floats:
    """Compute what a copy costs [L,E,D]: ``price`` [L] where a device does not hold its expert."""
    layers, devices, _ = slots.shape
    prices = np.broadcast_to(price[:, None, None], (layers, experts + 1, devices)).copy()
    np.put_along_axis(prices, slots.transpose(0, 2, 1).astype(np.int64), 0.0, axis=1)
    return np.ascontiguousarray(prices[:, :-1])


def quick_trials(slots: int, windows: int) -> int:
    """Return the trials of a layer of slots in windows, which are looked at LANES at a time."""
    lanes = -(-windows // effort.LANES)
    trials = max(effort.LEVEL_TRIALS * slots, effort.LEAST_LEVEL)
    return min(trials, effort.LEVEL_WORK * slots // lanes)


def full_trials(slots: int, windows: int) -> int:
    """Return the same where there is no hurry."""
    return effort.LEVEL_FULL * slots // -(-windows // effort.LANES)
