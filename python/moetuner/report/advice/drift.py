"""Whether traffic changes its kind while it is recorded, which a random split cannot show."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.kinds import loads_by
from moetuner.evaluation.units import Traffic, Units, some
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

# Parts of equal numbers of sequences, in the order of the recording, that are permuted.
BLOCKS = 32
# Ways to halve the blocks that say how far halves of one kind differ, and the most of these that
# may differ as much as the first half does from the second.
HALVES, CHANCE = 400, 0.01
# Share of the tokens that go to other experts, beyond chance, from which a change is told.
LEAST = 0.05
# Fewest blocks that can be halved in so many ways.
FEWEST = 12


@dataclass(frozen=True)
class Drift:
    """How far the second half of a recording differs from the first.

    Parameters
    ----------
    distance
        Total variation distance of the halves' expert shares, averaged over layers: the part of the
        tokens that would have to go to other experts.
    expected
        The same of halves that are chosen at random.
    chance
        How many of the random halves differ as much.
    is_of_groups
        Whether the halves differ as they hold different groups, and each group stays as it is.
    """

    distance: float
    expected: float
    chance: float
    is_of_groups: bool = False

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the halves differ beyond chance, and by more than would not matter."""
        return self.chance <= CHANCE and self.distance - self.expected >= LEAST


def drift_of(traffic: Traffic, units: Units, *, seed: int = 0) -> Drift | None:
    """Compute how far the halves of a recording differ; None where there is too little to tell."""
    # Blocks of neighbours are taken as independent, so none may be shorter than what is alike.
    blocks = min(BLOCKS, units.number) if units.name == "window" else BLOCKS
    drift = None
    for by_group in (False, True):
        item, place = _in_order(traffic, by_group=by_group)
        block = (place * blocks // len(place))[item]
        if isinstance(traffic, RoutingTrace):
            loads = loads_by(traffic, block, blocks)
        else:
            loads = np.zeros((blocks, traffic.layers, traffic.experts))
            np.add.at(loads, block, traffic.window_load.astype(np.float64))
        loads = loads[np.unique(block)]
        if len(loads) < FEWEST or not loads.sum():
            return drift
        first, rng = np.arange(len(loads)) < len(loads) // 2, np.random.default_rng(seed)
        distance = _distance(loads, first)
        others = np.array([_distance(loads, rng.permutation(first)) for _ in range(HALVES)])
        chance = (1 + int((others >= distance - 1e-12).sum())) / (1 + HALVES)
        one = Drift(distance, float(others.mean()), chance)
        if drift is not None:
            return replace(drift, is_of_groups=not one.is_beyond_chance)
        drift = one
        if not one.is_beyond_chance or traffic.group is None:
            break
    return drift


def halves(traffic: Traffic) -> tuple[Traffic, Traffic]:
    """Cut a recording in the middle of its sequences, or of its windows or tokens without them."""
    item, place = _in_order(traffic, by_group=False)
    is_early = place[item] < len(place) // 2
    return some(traffic, is_early), some(traffic, ~is_early)


def _in_order(traffic: Traffic, *, by_group: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the item of every token or window, and each item's place in the order of recording.

    Items are sequences, or windows or tokens without them. With ``by_group`` those of every group
    are spread over the whole, in their order.
    """
    rows = traffic.windows if isinstance(traffic, RoutingStatistics) else traffic.tokens
    item = first = np.arange(rows)
    if isinstance(traffic, RoutingTrace) and traffic.sequence is not None:
        _, first, item = np.unique(traffic.sequence, return_index=True, return_inverse=True)
    order = np.argsort(first)
    if by_group and traffic.group is not None:
        group = traffic.group[first][order]
        sizes = np.bincount(group)
        grouped = np.argsort(group, kind="stable")
        rank = np.empty(len(group))
        rank[grouped] = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = order[np.argsort((rank + 0.5) / sizes[group], kind="stable")]
    place = np.empty(len(first), dtype=np.int64)
    place[order] = np.arange(len(first))
    return item, place


def _distance(loads: NDArray[np.float64], first: NDArray[np.bool_]) -> float:
    parts = np.stack([loads[first].sum(axis=0), loads[~first].sum(axis=0)])
    early, late = parts / np.maximum(parts.sum(axis=2, keepdims=True), 1)
    return float(np.abs(early - late).sum(axis=1).mean() / 2)
