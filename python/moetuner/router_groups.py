"""Router groups: routers that first choose among groups of neighbouring experts.

Renumbering experts is exact for such a router (DeepSeek-V3) only if its groups stay whole. With no
more devices than groups, place the groups; with more, keep every group on devices of its own::

    groups = mt.Problem(router_groups.merge(statistics, 8), topology)
    placement = router_groups.expand(mt.solve(groups).placement, statistics.num_experts)

    apart = router_groups.forbid(statistics.num_experts, 8, topology.devices)
    placement = mt.solve(mt.Problem(statistics, topology, forbidden=apart)).placement
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import DEVICE_LIMIT, ArgumentError, experts_in, instance, whole_number
from moetuner.placement import EMPTY, Placement
from moetuner.statistics import RoutingStatistics

# Largest number of exchanges of two groups in a layer; each must gain half the dead zone.
GROUP_PAIRS = 8
# Settings of a configuration: the number of groups among which a router chooses first, and how many
# groups it may choose. Attention heads, convolutions and quantised weights have groups as well.
GROUPS = re.compile(
    r"(n|num)_group|(?!.*(top_?k|limit|size|use))((.*_)?(expert|router|moe)s?_.*groups?(_.*)?"
    r"|(n|num)_expert_?groups?)"
)
LIMIT = re.compile(r"(?=.*(top_?k|limit)).*groups?(_.*)?")


def merge(statistics: RoutingStatistics, groups: int) -> RoutingStatistics:
    """Return the statistics of groups, as if every group were one expert.

    Expert sets are dropped, and so are pairs inside a group: no placement of groups parts them.

    Raises
    ------
    ValueError
        If the groups do not divide the experts.
    """
    instance("statistics", statistics, RoutingStatistics)
    size = _compute_group_size(statistics.num_experts, groups)
    load = statistics.window_load
    together = _add_up_pairs(statistics.coactivation, size)
    if together is not None:
        together[:, np.arange(groups), np.arange(groups)] = 0
    return RoutingStatistics(
        load.reshape(*load.shape[:2], groups, size).sum(axis=3, dtype=np.uint64),
        _add_up_pairs(statistics.transitions, size),
        together,
        **{name: getattr(statistics, name) for name in ("window", "group", "group_names", "model")},
    )


def expand(placement: Placement, experts: int) -> Placement:
    """Return the placement of experts that follows from a placement of their groups.

    Raises
    ------
    ValueError
        If the groups do not divide the experts.
    """
    instance("placement", placement, Placement)
    size = _compute_group_size(experts, placement.num_experts)
    group = placement.slots[..., None]
    slots = np.where(group == EMPTY, EMPTY, group * size + np.arange(size))
    names: Any = {"model": placement.model, "topology": placement.topology}
    return Placement(slots.reshape(*slots.shape[:2], -1), num_experts=experts, **names)


def forbid(experts: int, groups: int, devices: int) -> list[tuple[None, int, int]]:
    """Return rules for ``Problem`` that keep group after group on the same number of devices.

    Raises
    ------
    ValueError
        If the groups do not divide the experts or the devices.
    """
    size = _compute_group_size(experts, groups)
    whole_number("devices", devices, highest=DEVICE_LIMIT)
    if devices % groups:
        raise ArgumentError(f"groups must divide {devices} devices, got {groups}", "groups")
    per_group = devices // groups
    return [
        (None, expert, device)
        for expert in range(experts)
        for device in range(devices)
        if expert // size != device // per_group
    ]


def count_groups(settings: Mapping[str, Any]) -> int:
    """Count the groups among which a router chooses first; 1 if all experts compete at once."""

    def numbers(names: re.Pattern[str]) -> list[int]:
        named = {name: value for name, value in settings.items() if names.fullmatch(str(name))}
        counts = {k: v for k, v in named.items() if v is not None and not isinstance(v, bool)}
        return [whole_number(f"config's {k}", v, lowest=0) for k, v in counts.items()]

    # Configurations of models without groups say 0 as well.
    groups = max(numbers(GROUPS), default=0) or 1
    is_greedy = settings.get("topk_method") == "greedy"
    return 1 if is_greedy or any(limit >= groups for limit in numbers(LIMIT)) else groups


def check_whole(order: NDArray[np.int64], groups: int, layer: str) -> None:
    """Raise if an order of experts [E] does not keep the router's groups whole.

    The router takes groups by position: with mixed groups it would choose other experts.
    """
    size, rest = divmod(len(order), groups)
    if rest:
        raise ValueError(f"{layer}: {groups} groups must divide {len(order)} experts")
    for run, members in enumerate((order // size).reshape(groups, size) if groups > 1 else ()):
        mixed = sorted(set(members.tolist()))
        if len(mixed) > 1:
            raise ValueError(
                f"{layer}: its router chooses among {groups} groups of {size} experts first, so "
                f"groups must stay whole, but positions {run * size} to {(run + 1) * size - 1} "
                f"would hold experts of groups {mixed}; moetuner.router_groups places them whole"
            )


def count_nodes(groups: int, experts: int, nodes: int, ranks: int) -> int:
    """Return the number of nodes if each is to hold whole router groups, else 1.

    Nodes hold whole groups if their number divides groups and ranks, as in engines' hierarchical
    policies.
    """
    divides = ranks % nodes == 0 and groups % nodes == 0 and experts % groups == 0
    return nodes if divides and groups > 1 else 1


def assign_nodes(
    load: NDArray[np.float64],
    slots: NDArray[np.int32],
    groups: int,
    nodes: int,
    *,
    budget: int,
    dead_zone: float,
    deviations: float,
) -> NDArray[np.int64]:
    """Return the experts of every node [L,N,E/N], in whole groups, equally many on each node.

    A group goes to the node that holds most of its experts, the heaviest group first, and among
    such nodes to the one with the least load. Then pairs of groups are exchanged in layers where
    that relieves the heaviest node, within half the budget.
    """
    layers, ranks, _ = slots.shape
    row, size = np.arange(layers), load.shape[1] // groups
    group_load = load.reshape(layers, groups, size).sum(axis=2)
    node_of_rank = np.arange(ranks) // (ranks // nodes)
    group_of_slot = np.where(slots >= 0, slots // size, groups)
    cell = (row[:, None, None] * (groups + 1) + group_of_slot) * nodes + node_of_rank[:, None]
    copies_on_node = np.bincount(cell.ravel(), minlength=layers * (groups + 1) * nodes)
    copies_on_node = copies_on_node.reshape(layers, groups + 1, nodes)[:, :groups]
    node_of = np.zeros((layers, groups), dtype=np.int64)
    free = np.full((layers, nodes), groups // nodes)
    heavy = np.zeros((layers, nodes))
    for group in np.lexsort((-group_load, -copies_on_node.max(axis=2)), axis=1).T:
        node = np.lexsort((heavy, -copies_on_node[row, group], free == 0), axis=1)[:, 0]
        node_of[row, group] = node
        free[row, node] -= 1
        heavy[row, node] += group_load[row, group]
    remaining = budget // (4 * size)
    for _ in range(GROUP_PAIRS):
        gain, pairs = _find_best_exchange(group_load, node_of, heavy, dead_zone, deviations)
        change = np.argsort(-gain, kind="stable")[:remaining]
        change = change[gain[change] > 0]
        if not change.size:
            break
        remaining -= change.size
        for layer in change:
            pair = pairs[layer]
            moved = group_load[layer, pair] @ (1, -1)
            heavy[layer, node_of[layer, pair]] += (-moved, moved)
            node_of[layer, pair] = node_of[layer, pair[::-1]]
    order = np.argsort(node_of, axis=1, kind="stable")
    experts: NDArray[np.int64] = order[:, :, None] * size + np.arange(size)
    return experts.reshape(layers, nodes, -1)


def _find_best_exchange(
    group_load: NDArray[np.float64],
    node_of: NDArray[np.int64],
    heavy: NDArray[np.float64],
    dead_zone: float,
    deviations: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the gain of the best exchange of two groups in every layer [L], and its groups [L,2].

    The gain is a share of the heaviest node's load, 0 if it is too small or may be chance.
    """
    layers, groups = group_load.shape
    row, worst = np.arange(layers), heavy.argmax(axis=1)
    before, second = heavy[row, worst], np.sort(heavy, axis=1)[:, -2]
    moved = group_load[:, :, None] - group_load[:, None, :]
    rest = np.maximum(before[:, None, None] - moved, second[:, None, None])
    rest = np.maximum(rest, np.take_along_axis(heavy, node_of, axis=1)[:, None, :] + moved)
    is_on_worst = node_of == worst[:, None]
    rest[~(is_on_worst[:, :, None] & ~is_on_worst[:, None, :])] = np.inf
    best = rest.reshape(layers, -1).argmin(axis=1)
    after = rest.reshape(layers, -1)[row, best]
    chance = deviations * np.sqrt(before + after)
    least = np.maximum(dead_zone / 2 * before, chance)
    gain = np.where(before - after > least, 1 - after / np.maximum(before, 1), 0)
    return gain, np.stack(np.divmod(best, groups), axis=1)


def _compute_group_size(experts: int, groups: int) -> int:
    experts_in(experts, "experts")
    whole_number("groups", groups)
    if experts % groups:
        raise ArgumentError(f"groups must divide {experts} experts, got {groups}", "groups")
    return experts // groups


def _add_up_pairs(table: NDArray[np.uint64] | None, size: int) -> NDArray[np.uint64] | None:
    """Return pairs of experts [..,E,E], added up to pairs of groups."""
    if table is None:
        return None
    groups = table.shape[-1] // size
    blocks = table.reshape(len(table), groups, size, groups, size)
    return np.asarray(blocks.sum(axis=(2, 4), dtype=np.uint64))
