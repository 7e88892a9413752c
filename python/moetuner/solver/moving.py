"""What it costs to leave a running placement, and its slots in the problem's own rooms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]


@dataclass(frozen=True)
class Moving:
    """What it costs to leave a running placement.

    Parameters
    ----------
    initial
        The placement that runs.
    price
        Of a copy that has to be brought, in units of the objective.
    """

    initial: Placement
    price: float

    @property
    def prices(self) -> Floats:
        """Price of a copy on a device [L,D,E]."""
        return np.where(self.initial.held, 0.0, self.price)

    def moved(self, placement: Placement) -> int:
        """Count copies that have to be brought."""
        return self.initial.diff(placement).experts_moved


def widened(problem: Problem, slots: Slots) -> Slots:
    """Slots [L,D,S] in the problem's own rooms, which hold them; what is in them moves down."""
    wide = problem.empty_slots()
    width = min(slots.shape[2], problem.slots)
    # Full slots first: rooms may be narrower than these slots.
    order = np.argsort(slots == EMPTY, axis=2, kind="stable")
    wide[:, :, :width] = np.take_along_axis(slots, order, axis=2)[:, :, :width]
    return wide
