"""What it costs to leave a running placement, where it may start from, and steps away from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]


@dataclass(frozen=True)
class Path:
    """Steps from one placement to better ones.

    Parameters
    ----------
    start
        Slots [L,D,S].
    places, experts
        Where in the flat slots a step writes and what, twice [N,2].
    moved
        Copies brought in all, at the start and after every step [N+1].
    excess
        By what part layers exceed their caps, likewise.
    value
        The objective, as the search counts it, less that of the start, likewise.
    """

    start: Slots
    places: NDArray[np.int64]
    experts: Slots
    moved: NDArray[np.int64]
    excess: Floats
    value: Floats

    def after(self, steps: int) -> Slots:
        """Return slots [L,D,S] after so many steps."""
        slots = self.start.copy()
        slots.reshape(-1)[self.places[:steps].ravel()] = self.experts[:steps].ravel()
        return slots

    def lengths(self, most: float, price: float, count: int) -> list[int]:
        """Choose numbers of steps that are worth a look: the best, then some up to the most."""
        last = len(np.flatnonzero(self.moved[1:] <= most))
        evenly = np.linspace(0, last, count + 1)[1:].astype(int)
        return [n for n in dict.fromkeys([self.best(most, price), *evenly.tolist()]) if n]

    def spread(self, count: int) -> list[int]:
        """Choose numbers of steps whose moves are about evenly spread in their logarithm."""
        if len(self.moved) < 2:
            return []
        brought = self.moved - self.moved[0]
        wanted = np.geomspace(1, max(int(brought.max()), 2), count)
        ends = {int(np.flatnonzero(brought <= moves)[-1]) for moves in wanted}
        return sorted(ends | {self.best(np.inf, 0.0)} - {0})

    def slope(self, most: float) -> float:
        """Return what the last steps within a budget gain for a move."""
        end = self.best(most, 0.0)
        begin = end * 3 // 4
        moves = self.moved[end] - self.moved[begin]
        return float(self.value[begin] - self.value[end]) / max(int(moves), 1)

    def best(self, most: float, price: float) -> int:
        """Choose how many steps to take, with at most so many moves at such a price."""
        allowed = np.flatnonzero(self.moved <= most)
        if not allowed.size:
            return 0
        worth = self.value[allowed] + price * self.moved[allowed]
        return int(allowed[np.lexsort((worth, self.excess[allowed]))[0]])


def widened(problem: Problem, slots: Slots) -> Slots:
    """Widen slots [L,D,S] to the problem's, which hold them; what is in them moves down."""
    wide = problem.empty_slots()
    width = min(slots.shape[2], problem.slots)
    # Full slots first: a device may have fewer than these are wide.
    order = np.argsort(slots == EMPTY, axis=2, kind="stable")
    wide[:, :, :width] = np.take_along_axis(slots, order, axis=2)[:, :, :width]
    return wide


def lawful(problem: Problem, initial: Placement) -> Slots:
    """Find slots [L,D,S] that keep the rules, to which the fewest copies have to be brought.

    Full ones, where all are to be full.

    An expert without pins needs one device, which costs a move if it does not hold the expert yet:
    in a layer that breaks a rule that is a flow of least cost. What else is held stays where there
    is room.
    """
    slots = widened(problem, initial.slots)
    rules = problem.rules
    for layer, held in enumerate(initial.held):
        pinned = np.zeros_like(held) if rules.pinned is None else rules.pinned[layer].T
        banned = np.zeros_like(held) if rules.forbidden is None else rules.forbidden[layer].T
        if not (pinned & ~held | banned & held).any():
            continue
        room = problem.capacity[layer] - pinned.sum(axis=1)
        holds = pinned.copy()
        others = np.flatnonzero(~pinned.any(axis=0))
        cost = np.where(banned, np.inf, np.where(held, 0.0, 1.0))
        device_of = _assigned(cost[:, others], room)
        holds[device_of, others] = True
        for device in range(problem.devices):
            more = np.flatnonzero(held[device] & ~banned[device] & ~holds[device])
            if problem.may_copy:
                holds[device, more[: problem.capacity[layer, device] - holds[device].sum()]] = True
            mine = np.flatnonzero(holds[device])
            slots[layer, device] = EMPTY
            slots[layer, device, : len(mine)] = mine
    return problem.filled(slots, initial)


def _assigned(cost: Floats, room: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return devices of experts [E], with so much room [D], at the least cost [D,E].

    Experts that cost nothing somewhere take their places first; each that is left goes the
    cheapest way, on which others may have to move on (Ford and Fulkerson, 1962).
    """
    devices, experts = cost.shape
    device_of = np.full(experts, -1, dtype=np.int64)
    left = room.copy()
    for expert in range(experts):
        free = np.flatnonzero((cost[:, expert] == 0) & (left > 0))
        if free.size:
            device_of[expert] = free[0]
            left[free[0]] -= 1
    for expert in np.flatnonzero(device_of < 0).tolist():
        # Least cost of handing an expert on from one device to another, and which expert [D,D].
        onward = np.full((devices, devices), np.inf)
        handed = np.zeros((devices, devices), dtype=np.int64)
        for device in range(devices):
            mine = np.flatnonzero(device_of == device)
            if mine.size:
                change = cost[:, mine] - cost[device, mine]
                handed[device] = mine[change.argmin(axis=1)]
                onward[device] = change.min(axis=1)
        least, via = cost[:, expert].copy(), np.full(devices, -1)
        for _ in range(devices):
            through = least[:, None] + onward
            nearest = through.argmin(axis=0)
            shorter = through[nearest, np.arange(devices)] < least
            if not shorter.any():
                break
            least = np.where(shorter, through[nearest, np.arange(devices)], least)
            via = np.where(shorter, nearest, via)
        at = int(np.where(left > 0, least, np.inf).argmin())
        left[at] -= 1
        while via[at] >= 0:
            origin = int(via[at])
            device_of[handed[origin, at]] = at
            at = origin
        device_of[expert] = at
    return device_of
