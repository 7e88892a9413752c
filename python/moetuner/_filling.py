"""Further copies of experts in slots that are empty: engines have none."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# As in ``placement``, which needs this module.
EMPTY = -1

Slots = NDArray[np.int32]


def filled(
    slots: Slots,
    experts: int,
    *,
    rooms: NDArray[np.int64] | None = None,
    load: NDArray[Any] | None = None,
    forbidden: NDArray[np.bool_] | None = None,
    held: NDArray[np.bool_] | None = None,
) -> Slots:
    """Fill slots [L,D,S] where they change least; no device gets two copies of one expert.

    Parameters
    ----------
    slots
        Expert ids, -1 for an empty slot.
    experts
        Experts per layer, E.
    rooms
        How many slots of every device are to be full [L,D]; all of them by default.
    load
        Tokens [L,E]: the copy that takes the fewest comes first. Without, experts of the fewest
        copies come first.
    forbidden
        Where experts must not be [L,E,D].
    held
        What is on every device already [L,D,E], and so need not be brought: it comes before
        all else.

    Raises
    ------
    ValueError
        If a device has more slots than there are experts that it may hold.
    """
    full = slots.copy()
    layers, devices, width = slots.shape
    wanted = np.full((layers, devices), width) if rooms is None else rooms
    short = wanted - (slots != EMPTY).sum(axis=2)
    for layer in np.flatnonzero((short > 0).any(axis=1)).tolist():
        copies = np.bincount(slots[layer].ravel() + 1, minlength=experts + 1)[1:]
        for device in np.flatnonzero(short[layer] > 0).tolist():
            row = full[layer, device]
            out = np.zeros(experts, dtype=bool)
            out[row[row != EMPTY]] = True
            if forbidden is not None:
                out |= forbidden[layer, :, device]
            if (~out).sum() < short[layer, device]:
                raise ValueError(
                    f"layer {layer}, device {device}: {wanted[layer, device]} slots cannot be "
                    f"filled, with {experts} experts and no two copies of one on a device"
                )
            here = np.zeros(experts) if held is None else ~held[layer, device]
            for slot in np.flatnonzero(row == EMPTY)[: short[layer, device]].tolist():
                takes = copies if load is None else load[layer] / (copies + 1)
                expert = int(np.lexsort((copies, takes, here, out))[0])
                row[slot], out[expert] = expert, True
                copies[expert] += 1
    return full
