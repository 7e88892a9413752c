"""Small problems of balance or time: every placement, less those that cannot be the best.

Risk, the worst group and predicted times do not add up, as a search needs it. But an outcome never
falls when a window's sum over layers rises. So layers are joined one after the other, and what
cannot end below the best known placement is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import expected
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.caps import slowest
from moetuner.problem.objective import Objective
from moetuner.problem.windows import MOST
from moetuner.solver import effort
from moetuner.solver.result import Clock, Limits, MoveCost
from moetuner.statistics import ExpertSets

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]
Flags = NDArray[np.bool_]

# Sums that are held at once, and those among which the dominated ones are looked for.
AT_ONCE, COMPARED = 1_000_000, 2_000
# Sums of floats may be off by this part.
ROUNDING = 1e-9


@dataclass(frozen=True)
class _Counted:
    """Counts of contents as if they were layers: together more than statistics may have."""

    total_load: NDArray[np.uint64]
    transitions: NDArray[np.uint64] | None = None
    sets: tuple[ExpertSets, ...] | None = None

    @property
    def set_load(self) -> NDArray[np.uint64]:
        """Load by the sets."""
        return self.total_load


def enumerated(
    problem: Problem,
    known: float,
    *,
    caps: Floats | None = None,
    moving: MoveCost | None = None,
    most: float = np.inf,
    clock: Clock | None = None,
) -> Slots | None:
    """Find the best slots [L,D,S] of a small problem; of shape [0,D,S] if none beat what is known.

    Parameters
    ----------
    problem
        Its objective is balance or time.
    known
        Value of the best placement that is known, with the price of getting there.
    caps
        Largest load over speed of a device, in the sum of all windows [L]. Where no content keeps
        one, the least that some content keeps.
    moving
        What changes cost.
    most
        Copies that may be brought.
    clock
        When to give up.

    Returns
    -------
    ndarray or None
        None where there are too many placements to try, or time is over.
    """
    contents = []
    clock = clock or Clock(Limits())
    for layer in range(problem.layers):
        if clock.is_over():
            return None
        each = contents_of(problem, layer, None if moving is None else moving.initial.held[layer])
        if each is None:
            return None
        if caps is not None:
            peak = peaks_of(problem, layer, each)
            each = each[peak <= max(caps[layer], peak.min()) * (1 + ROUNDING)]
        if len(each) > _fewer(problem, effort.MOST_CONTENTS):
            return None
        contents.append(each)
    tables = _tables(problem, contents, clock)
    if tables is None:
        return None
    if moving is not None:
        for table, slots, held in zip(tables, contents, moving.initial.held, strict=True):
            table[:, :, -1] = (_placement(problem, slots).held & ~held).sum(axis=(1, 2))
    price = 0.0 if moving is None else moving.price
    path = _best(problem, tables, known * (1 - ROUNDING), price, most, clock)
    if path is None:
        return None
    found = [slots[at] for slots, at in zip(contents, path, strict=False)]
    return np.array(found, dtype=np.int32).reshape(-1, problem.devices, problem.slots)


def _fewer(problem: Problem, most: int) -> int:
    """Return how many there may be where windows, which each of them has, are many."""
    return most * MOST // max(len(problem.windows), MOST)


def eased(problem: Problem, slots: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Return slots [L,D,S] that exceed caps less; None if there are none, or too many to try."""
    before = problem.caps.excess(Placement(slots, num_experts=problem.experts))
    found = slots.copy()
    for layer in np.flatnonzero(before).tolist():
        contents = contents_of(problem, layer)
        if contents is not None:
            found[layer] = contents[peaks_of(problem, layer, contents).argmin()]
    after = problem.caps.excess(Placement(found, num_experts=problem.experts))
    return found if after.sum() < before.sum() else None


def fewest_visits(
    problem: Problem, caps: Floats | None, clock: Clock | None = None
) -> Slots | None:
    """Find the slots [L,D,S] whose devices and nodes tokens visit least.

    None if these are too many to try, or time is over.

    Layers are independent of each other. Where no content keeps a layer's cap (as in `enumerated`)
    those that exceed it least compete.
    """
    assert problem.statistics.sets is not None
    price = Objective(problem).visit_costs
    best, left = problem.empty_slots(), effort.MOST_CONTENTS
    clock = clock or Clock(Limits())
    for layer, sets in enumerate(problem.statistics.sets):
        if clock.is_over():
            return None
        contents = contents_of(problem, layer)
        left -= 0 if contents is None else len(contents)
        if contents is None or left < 0:
            return None
        if caps is not None:
            peak = peaks_of(problem, layer, contents)
            contents = contents[peak <= max(caps[layer], peak.min()) * (1 + ROUNDING)]
        cost = np.empty(len(contents))
        step = max(AT_ONCE // max(sets.ids.size, 1), 1)
        for at in range(0, len(contents), step):
            if clock.is_over():
                return None
            placement = _placement(problem, contents[at : at + step])
            layers = (sets,) * placement.layers
            visits = expected.visits(placement, problem.topology, problem.split, layers)
            cost[at : at + step] = sum(
                each * of.sum(axis=1) for each, of in zip(price, visits, strict=True)
            )
        best[layer] = contents[np.argmin(cost)]
    return best


def contents_of(problem: Problem, layer: int, running: Flags | None = None) -> Slots | None:
    """List every content [N,D,S] of a layer that keeps the rules; None if there are too many.

    Of contents that differ by an exchange of devices that are alike there is one, unless layers are
    joined, a hash chooses between copies in the order of devices, or they differ in what they hold
    of the placement that is running [D,E].
    """
    experts, rooms, rules = problem.experts, problem.capacity[layer], problem.rules
    if experts > effort.MOST_EXPERTS:
        return None
    every = np.arange(1 << experts)
    bits = (every[:, None] >> np.arange(experts) & 1).astype(bool)
    count = bits.sum(axis=1)
    hashed = problem.may_copy and problem.split == "even" and Objective(problem).sets is not None
    twin = {} if hashed or _is_joined(problem) else _twins(problem, layer, running)
    held, union = np.zeros((1, 0), dtype=np.int64), np.zeros(1, dtype=np.int64)
    for device, room in enumerate(rooms):
        fits = count == room if problem.fill_slots else count <= room
        if rules.pinned is not None:
            fits &= bits[:, rules.pinned[layer, :, device]].all(axis=1)
        if rules.forbidden is not None:
            fits &= ~bits[:, rules.forbidden[layer, :, device]].any(axis=1)
        choice = every[fits]
        if len(held) * len(choice) > AT_ONCE:
            return None
        before = np.repeat(np.arange(len(held)), len(choice))
        mine = np.tile(choice, len(held))
        both = union[before] | mine
        # What is left must find room on the devices to come.
        kept = experts - count[both] <= rooms[device + 1 :].sum()
        if not problem.may_copy:
            kept &= union[before] & mine == 0
        if device in twin:
            kept &= held[before, twin[device]] <= mine
        held, union = np.column_stack([held[before], mine])[kept], both[kept]
    if len(held) > effort.MOST_CONTENTS:
        return None
    holds = bits[held]
    order = np.argsort(~holds, axis=2, kind="stable")[:, :, : problem.slots]
    slots = np.full((*holds.shape[:2], problem.slots), EMPTY, dtype=np.int32)
    slots[:, :, : order.shape[2]] = np.where(np.take_along_axis(holds, order, axis=2), order, EMPTY)
    return slots


def _twins(problem: Problem, layer: int, running: Flags | None) -> dict[int, int]:
    """Return for a device the last one before it that nothing sets apart from it, if any."""
    rules, topology = problem.rules, problem.topology
    tables = [
        None if rules.pinned is None else rules.pinned[layer].T,
        None if rules.forbidden is None else rules.forbidden[layer].T,
        running,
    ]
    last: dict[object, int] = {}
    twins = {}
    for device in range(problem.devices):
        alike = (
            problem.capacity[layer, device],
            topology.speed_of_device[device],
            topology.node_of_device[device],
            *(b"" if table is None else table[device].tobytes() for table in tables),
        )
        if alike in last:
            twins[device] = last[alike]
        last[alike] = device
    return twins


def peaks_of(problem: Problem, layer: int, contents: Slots) -> Floats:
    """Compute the largest load over speed of a device with each content [N], over all windows."""
    total = np.tile(problem.load[layer].astype(np.float64), (1, len(contents), 1))
    peaks: Floats = slowest(_placement(problem, contents), total, problem.topology, problem.split)[
        0
    ]
    return peaks


def _tables(problem: Problem, contents: list[Slots], clock: Clock) -> list[Floats] | None:
    """Return what every content of a layer adds to windows' sums and to moves [P,N,W+1].

    P are the contents of the layer before, or one where they do not matter. None where these are
    too many, or time is over.
    """
    if not _is_joined(problem):
        tables = []
        for layer, slots in enumerate(contents):
            if clock.is_over():
                return None
            tables.append(_widened(_shares(problem, layer, slots)[None]))
        return tables
    # A layer's time depends on where the next one's experts are.
    tables = [np.zeros((1, len(contents[0]), len(problem.windows.weight) + 1))]
    for layer in range(problem.layers - 1):
        here, there = contents[layer], contents[layer + 1]
        too_many = len(here) * len(there) > _fewer(problem, effort.MOST_PAIRS)
        if clock.is_over() or too_many:
            return None
        tables.append(_widened(_pair_shares(problem, layer, here, there)))
    last = problem.layers - 1
    tables[-1][:, :, :-1] += _shares(problem, last, contents[last])
    return tables


def _is_joined(problem: Problem) -> bool:
    transitions = problem.statistics.transitions
    follows = problem.goal == "time" and problem.regime == "follow"
    return follows and problem.layers > 1 and transitions is not None and bool(transitions.any())


def _widened(shares: Floats) -> Floats:
    return np.pad(shares, ((0, 0), (0, 0), (0, 1)))


def _shares(problem: Problem, layer: int, contents: Slots) -> Floats:
    """Compute shares [N,W] of a layer by itself, of all contents as if they were layers."""
    count, sets = len(contents), problem.statistics.sets
    statistics = _Counted(
        np.tile(problem.load[layer], (count, 1)),
        sets=None if sets is None else (sets[layer],) * count,
    )
    load = np.repeat(problem.windows.of_layers(layer)[:, None], count, axis=1)
    return Objective(problem).window_cost(_placement(problem, contents), statistics, load).T


def _pair_shares(problem: Problem, layer: int, here: Slots, there: Slots) -> Floats:
    """Compute shares [N,M,W] of a layer with all contents of it and of the next, in turns."""
    first, second = len(here), len(there)
    slots = np.empty((2 * first * second, *here.shape[1:]), dtype=np.int32)
    slots[::2], slots[1::2] = np.repeat(here, second, axis=0), np.tile(there, (first, 1, 1))
    transitions = np.zeros((len(slots) - 1, problem.experts, problem.experts), dtype=np.uint64)
    transitions[::2] = problem.statistics.transitions_or_empty[layer]
    pairs = first * second
    statistics = _Counted(np.tile(problem.load[layer : layer + 2], (pairs, 1)), transitions)
    load = np.tile(problem.windows.of_layers(slice(layer, layer + 2)), (1, pairs, 1))
    shares = Objective(problem).window_cost(_placement(problem, slots), statistics, load)
    return shares[:, ::2].T.reshape(first, second, -1)


def _best(
    problem: Problem,
    tables: list[Floats],
    known: float,
    price: float,
    most: float,
    clock: Clock,
) -> NDArray[np.int64] | None:
    """Find contents [L] of the best way through tables; none if it is not below what is known.

    Their last number, at most ``most``, has a price. None where too many are to be tried, or time
    is over.
    """
    reference = Objective(problem).reference

    def values(sums: Floats) -> Floats:
        found = problem.windows.values(sums[..., :-1], reference) + price * sums[..., -1]
        return np.where(sums[..., -1] <= most, found, np.inf)

    least = [table.min(axis=(0, 1)) for table in tables]
    sums, path = np.zeros((1, tables[0].shape[2])), np.zeros((1, 0), dtype=np.int64)
    left = _fewer(problem, effort.MOST_SUMS)
    for number, table in enumerate(tables):
        rest = np.sum(least[number + 1 :], axis=0)
        # Contents that are too dear wherever the others are cheapest.
        cheapest = table.min(axis=0) + np.sum(least[:number], axis=0) + rest
        usable = np.flatnonzero(values(cheapest) < known)
        # Where the next layer's costs do not depend on this one's contents.
        ends = number + 1 == len(tables) or len(tables[number + 1]) == 1
        if len(table) == 1 and ends:
            usable = usable[_undominated(table[0, usable])]
        left -= len(sums) * len(usable)
        if left < 0:
            return None
        if not len(usable):
            return np.zeros(0, dtype=np.int64)
        found, ways, table = [], [], table[:, usable]
        step = max(_fewer(problem, AT_ONCE) // len(usable), 1)
        for at in range(0, len(sums), step):
            if clock.is_over():
                return None
            mine, way = sums[at : at + step], path[at : at + step]
            rise = table[way[:, -1]] if len(table) > 1 else table
            longer = (mine[:, None] + rise).reshape(-1, sums.shape[1])
            kept = np.flatnonzero(values(longer + rest) < known)
            found.append(longer[kept])
            ways.append(np.column_stack([way[kept // len(usable)], usable[kept % len(usable)]]))
        sums, path = np.concatenate(found), np.concatenate(ways)
        if not len(sums):
            return np.zeros(0, dtype=np.int64)
        if ends:
            few = _undominated(sums)
            sums, path = sums[few], path[few]
    best: NDArray[np.int64] = path[values(sums).argmin()]
    return best


def _undominated(rows: Floats) -> NDArray[np.int64]:
    """Find the rows [n,W] that no other one is at most in all columns; all where they are many."""
    _, first = np.unique(rows, axis=0, return_index=True)
    if len(first) > COMPARED:
        return np.sort(first)
    of = rows[first]
    below = np.zeros(len(first), dtype=bool)
    for row in of:
        below |= (row <= of).all(axis=1) & (row < of).any(axis=1)
    return np.sort(first[~below])


def _placement(problem: Problem, slots: Slots) -> Placement:
    return Placement(slots, num_experts=problem.experts)
