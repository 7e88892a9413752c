"""A placement as an order of experts: what engines with contiguous experts can be given.

Such an engine puts experts 0 to E/D-1 on the first device, the next ones on the second and so on.
Renumbering the experts, together with the router's rows, is then all that a placement needs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement

Order = NDArray[np.int64]

ROUTER_NAMES = ("gate", "router")


def order_of(placement: Placement) -> Order:
    """Return the old expert at every new position [L,E]: by device, ascending within one."""
    layers, devices, _ = placement.slots.shape
    copies = placement.replicas
    if (copies > 1).any():
        layer, expert = np.argwhere(copies > 1)[0]
        raise ValueError(
            "placement must have one copy of each expert to become an order of experts, got "
            f"{copies[layer, expert]} of expert {expert} in layer {layer}"
        )
    counts = (placement.slots != EMPTY).sum(axis=2)
    if (counts * devices != placement.num_experts).any():
        layer, device = np.argwhere(counts * devices != placement.num_experts)[0]
        raise ValueError(
            f"placement must have {placement.num_experts}/{devices} experts on every device to "
            f"become an order of experts, got {counts[layer, device]} on device {device} in layer "
            f"{layer}"
        )
    return np.argsort(placement.device_of, axis=1, kind="stable").reshape(layers, -1)


def groups_chosen(groups: int | None, limit: int | None, method: object) -> int:
    """Count the groups among which a router chooses first; 1 if all experts compete at once."""
    if groups is None or method == "greedy" or (limit is not None and limit >= groups):
        return 1
    return groups


def check_groups(order: NDArray[np.int64], groups: int, layer: str) -> None:
    """Check that the order [E] keeps the router's groups of experts whole.

    A group-limited router first chooses groups by their positions. If a run of positions held
    experts of two groups, other groups would win, and other experts be chosen.
    """
    experts = len(order)
    if groups == 1:
        return
    if experts % groups:
        raise ValueError(f"{layer}: {groups} groups must divide {experts} experts")
    size = experts // groups
    for run, members in enumerate((order // size).reshape(groups, size)):
        mixed = sorted(set(members.tolist()))
        if len(mixed) > 1:
            raise ValueError(
                f"{layer}: its router chooses among {groups} groups of {size} experts first, so "
                f"groups must stay whole, but positions {run * size} to {(run + 1) * size - 1} "
                f"would hold experts of groups {mixed}; moetuner.router_groups places them whole"
            )
