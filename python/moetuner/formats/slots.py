"""Counts of slots, which balancers keep, turned into counts of experts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def by_expert(
    load: NDArray[np.int64], slots: NDArray[np.int64], experts: int | None
) -> NDArray[np.int64]:
    """Add up loads of slots [..,L,P] by the expert [L,P] that is in them: [..,L,E].

    Raises
    ------
    ValueError
        If the tables are of other sizes, or a slot holds no expert that there is.
    """
    if load.shape[-2:] != slots.shape:
        raise ValueError(
            f"loads and slots must have the same layers and slots, got {list(load.shape[-2:])} and "
            f"{list(slots.shape)}"
        )
    most = int(slots.max(initial=-1)) + 1
    experts = max(most, 1) if experts is None else experts
    if most > experts or int(slots.min(initial=0)) < -1:
        raise ValueError(
            f"slots must hold experts from 0 to {experts - 1}, got {slots.min()} to {most - 1}"
        )
    if slots.shape[0] * experts > 1 << 28:
        raise ValueError(f"slots must hold experts below {1 << 16}, got {most - 1}")
    found = np.zeros((*load.shape[:-1], experts + 1), dtype=np.int64)
    for layer, held in enumerate(slots):
        # Empty slots, -1, are the last column, which is left out.
        np.add.at(found[..., layer, :].T, held, load[..., layer, :].T)
    return found[..., :experts]
