"""Load caps: the largest load of a device, and the excess of a placement over it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import copies
from moetuner.placement import EMPTY, Placement
from moetuner.serving.splits import Split
from moetuner.topology import Topology

Floats = NDArray[np.float64]

# Relative error that the sums of copies' fractions may have.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Caps:
    """The load cap of a problem, layer by layer: max / mean device load, on the sum of all windows.

    Parameters
    ----------
    load
        Tokens [L,E], over all windows.
    max_imbalance
        The cap; None or infinite for none.
    topology, split
        Devices and their speeds, and how tokens are split over an expert's copies.
    """

    load: NDArray[np.uint64]
    max_imbalance: float | None
    topology: Topology
    split: Split

    @property
    def exist(self) -> bool:
        """True if there is a finite cap."""
        return self.max_imbalance is not None and not math.isinf(self.max_imbalance)

    @cached_property
    def whole(self) -> NDArray[np.uint64]:
        """Largest load of a device [L] in whole tokens, with one copy of each expert.

        It is floor(max_imbalance * mean device load), as if all devices were equally fast; without
        a cap it is the load of all devices together.
        """
        total: NDArray[np.uint64] = self.load.sum(axis=1, dtype=np.uint64)
        if self.max_imbalance is None or not self.exist:
            return total
        # Caps are integers, computed exactly, from a ratio a hair above the given one: a caller who
        # divides floats and compares never finds a placement that keeps the cap beyond it.
        ratio = Fraction(self.max_imbalance) * (1 + Fraction(1, 2**50))
        caps = [min(math.floor(int(t) * ratio / self.topology.devices), int(t)) for t in total]
        return np.array(caps, dtype=np.uint64)

    @cached_property
    def over_speed(self) -> Floats | None:
        """Largest load over speed of a device [L], for any number of copies; None without a cap."""
        if self.max_imbalance is None or not self.exist:
            return None
        total = self.load.sum(axis=1, dtype=np.float64)
        with np.errstate(over="ignore"):  # a cap that overflows is infinite, so none
            caps: Floats = self.max_imbalance * total / self.topology.speed_of_device.sum()
        return caps

    @property
    def in_slowest_time(self) -> Floats | None:
        """``over_speed`` as load in time of the slowest device [L]; None without a cap."""
        caps = self.over_speed
        return None if caps is None else caps * self.topology.speed_of_device.min()

    def raised_for(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Return ``whole``, raised to the loads of slots [L,D,S] with one copy of each expert."""
        load = device_load(slots, self.load)
        raised: NDArray[np.uint64] = np.maximum(self.whole, load.max(axis=1))
        return raised

    def peaks(self, placement: Placement) -> Floats:
        """Compute the largest load over speed of a device in every layer [L]."""
        total = self.load[None].astype(np.float64)
        return np.asarray(compute_slowest_load(placement, total, self.topology, self.split)[0])

    def excess(self, placement: Placement) -> Floats:
        """Compute the relative excess of a placement over the cap [L]; 0 where it keeps the cap."""
        if self.over_speed is None:
            return np.zeros(len(self.load))
        excess = self.peaks(placement) / np.maximum(self.over_speed, 1e-300) - 1
        return np.where(excess > ROUNDING, excess, 0.0)

    def violations(self, placement: Placement) -> list[str]:
        """Return a sentence on the excess of a placement over the cap; none if it keeps the cap."""
        excess = self.excess(placement)
        over, worst = np.flatnonzero(excess), int(excess.argmax())
        if self.max_imbalance is None or not len(over):
            return []
        return [
            f"max_imbalance: {self.max_imbalance:g} is exceeded in {len(over)} of "
            f"{len(excess)} layers: {self.max_imbalance * (1 + excess[worst]):.4g} in layer {worst}"
        ]


def compute_slowest_load(
    placement: Placement, load: Floats, topology: Topology, split: Split
) -> Floats:
    """Compute the largest load over speed of a device [W,L], from the load of experts [W,L,E]."""
    served = copies.count_loads(placement, topology, split, load)
    slowest: Floats = (served / topology.speed_of_device).max(axis=2)
    return slowest


def device_load(slots: NDArray[np.int32], load: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Compute the load of every device [L,D] from slots [L,D,S] with one copy of each expert."""
    by_slot = load[np.arange(len(load))[:, None, None], slots]
    carried: NDArray[np.uint64] = by_slot.sum(axis=2, dtype=np.uint64, where=slots != EMPTY)
    return carried
