"""balance(): copies of experts for the load at hand, fast enough to call while serving."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from moetuner import _core
from moetuner._checks import numbers_in
from moetuner.placement import Placement
from moetuner.problem.capacity import compute_capacity
from moetuner.solver import effort
from moetuner.topology import Topology


def balance(
    load: ArrayLike,
    *,
    devices: int,
    slots_per_device: int | Sequence[int],
    speed: Sequence[float] | None = None,
) -> Placement:
    """Balance the load of one moment, and nothing else.

    Engines call this an expert-parallel load balancer. It does what ``solve`` does with the method
    ``eplb``, balances better, and needs no ``Problem``. The answer is a function of the arguments
    alone, on every machine, so that each rank may compute it for itself. It runs in the calling
    thread and starts no other.

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
    numbers_in("slots_per_device", slots_per_device)
    topology = Topology(devices, speed=speed)
    slots = _core.replicate_experts(
        np.ascontiguousarray(tokens),
        compute_capacity(tokens, topology, slots_per_device, None),
        topology.time_of_device,
        trials=effort.QUICK if speed is None else effort.PATIENT,
    )
    return Placement(slots, num_experts=tokens.shape[1])
