"""rebalance(): from running slots to better ones on live loads, by few moves and bounded work.

One set of rules for all who rebalance while a model serves: the plugins of engines and the
rebalancer of expert-parallel layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.solver import effort

Slots = NDArray[np.int32]

# Largest share of a model's experts that one decision brings to other devices, if nobody says more,
# and copies for every device that are never too many, in a small model.
LARGEST_MOVE, FEW = 0.25, 8
# Smallest share of the slowest device's time that is worth moving a layer's experts.
DEAD_ZONE = 0.02
# Standard deviations of a count within which a gain is taken for chance.
DEVIATIONS = 2.0


def largest_move(layers: int, experts: int, devices: int) -> int:
    """Return how many copies one decision brings at most, if nobody says more."""
    return max(math.ceil(layers * experts * LARGEST_MOVE), FEW * devices)


@dataclass(frozen=True)
class Rebalanced:
    """What became of running slots.

    Parameters
    ----------
    slots
        Expert ids [L,D,S]; -1 where a device holds all experts already.
    before, after
        Time of the slowest device of every layer [L], in tokens of the slowest kind of device.
    brought
        Copies of every layer that come to a device [L].
    """

    slots: Slots
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    brought: NDArray[np.int64]


def rebalance(
    load: NDArray[np.float64],
    slots: Slots,
    *,
    time: NDArray[np.float64],
    budget: int,
    dead_zone: float = DEAD_ZONE,
    deviations: float = DEVIATIONS,
    tolerance: float | None = None,
    forbidden: NDArray[np.bool_] | None = None,
) -> Rebalanced:
    """Relieve the slowest devices of running slots by few copies that come to a device.

    The answer is a function of the arguments alone. The work is bounded by steps, not by time; it
    runs in the calling thread, without the interpreter's lock.

    Parameters
    ----------
    load
        Tokens [L,E]: finite, at least 0.
    slots
        Experts [L,D,S], -1 where a slot is empty. Experts that have no slot get one and empty slots
        are filled, whatever they bring. What stays on a device keeps its slot.
    time
        Time of every device per token, as a share of the slowest one's [D].
    budget
        Copies that are brought at most, where they gain most.
    dead_zone
        A layer stays unless its slowest device gains more than this share of its time.
    deviations
        And more than so many standard deviations of counts as large, which are by chance.
    tolerance
        A device within this share of the mean is relieved no further; half of the dead zone by
        default.
    forbidden
        Where experts must not be [L,E,D].
    """
    found, before, after, brought = _core.adapt_slots(
        np.ascontiguousarray(load),
        np.ascontiguousarray(slots),
        time,
        most=min(budget, slots.size),
        dead_zone=dead_zone,
        deviations=deviations,
        tolerance=dead_zone / 2 if tolerance is None else tolerance,
        steps=effort.ADAPT_STEPS,
        trials=effort.QUICK,
        forbidden=forbidden,
    )
    return Rebalanced(found, np.array(before), np.array(after), np.array(brought, dtype=np.int64))
