"""The core's rule by which a token chooses between copies of an expert, in tables and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY

LOW = 0xFFFFFFFF  # the low 32 bits


def copies(
    slots: NDArray[np.int32], experts: int, *, near: int | None = None, node: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the slots that may serve each expert of a layer.

    Parameters
    ----------
    slots
        Expert ids [D,S] of a layer, -1 for an empty slot.
    experts
        Experts of the layer, E.
    near
        Device that prefers its own copy, then those of its node; None to take all copies.
    node
        Devices of a node.

    Returns
    -------
    tuple of ndarray
        Slots ``device * S + slot`` in ascending order [E,R], filled up with the first, and how many
        of them count [E]. A token at a position takes number ``mixed(position) % count``.
    """
    width = slots.shape[1]
    flat = slots.reshape(-1)
    filled = np.flatnonzero(flat != EMPTY)
    lists = [filled[flat[filled] == expert] for expert in range(experts)]
    if near is not None:
        for expert, mine in enumerate(lists):
            device = mine // width
            for close in (device == near, device // node == near // node):
                if close.any():
                    lists[expert] = mine[close]
                    break
    count = np.array([len(mine) for mine in lists], dtype=np.int64)
    table = np.empty((experts, int(count.max())), dtype=np.int64)
    for expert, mine in enumerate(lists):
        table[expert] = mine[0]
        table[expert, : len(mine)] = mine
    return table, count


def mixed(position: Any) -> Any:
    """Compute the 32 bits that choose between copies at a position, in arrays or tensors of int64.

    The last step of MurmurHash3: neighbouring positions differ in every bit, the low ones and the
    high ones alike, so that the remainder by any number of copies is evenly spread.
    """
    # Products may wrap around; their low 32 bits are right all the same.
    bits = position & LOW
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & LOW
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & LOW
    return bits ^ (bits >> 16)
