"""What has to move from one placement to another: which expert, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.topology import Topology


@dataclass(frozen=True)
class PlacementDiff:
    """Copies of experts that arrive on a device which did not hold them.

    Parameters
    ----------
    experts_moved
        How many they are.
    experts_moved_per_layer
        In every layer [L].
    bytes_moved
        Their bytes; None where those of an expert are not known.
    moves
        Layer, expert, device from and device to of each [M,4], in this order.
    pairs
        How many go from a device to a device [D,D].
    """

    experts_moved: int
    experts_moved_per_layer: NDArray[np.int64]
    bytes_moved: int | None
    moves: NDArray[np.int64]
    pairs: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values."""
        return {
            "experts_moved": self.experts_moved,
            "experts_moved_per_layer": self.experts_moved_per_layer.tolist(),
            "bytes_moved": self.bytes_moved,
            "moves": self.moves.tolist(),
            "pairs": self.pairs.tolist(),
        }


def difference(
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
    topology: Topology | None,
    bytes_per_expert: int | None,
) -> PlacementDiff:
    """List the moves from one set of holders [L,D,E] to another.

    A copy comes from the nearest device that held the expert, by link costs where they were given,
    else by tier; of equally near ones from the lowest number. Without a topology all are equally
    near.
    """
    devices = before.shape[1]
    layer, expert, target = np.nonzero((after & ~before).transpose(0, 2, 1))
    far = np.zeros((devices, devices), np.int64)
    if topology is not None:
        far = topology.tier if topology.link_cost is None else topology.cost
    distance = far[:, target].T * devices + np.arange(devices)
    source = np.where(before[layer, :, expert], distance, np.iinfo(np.int64).max).argmin(axis=1)
    pairs = np.bincount(source * devices + target, minlength=devices * devices)
    return PlacementDiff(
        experts_moved=len(layer),
        experts_moved_per_layer=np.bincount(layer, minlength=len(before)),
        bytes_moved=None if bytes_per_expert is None else len(layer) * bytes_per_expert,
        moves=np.stack([layer, expert, source, target], axis=1),
        pairs=pairs.reshape(devices, devices),
    )


def brought(held: NDArray[np.bool_], slots: NDArray[np.int32]) -> int:
    """Count the copies in slots [L,D,S] that devices do not hold [L,D,E]."""
    there = np.take_along_axis(held, np.maximum(slots, 0).astype(np.int64), axis=2)
    return int(np.count_nonzero(~there & (slots >= 0)))


def kept(
    initial: NDArray[np.int32], slots: NDArray[np.int32], rooms: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Order the slots of every device so that experts which stay keep theirs; -1 is empty.

    Only those that a device has itself [L,D]: tables are as wide as the widest device.
    """
    ordered = slots.copy()
    same = min(initial.shape[2], slots.shape[2])
    differs = (initial[:, :, :same] != slots[:, :, :same]).any(axis=2)
    differs |= (slots[:, :, same:] >= 0).any(axis=2)
    for layer, device in np.argwhere(differs):
        ordered[layer, device] = -1
        here = [int(e) for e in slots[layer, device] if e >= 0]
        before = {int(e): s for s, e in enumerate(initial[layer, device]) if e >= 0}
        room = rooms[layer, device]
        stay = [e for e in here if before.get(e, room) < room]
        for expert in stay:
            ordered[layer, device, before[expert]] = expert
        free = iter(np.flatnonzero(ordered[layer, device] == -1))
        for expert in here:
            if expert not in stay:
                ordered[layer, device, next(free)] = expert
    return ordered
