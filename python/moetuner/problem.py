"""Problem: what is to be placed where, under which limits. Validated once, then frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology

Regime = Literal["follow", "dispatch"]


@dataclass(frozen=True)
class Problem:
    """Statistics, a topology and limits.

    Parameters
    ----------
    statistics
        Counts of the traffic to place for.
    topology
        The devices and links.
    slots_per_device
        Slots of a device in a layer, S; by default just enough for one copy of each expert.
    regime
        ``"follow"``: a token's state moves from expert to expert, so transitions cost.
        ``"dispatch"``: it is sent from its home device to every distinct device of its experts, so
        co-activation saves.
    max_imbalance
        Cap on max / mean device load in every layer, on the sum of all windows; None for no cap.

    Raises
    ------
    ValueError
        If the slots do not suffice or a limit makes no sense.
    """

    statistics: RoutingStatistics
    topology: Topology
    slots_per_device: int | None = None
    regime: Regime = "follow"
    max_imbalance: float | None = None

    def __post_init__(self) -> None:
        fewest = -(-self.experts // self.devices)
        if self.slots_per_device is None:
            object.__setattr__(self, "slots_per_device", fewest)
        if self.slots < fewest:
            raise ValueError(
                f"slots_per_device must be at least {fewest} for {self.experts} experts on "
                f"{self.devices} devices, got {self.slots_per_device}"
            )
        if self.regime not in ("follow", "dispatch"):
            raise ValueError(f"regime must be 'follow' or 'dispatch', got {self.regime!r}")
        if self.max_imbalance is not None and not self.max_imbalance >= 1:
            raise ValueError(f"max_imbalance must be at least 1, got {self.max_imbalance}")

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return self.statistics.layers

    @property
    def experts(self) -> int:
        """Experts per layer, E."""
        return self.statistics.experts

    @property
    def devices(self) -> int:
        """Number of devices, D."""
        return self.topology.devices

    @property
    def slots(self) -> int:
        """Slots of a device in a layer, S."""
        assert self.slots_per_device is not None
        return self.slots_per_device

    @cached_property
    def load(self) -> NDArray[np.uint64]:
        """Tokens per layer and expert, over all windows [L,E]."""
        return self.statistics.total_load

    @cached_property
    def caps(self) -> NDArray[np.uint64]:
        """Largest load a device may carry [L]: floor(max_imbalance * mean device load)."""
        total: NDArray[np.uint64] = self.load.sum(axis=1, dtype=np.uint64)
        if self.max_imbalance is None or math.isinf(self.max_imbalance):
            return total
        # In integers, so that a placement at the cap exactly is allowed: imbalance as a fraction
        # over 2**32.
        ratio = math.floor(self.max_imbalance * 2**32 + 0.5)
        caps = [min(int(t) * ratio // (self.devices << 32), int(t)) for t in total]
        return np.array(caps, dtype=np.uint64)

    def device_load(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Load of every device [L,D] with these slots [L,D,S], one copy of each expert."""
        layer = np.arange(self.layers)[:, None, None]
        each = np.where(slots == EMPTY, np.uint64(0), self.load[layer, slots])
        load: NDArray[np.uint64] = each.sum(axis=2, dtype=np.uint64)
        return load

    def kept_caps(self, slots: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Caps [L], raised where a placement [L,D,S] breaks them."""
        kept: NDArray[np.uint64] = np.maximum(self.caps, self.device_load(slots).max(axis=1))
        return kept

    def cost(self, placement: Placement) -> int:
        """Integer objective of a placement, exact with one copy of each expert.

        ``follow``: sum over neighbouring layers of transitions [E,E] times ``topology.cost``
        between the experts' devices. ``dispatch``: co-activated pairs on different devices. Copies
        take equal parts, each pair on its own; the sum is rounded.
        """
        if (placement.replicas > 1).any():
            return self._expected_cost(placement)
        total = 0
        device_of = placement.device_of
        if self.regime == "follow":
            for layer, table in enumerate(self.statistics.transitions_or_empty):
                moved = self.topology.cost[np.ix_(device_of[layer], device_of[layer + 1])]
                total += _exact_dot(table, moved)
        else:
            for layer, table in enumerate(self.statistics.coactivation_or_empty):
                apart = np.not_equal.outer(device_of[layer], device_of[layer]).astype(np.int64)
                total += _exact_dot(table, apart) // 2
        return total

    def _expected_cost(self, placement: Placement) -> int:
        """Cost of a placement with copies, each of which takes an equal part."""
        part = placement.held / placement.replicas[:, None, :]
        if self.regime == "follow":
            cost, after, tables = self.topology.cost, part[1:], self.statistics.transitions_or_empty
        else:
            cost = 1 - np.eye(self.devices, dtype=np.int64)
            after, tables = part, self.statistics.coactivation_or_empty / 2
        pairs = zip(part, after, tables, strict=False)
        return round(sum(float((p.T @ cost @ q * table).sum()) for p, q, table in pairs))

    @cached_property
    def cost_scale(self) -> int:
        """Cost if every counted pair moved over the cheapest link; objectives are shares of it."""
        if self.regime == "follow":
            cost = self.topology.cost
            cheapest = int(cost[cost > 0].min()) if self.devices > 1 else 1
            pairs = sum(_exact_sum(table) for table in self.statistics.transitions_or_empty)
            return max(pairs * cheapest, 1)
        pairs = sum(_exact_sum(table) for table in self.statistics.coactivation_or_empty)
        return max(pairs // 2, 1)

    def empty_slots(self) -> NDArray[np.int32]:
        """Slots [L,D,S] with nothing in them."""
        return np.full((self.layers, self.devices, self.slots), EMPTY, dtype=np.int32)


def _exact_sum(table: NDArray[np.uint64]) -> int:
    """Sum without overflow: 64-bit counts in two halves."""
    low, high = table & np.uint64(0xFFFFFFFF), table >> np.uint64(32)
    return int(low.sum(dtype=np.uint64)) + (int(high.sum(dtype=np.uint64)) << 32)


def _exact_dot(table: NDArray[np.uint64], cost: NDArray[np.int64]) -> int:
    """Sum of table * cost without overflow: group by the few distinct costs."""
    return sum(int(c) * _exact_sum(table[cost == c]) for c in np.unique(cost) if c)
