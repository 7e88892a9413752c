"""Whether traffic changes its kind while it is recorded, which a random split cannot show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.statistics import RoutingStatistics, some_windows
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
    """

    distance: float
    expected: float
    chance: float

    @property
    def is_told(self) -> bool:
        """Whether the halves differ beyond chance, and by more than would not matter."""
        return self.chance <= CHANCE and self.distance - self.expected >= LEAST


def drift_of(traffic: RoutingTrace | RoutingStatistics, *, seed: int = 0) -> Drift | None:
    """Compute how far the halves of a recording differ; None where there is too little to tell."""
    loads = _blocks(traffic)
    if len(loads) < FEWEST or not loads.sum():
        return None
    half = len(loads) // 2
    first = np.zeros(len(loads), dtype=bool)
    first[:half] = True
    rng = np.random.default_rng(seed)
    distance = _distance(loads, first)
    others = np.array([_distance(loads, rng.permutation(first)) for _ in range(HALVES)])
    chance = (1 + int((others >= distance - 1e-12).sum())) / (1 + HALVES)
    return Drift(distance, float(others.mean()), chance)


def halves(
    traffic: RoutingTrace | RoutingStatistics,
) -> tuple[RoutingTrace, RoutingTrace] | tuple[RoutingStatistics, RoutingStatistics]:
    """Cut a recording in the middle of its sequences, or of its windows."""
    if isinstance(traffic, RoutingStatistics):
        is_early = np.arange(traffic.windows) < traffic.windows // 2
        return some_windows(traffic, is_early), some_windows(traffic, ~is_early)
    labels, order = _in_order(traffic)
    middle = len(labels) // 2
    early, late = labels[order < middle], labels[order >= middle]
    return (
        traffic.select(sequences=early.tolist()),
        traffic.select(sequences=late.tolist()),
    )


def _in_order(trace: RoutingTrace) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Labels of the sequences, and each one's place in the order of their first tokens."""
    assert trace.sequence is not None
    labels, first = np.unique(trace.sequence, return_index=True)
    place = np.empty(len(labels), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(labels))
    return labels, place


def _blocks(traffic: RoutingTrace | RoutingStatistics) -> NDArray[np.float64]:
    """Load of blocks of neighbouring sequences, or windows [B,L,E]."""
    if isinstance(traffic, RoutingStatistics):
        block = np.arange(traffic.windows) * BLOCKS // traffic.windows
        loads = np.zeros((BLOCKS, traffic.layers, traffic.experts))
        np.add.at(loads, block, traffic.window_load.astype(np.float64))
        return loads[np.unique(block)]
    labels, place = _in_order(traffic)
    assert traffic.sequence is not None
    of_label = place * BLOCKS // len(labels)
    block = of_label[np.searchsorted(labels, traffic.sequence)]
    loads = np.zeros((BLOCKS, traffic.layers, traffic.num_experts))
    layer = np.arange(traffic.layers)[None, :, None]
    first = 0
    for shard in traffic.shards():
        at = block[first : first + len(shard), None, None]
        cell = (at * traffic.layers + layer) * traffic.num_experts + shard.astype(np.int64)
        loads += np.bincount(cell.ravel(), minlength=loads.size).reshape(loads.shape)
        first += len(shard)
    return loads[np.unique(of_label)]


def _distance(loads: NDArray[np.float64], first: NDArray[np.bool_]) -> float:
    shares = []
    for part in (loads[first].sum(axis=0), loads[~first].sum(axis=0)):
        shares.append(part / np.maximum(part.sum(axis=1, keepdims=True), 1))
    return float(np.abs(shares[0] - shares[1]).sum(axis=1).mean() / 2)
