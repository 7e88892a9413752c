"""The nearest placement that keeps the rules: of what runs as much as can be stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement, find_holders, moves_from
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.solver.terms import core_layers, make_site

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Slots = NDArray[np.int32]


def repair(problem: Problem, initial: Placement) -> Slots:
    """Return slots [L,D,S] that keep the rules, to which the fewest copies have to move.

    They are full where all slots are to be full. Copies go where they balance loads, if no more of
    them have to move then; what else runs stays where there are slots.

    Raises
    ------
    ValueError
        If the rules leave an expert no slot.
    """
    running, rules = initial.held, problem.rules
    slots = pad_slots(initial.slots, problem.capacity)
    broken = [layer for layer, held in enumerate(running) if rules.are_broken(layer, held)]
    if not broken:
        return problem.filled(slots, initial)
    nearest, start = slots.copy(), slots
    for layer in broken:
        pinned, banned = _rules_of(problem, layer)
        holds = _assign(problem, layer, running[layer])
        for table, held in ((nearest, holds), (start, holds & (running[layer] | pinned))):
            experts = held.copy()
            if problem.may_copy:
                _keep_copies(problem, layer, experts, running[layer] & ~banned)
            table[layer] = EMPTY
            for device, ids in enumerate(map(np.flatnonzero, experts)):
                table[layer, device, : len(ids)] = ids
    balanced = _complete(problem, start)
    nearest, balanced = (problem.filled(each, initial) for each in (nearest, balanced))
    is_as_near = moves_from(running, balanced) <= moves_from(running, nearest)
    for layer, held in enumerate(find_holders(balanced, problem.experts)):
        is_as_near[layer] &= bool(held.any(axis=0).all()) and not rules.are_broken(layer, held)
    return np.where(is_as_near[:, None, None], balanced, nearest)


def _rules_of(problem: Problem, layer: int) -> tuple[Bools, Bools]:
    """Return where experts of a layer are pinned, and where they are forbidden [D,E]."""
    shape = (problem.devices, problem.experts)
    rules = (problem.rules.pinned, problem.rules.forbidden)
    pinned, banned = (np.zeros(shape, bool) if rule is None else rule[layer].T for rule in rules)
    return pinned, banned


def _complete(problem: Problem, start: Slots) -> Slots:
    """Give experts of slots [L,D,S] the copies that they lack, so that loads are balanced."""
    windows = problem.windows.searched
    layers = core_layers(windows.load, windows.weight, make_site(problem))
    return layers.complete(np.ascontiguousarray(start))


def _keep_copies(problem: Problem, layer: int, holds: Bools, stays: Bools) -> None:
    """Let copies that run on devices [D,E] stay beside others that these hold, if there are slots.

    Those go whose experts' other copies get least by that.
    """
    copies, load = (holds | stays).sum(axis=0), problem.load[layer].astype(np.float64)
    for device, slots in enumerate(problem.capacity[layer].tolist()):
        others = stays[device] & ~holds[device]
        for _ in range(int(others.sum() + holds[device].sum()) - slots):
            rise = load / np.maximum(copies * (copies - 1), 1)
            expert = int(np.where(others, rise, np.inf).argmin())
            others[expert] = False
            copies[expert] -= 1
        holds[device] |= others


def _assign(problem: Problem, layer: int, running: Bools) -> Bools:
    """Return which devices are to hold which experts of a layer [D,E], by a flow of least cost.

    An expert needs a device or, to survive a loss, devices in two failure domains, those of its
    pins among them. A device that does not hold it yet costs a move.
    """
    (pinned, banned), capacity = _rules_of(problem, layer), problem.capacity[layer]
    domain, wanted = np.zeros(problem.devices, dtype=np.int64), 1
    if problem.rules.domain is not None:
        domain, wanted = problem.rules.domain, 2
    stays, barred = pinned | (running & ~banned), pinned | banned
    # What is brought to slots that are to be full, and would be empty, costs nothing more.
    gaps = np.maximum(capacity - stays.sum(axis=1), 0) * problem.fill_slots
    # Every device twice: its other slots, and its gaps.
    flow = _Flow(
        cost=np.concatenate(
            [np.where(barred, np.inf, ~stays), np.where(barred | stays, np.inf, 0.0)]
        ),
        left=np.concatenate([capacity - pinned.sum(axis=1) - gaps, gaps]),
        domain=np.tile(domain, 2),
        served=np.stack([pinned[domain == one].any(axis=0) for one in range(domain.max() + 1)]),
        holds=np.zeros((2 * problem.devices, problem.experts), dtype=bool),
    )
    lacking = flow.serve(np.maximum(wanted - flow.served.sum(axis=0), 0))
    if lacking is not None:
        raise ValueError(
            f"layer {layer}: no slot is left for expert {lacking}; it needs more slots, fewer pins "
            "or fewer forbidden devices"
        )
    holds: Bools = pinned | flow.holds[: problem.devices] | flow.holds[problem.devices :]
    return holds


@dataclass
class _Flow:
    """Devices of experts at the least cost: a flow that grows by one copy after the other.

    Parameters
    ----------
    cost
        What a copy of an expert on a device costs [D,E]; infinite where it may not be.
    left
        Slots of every device that are free [D].
    domain
        Failure domain of every device [D].
    served
        Whether an expert has a copy in a failure domain, and needs no other there [F,E].
    holds
        Whether a device holds a copy of the flow [D,E].
    """

    cost: Floats
    left: Integers
    domain: Integers
    served: Bools
    holds: Bools

    def serve(self, copies: Integers) -> int | None:
        """Give experts so many copies [E], each in a failure domain of its own.

        Those that cost nothing where a slot is free come first. Return an expert for which there is
        no slot, if there is one.
        """
        wanted = copies.copy()
        for expert in np.flatnonzero(copies).tolist():
            while wanted[expert]:
                costs = self._enter(expert)
                device = self._cheapest(costs)
                if costs[device] or not self.left[device]:
                    break
                self.left[device] -= 1
                self._hold(expert, device, holds=True)
                wanted[expert] -= 1
        for expert in np.flatnonzero(wanted).tolist():
            for _ in range(wanted[expert]):
                if not self._add(expert):
                    return int(expert)
        return None

    def _enter(self, expert: int) -> Floats:
        """Return what a further copy of an expert costs on every device [D]."""
        costs: Floats = np.where(self.served[self.domain, expert], np.inf, self.cost[:, expert])
        return costs

    def _cheapest(self, costs: Floats) -> int:
        """Return the device with a free slot that costs least [D], of several that with most."""
        return int(np.lexsort((-self.left, np.where(self.left > 0, costs, np.inf)))[0])

    def _hold(self, expert: int, device: int, *, holds: bool) -> None:
        self.holds[device, expert] = self.served[self.domain[device], expert] = holds

    def _add(self, expert: int) -> bool:
        """Give an expert a copy the cheapest way, on which others may have to move on.

        That is a shortest path of the flow (Ford and Fulkerson, 1962); whether there is one. To
        move on what a full device holds costs nothing at least, or it would be elsewhere already.
        """
        costs, via = self._enter(expert), np.full(len(self.left), -1)
        device = self._cheapest(costs)
        if not self.left[device] or costs[device] > costs.min():
            costs, via = self._move_on(costs)
            device = self._cheapest(costs)
        if not (self.left[device] and np.isfinite(costs[device])):
            return False
        self.left[device] -= 1
        source, moved = np.nonzero(self.holds)
        path = []
        while (copy := via[device]) >= 0:
            path.append((int(moved[copy]), int(source[copy]), device))
            device = int(source[copy])
        for other, here, _ in path:
            self._hold(other, here, holds=False)
        for other, _, there in path:
            self._hold(other, there, holds=True)
        self._hold(expert, device, holds=True)
        return True

    def _move_on(self, costs: Floats) -> tuple[Floats, Integers]:
        """Return the least costs to reach devices [D], and which copy moves on there; -1 for none.

        Copies are numbered in the order of devices and experts (Bellman, 1958).
        """
        source, moved = np.nonzero(self.holds)
        # A copy stays in its domain, or goes to one in which its expert has none.
        beside = self.domain[:, None] == self.domain[source]
        may = beside | ~self.served[self.domain][:, moved]
        change = np.where(may, self.cost[:, moved] - self.cost[source, moved], np.inf)
        devices, via = np.arange(len(costs)), np.full(len(costs), -1)
        while len(source):
            through = costs[source] + change
            copy = through.argmin(axis=1)
            is_shorter = through[devices, copy] < costs
            if not is_shorter.any():
                break
            costs = np.where(is_shorter, through[devices, copy], costs)
            via = np.where(is_shorter, copy, via)
        return costs, via
