"""Fewest moves at the same objective: devices are renamed, and layers stay as they run.

Equal devices may exchange all that they hold: no figure changes, but more copies stay where they
run.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from moetuner import _core
from moetuner.placement import Placement, find_holders
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.problem.caps import ROUNDING
from moetuner.problem.objective import Objective
from moetuner.solver.arrays import Bools, Integers, Slots
from moetuner.topology import Topology

# Weight of an exchange that a rule or a device's speed or slots forbid: below any sum of experts.
FORBIDDEN = -(1 << 40)


def keep_running(problem: Problem, objective: Objective, running: Placement, slots: Slots) -> Slots:
    """Return slots [L,D,S] that are as good as those given, with as few moves as possible.

    Devices are renamed, and a layer that is no better than the running one stays as it runs.
    """
    wanted, current = (pad_slots(array, problem.capacity) for array in (slots, running.slots))
    renamed = rename_devices(problem, running.held, wanted)
    if not objective.is_sum_of_layers:
        return renamed
    choices = [renamed] if current.shape != wanted.shape else [renamed, current]
    placements = [Placement(array, num_experts=problem.num_experts) for array in [wanted, *choices]]
    wanted_cost, *costs = (objective.layer_costs(placement) for placement in placements)
    wanted_excess, *excesses = (problem.caps.excess(placement) for placement in placements)
    result = wanted.copy()
    # The running slots come last, so that they stay wherever they are as good.
    for choice, cost, excess in zip(choices, costs, excesses, strict=True):
        is_as_good = (cost <= wanted_cost * (1 + ROUNDING)).all(axis=1) & (excess <= wanted_excess)
        if choice is current:
            is_as_good &= problem.layers_that_keep_rules(running)
        result[is_as_good] = choice[is_as_good]
    return result


def rename_devices(problem: Problem, running: Bools, slots: Slots) -> Slots:
    """Return slots [L,D,S] with devices renamed so that the fewest copies move.

    The contents of a device go to a device that is as fast, has enough slots, and may hold them.
    Devices of one node go to one node, and so on for larger tiers. Each layer is renamed by itself,
    but all layers alike where tokens follow from layer to layer.

    Parameters
    ----------
    problem
        The problem that the slots solve.
    running
        True where a device of the running placement holds an expert [L,D,E].
    slots
        Expert ids [L,D,S], experts first, as ``pad_slots`` has them.
    """
    if not _is_tiered(problem.topology):
        return slots
    layers, devices, _ = slots.shape
    holders = find_holders(slots, problem.num_experts)
    staying = np.matmul(holders.astype(np.float32), running.transpose(0, 2, 1).astype(np.float32))
    weight = staying.astype(np.int64) * (devices + 1)
    weight[~_may_take(problem, holders)] = FORBIDDEN
    if problem.serving.way.joins_layers:
        weight = np.maximum(weight.sum(axis=0, keepdims=True), FORBIDDEN)
    # Among renamings that keep equally many copies, the one that renames the fewest devices.
    weight = weight + np.eye(devices, dtype=np.int64)
    topology, sizes = problem.topology, [level.devices for level in problem.topology.levels]
    if not topology.has_equal_nodes:  # these do not change places
        node, sizes = topology.node_of_device, [devices]
        weight[:, node[:, None] != node] = FORBIDDEN
    names, total = _match(weight, sizes)
    names = np.broadcast_to(names, (layers, devices)).copy()
    names[np.broadcast_to(total < 0, layers)] = np.arange(devices)
    renamed = np.empty_like(slots)
    np.put_along_axis(renamed, names[:, :, None], slots, axis=1)
    return renamed


def _is_tiered(topology: Topology) -> bool:
    """Return whether links cost the same wherever they are of one tier."""
    if topology.devices < 2:
        return False
    cost, tier = topology.cost, topology.tier
    return topology.link_cost is None or all(
        len(np.unique(cost[tier == level])) < 2 for level in range(1, len(topology.levels) + 1)
    )


def _may_take(problem: Problem, holders: Bools) -> Bools:
    """Return whether the contents of a device [L,D,E] may be on another device [L,D,D]."""
    speed, rules = problem.topology.speed_of_device, problem.rules
    may: Bools = holders.sum(axis=2)[:, :, None] <= problem.capacity[:, None, :]
    may &= speed[:, None] == speed
    holds, lacks = holders.astype(np.float32), (~holders).astype(np.float32)
    if rules.forbidden is not None:
        may &= np.matmul(holds, rules.forbidden.astype(np.float32)) == 0
    if rules.pinned is not None:
        may &= np.matmul(lacks, rules.pinned.astype(np.float32)) == 0
    return may


def _match(weight: Integers, sizes: list[int]) -> tuple[Integers, Integers]:
    """Return names of devices [B,D] of the largest sum of weights [B,D,D], and that sum [B].

    Devices of a group stay in one group, of every size. The smallest groups come first: each pair
    of groups is matched by itself, and the sum of that matching is its weight for larger groups.
    """
    count, devices, _ = weight.shape
    # Where the members of a group go [B,G,H,n], if it goes to another one: a device to that device.
    names = np.broadcast_to(np.arange(devices)[:, None], (count, devices, devices, 1))
    for size, larger in pairwise([1, *sizes]):
        ratio, groups = larger // size, devices // larger
        # Weights of the parts of every pair of groups [B,G,H,n,n].
        parts = weight.reshape(count, groups, ratio, groups, ratio).transpose(0, 1, 3, 2, 4)
        flat = np.ascontiguousarray(parts.reshape(-1, ratio, ratio))
        column = _core.match_best(flat).reshape(count, groups, groups, ratio)
        weight = np.take_along_axis(parts, column[..., None], axis=4)[..., 0].sum(axis=3)
        weight = np.maximum(weight, FORBIDDEN)
        batch, group, other, member = np.indices(column.shape)
        chosen = names[batch, group * ratio + member, other * ratio + column]
        names = chosen.reshape(count, groups, groups, larger)
    return names[:, 0, 0], weight[:, 0, 0]
