"""As few moves as can be at the same worth: devices renamed, and layers left as they run.

Devices that are alike may exchange all that they hold: no figure changes, but more of what runs
stays where it is.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import Placement, find_holders
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.problem.caps import ROUNDING
from moetuner.problem.objective import Objective
from moetuner.topology import Topology

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Slots = NDArray[np.int32]
# Weight of an exchange that a rule or a device's speed or slots forbid: below any sum of experts.
FORBIDDEN = -(1 << 40)


def keep_running(problem: Problem, objective: Objective, running: Placement, slots: Slots) -> Slots:
    """Return slots [L,D,S] of the same worth of which as much as can be runs already.

    Devices are renamed, and a layer that is worth no more than what runs there stays as it is.
    """
    found, stays = (pad_slots(each, problem.capacity) for each in (slots, running.slots))
    renamed = rename_devices(problem, running.held, found)
    if not objective.is_sum_of_layers:
        return renamed
    choices = [renamed] if stays.shape != found.shape else [renamed, stays]
    placements = [Placement(each, num_experts=problem.experts) for each in [found, *choices]]
    costs, *others = (objective.layer_costs(each) for each in placements)
    excess, *excesses = (problem.caps.excess(each) for each in placements)
    kept = found.copy()
    # What runs comes last, so that it stays wherever it is as good.
    for choice, cost, over in zip(choices, others, excesses, strict=True):
        is_as_good = (cost <= costs * (1 + ROUNDING)).all(axis=1) & (over <= excess)
        if choice is stays:
            is_as_good &= problem.layers_that_keep_rules(running)
        kept[is_as_good] = choice[is_as_good]
    return kept


def rename_devices(problem: Problem, running: NDArray[np.bool_], slots: Slots) -> Slots:
    """Return slots [L,D,S] with devices renamed so that the fewest copies move.

    What a device holds goes to a device that is as fast, has slots for it, may hold it, and has the
    same neighbours: devices of one node go to one node, and so on for larger tiers. Each layer has
    names of its own, but all layers the same ones where tokens follow from layer to layer.

    Parameters
    ----------
    problem
        What is placed.
    running
        Whether a device holds an expert in what runs [L,D,E].
    slots
        Expert ids [L,D,S], experts first, as ``pad_slots`` has them.
    """
    if not _is_tiered(problem.topology):
        return slots
    layers, devices, _ = slots.shape
    holders = find_holders(slots, problem.experts)
    kept = np.matmul(holders.astype(np.float32), running.transpose(0, 2, 1).astype(np.float32))
    weight = kept.astype(np.int64) * (devices + 1)
    weight[~_may_take(problem, holders)] = FORBIDDEN
    if problem.regime == "follow":
        weight = np.maximum(weight.sum(axis=0, keepdims=True), FORBIDDEN)
    # Of names that keep equally much, those that change least.
    weight = weight + np.eye(devices, dtype=np.int64)
    names, total = _match(weight, [level.devices for level in problem.topology.levels])
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


def _may_take(problem: Problem, holders: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether what a device holds [L,D,E] may be on another device [L,D,D]."""
    speed, rules = problem.topology.speed_of_device, problem.rules
    may: NDArray[np.bool_] = holders.sum(axis=2)[:, :, None] <= problem.capacity[:, None, :]
    may &= speed[:, None] == speed
    held, lacks = holders.astype(np.float32), (~holders).astype(np.float32)
    if rules.forbidden is not None:
        may &= np.matmul(held, rules.forbidden.astype(np.float32)) == 0
    if rules.pinned is not None:
        may &= np.matmul(lacks, rules.pinned.astype(np.float32)) == 0
    return may


def _match(weight: Integers, sizes: list[int]) -> tuple[Integers, Integers]:
    """Return names of devices [B,D] of the largest sum of weights [B,D,D], and that sum [B].

    Devices of a group stay in one group, of every size. From the smallest groups on, each pair of
    groups is matched by itself, and then stands for what it comes to.
    """
    count, devices, _ = weight.shape
    # Where the members of a group go [B,G,H,n], if it goes to another one: a device to that device.
    names = np.broadcast_to(np.arange(devices)[:, None], (count, devices, devices, 1))
    for size, larger in pairwise([1, *sizes]):
        ratio, groups = larger // size, devices // larger
        # Of every pair of groups the weights of their parts [B,G,H,n,n].
        parts = weight.reshape(count, groups, ratio, groups, ratio).transpose(0, 1, 3, 2, 4)
        flat = np.ascontiguousarray(parts.reshape(-1, ratio, ratio))
        column = _core.match_best(flat).reshape(count, groups, groups, ratio)
        weight = np.take_along_axis(parts, column[..., None], axis=4)[..., 0].sum(axis=3)
        weight = np.maximum(weight, FORBIDDEN)
        batch, here, there, part = np.indices(column.shape)
        chosen = names[batch, here * ratio + part, there * ratio + column]
        names = chosen.reshape(count, groups, groups, larger)
    return names[:, 0, 0], weight[:, 0, 0]
