"""balance(): copies of experts for the load at hand, fast enough to call while serving."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner._checks import (
    DEVICE_LIMIT,
    SLOT_LIMIT,
    array_in,
    check_slots,
    numbers_in,
    shown,
    whole_number,
)
from moetuner.placement import Placement
from moetuner.solver import effort


def balance(
    load: ArrayLike,
    *,
    devices: int,
    slots_per_device: int | Sequence[int],
    speed: Sequence[float] | None = None,
) -> Placement:
    """Balance the load of one moment, and nothing else.

    What engines call an expert-parallel load balancer: as ``solve`` with the method ``eplb``, and
    better balanced, without a ``Problem``. The answer is a function of the arguments alone, on
    every machine, so that each rank may compute it for itself. It runs in the calling thread and
    starts no other.

    Parameters
    ----------
    load
        Tokens [L,E], or [W,L,E] of windows, which are summed.
    devices
        Number of devices, D.
    slots_per_device
        Slots of a device in a layer, or of every device [D]. Slots beyond one per expert get
        copies, whose load is split evenly; no device gets two copies of one expert.
    speed
        Relative speed of every device [D]; all alike by default.

    Returns
    -------
    Placement
        A slot may stay empty where no copy would be of use.

    Raises
    ------
    ValueError
        If the slots do not suffice, or a load or a speed makes no sense.

    Examples
    --------
    >>> import moetuner as mt
    >>> placement = mt.balance([[8, 4, 2, 2]], devices=2, slots_per_device=3)
    >>> placement.replicas.tolist()
    [[2, 2, 1, 1]]
    """
    tokens = numbers_in("load", load)
    if tokens.ndim == 3:
        tokens = tokens.sum(axis=0)
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(
            "load must be [layers, experts] or [windows, layers, experts], none of them zero, "
            f"got {list(np.shape(load))}"
        )
    layers, experts = tokens.shape
    whole_number("devices", devices, highest=DEVICE_LIMIT)
    given = array_in("slots_per_device", slots_per_device)
    if given.dtype.kind not in "iu" or not ((given >= 0) & (given <= SLOT_LIMIT)).all():
        raise ValueError(
            f"slots_per_device must be integers from 0 to {SLOT_LIMIT}, "
            f"got {shown(slots_per_device)}"
        )
    capacity = _per_device("slots_per_device", slots_per_device, devices).astype(np.int64)
    if capacity.min() < 0 or capacity.sum() < experts:
        raise ValueError(
            f"slots_per_device must give at least {experts} slots for as many experts on "
            f"{devices} devices, got {int(capacity.sum())}"
        )
    check_slots(devices, int(capacity.max()), layers)
    slots = _core.replicate_experts(
        np.ascontiguousarray(tokens),
        np.tile(capacity, (layers, 1)),
        _times(_per_device("speed", 1.0 if speed is None else speed, devices)),
        trials=effort.QUICK if speed is None else effort.PATIENT,
    )
    return Placement(slots, num_experts=experts)


def _times(speed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the time of every device per token [D], as a share of the slowest one's."""
    if not (np.isfinite(speed).all() and (speed > 0).all()):
        raise ValueError(f"speed must be finite and above 0, got {speed.tolist()}")
    time: NDArray[np.float64] = speed.min() / speed
    return time


def _per_device(
    name: str, value: float | Sequence[float] | Sequence[int], devices: int
) -> NDArray[np.float64]:
    """Return one number per device [D]."""
    values = numbers_in(name, value)
    if values.shape not in ((), (devices,)):
        raise ValueError(f"{name} must be one number or {devices}, got shape {list(values.shape)}")
    return np.broadcast_to(values, devices)
