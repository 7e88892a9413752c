"""The core's rule by which a token chooses between copies of an expert, in tables and tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY

LOW = 0xFFFFFFFF  # the low 32 bits


def list_copies(
    slots: NDArray[np.int32], experts: int, *, home: int | None = None, node: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the slots that may serve each expert of a layer.

    ``slots`` [D,S] are experts, -1 for none. Device ``home`` prefers its own copy, then those of
    its ``node`` devices. Returns slots ``device * S + slot`` in ascending order [E,R], and how many
    of them count [E]: a token at a position takes number ``hash_positions(position) % count``.
    """
    flat = slots.reshape(-1)
    slot = np.flatnonzero(flat != EMPTY)
    if home is not None:
        device = slot // slots.shape[1]
        distance = np.where(device == home, 0, 1 + (device // node != home // node))
        least = np.full(experts, 2)
        np.minimum.at(least, flat[slot], distance)
        slot = slot[distance == least[flat[slot]]]
    slot = slot[np.argsort(flat[slot], kind="stable")]
    count = np.bincount(flat[slot], minlength=experts)
    table = np.zeros((experts, int(count.max())), dtype=np.int64)
    table[np.arange(table.shape[1]) < count[:, None]] = slot
    return table, count


def hash_positions(position: Tensor) -> Tensor:
    """Compute the 32 bits that choose between copies at a position, of int64.

    The last step of MurmurHash3: neighbouring positions differ in every bit, the low ones and the
    high ones alike, so that the remainder by any number of copies is evenly spread.
    """
    # Products may wrap around; their low 32 bits are right all the same.
    bits = position & LOW
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & LOW
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & LOW
    return bits ^ (bits >> 16)
