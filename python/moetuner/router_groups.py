"""Placements for routers that first choose among groups of neighbouring experts.

Renumbering experts is exact for such a router (DeepSeek-V3) only if its groups stay whole. With no
more devices than groups, place the groups; with more, keep every group on devices of its own::

    groups = mt.Problem(router_groups.merged(statistics, 8), topology)
    placement = router_groups.expanded(mt.solve(groups).placement, statistics.experts)

    apart = router_groups.forbidden(statistics.experts, 8, topology.devices)
    placement = mt.solve(mt.Problem(statistics, topology, forbidden=apart)).placement
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import DEVICE_LIMIT, experts_in, instance, whole_number
from moetuner.placement import EMPTY, Placement
from moetuner.statistics import RoutingStatistics


def merged(statistics: RoutingStatistics, groups: int) -> RoutingStatistics:
    """Count as if every group were one expert.

    Expert sets are dropped: how often two experts of a group met is not a matter of placing groups.

    Raises
    ------
    ValueError
        If the groups do not divide the experts.
    """
    instance("statistics", statistics, RoutingStatistics)
    size = _size(statistics.experts, groups)
    load = statistics.window_load
    together = _pairs(statistics.coactivation, size)
    if together is not None:
        together[:, np.arange(groups), np.arange(groups)] = 0
    return RoutingStatistics(
        load.reshape(*load.shape[:2], groups, size).sum(axis=3, dtype=np.uint64),
        _pairs(statistics.transitions, size),
        together,
        **{name: getattr(statistics, name) for name in ("window", "group", "group_names", "model")},
    )


def expanded(placement: Placement, experts: int) -> Placement:
    """Put the experts in the place of their groups: a placement of groups becomes one of experts.

    Raises
    ------
    ValueError
        If the groups do not divide the experts.
    """
    instance("placement", placement, Placement)
    size = _size(experts, placement.num_experts)
    group = placement.slots[..., None]
    slots = np.where(group == EMPTY, EMPTY, group * size + np.arange(size))
    names: Any = {"model": placement.model, "topology": placement.topology}
    return Placement(slots.reshape(*slots.shape[:2], -1), num_experts=experts, **names)


def forbidden(experts: int, groups: int, devices: int) -> list[tuple[None, int, int]]:
    """Return rules for ``Problem`` that keep group after group on the same number of devices.

    Raises
    ------
    ValueError
        If the groups do not divide the experts or the devices.
    """
    size = _size(experts, groups)
    whole_number("devices", devices, highest=DEVICE_LIMIT)
    if devices % groups:
        raise ValueError(f"groups must divide {devices} devices, got {groups}")
    per_group = devices // groups
    return [
        (None, expert, device)
        for expert in range(experts)
        for device in range(devices)
        if expert // size != device // per_group
    ]


def _size(experts: int, groups: int) -> int:
    experts_in(experts, "experts")
    whole_number("groups", groups)
    if experts % groups:
        raise ValueError(f"groups must divide {experts} experts, got {groups}")
    return experts // groups


def _pairs(table: NDArray[np.uint64] | None, size: int) -> NDArray[np.uint64] | None:
    """Add up pairs [..,E,E] over the experts of groups."""
    if table is None:
        return None
    groups = table.shape[-1] // size
    blocks = table.reshape(len(table), groups, size, groups, size)
    return np.asarray(blocks.sum(axis=(2, 4), dtype=np.uint64))
