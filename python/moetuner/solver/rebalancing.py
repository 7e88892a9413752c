"""rebalance(): from running slots to better ones on live loads, by few moves and bounded work.

One set of rules for all who rebalance while a model serves: the plugins of engines and the
rebalancer of expert-parallel layers.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import keep_slots
from moetuner.solver import effort
from moetuner.solver.search.level import level

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Largest share of what packing a model anew would bring to other devices that one decision brings,
# if nobody says more, and copies for every device that are never too many, in a small model.
LARGEST_MOVE, FEW = 0.19, 8
# Smallest share of the slowest device's time that is worth moving a layer's experts.
DEAD_ZONE = 0.005
# Standard deviations of a count within which a gain is taken for chance.
DEVIATIONS = 2.0
# Layers by which the memory for windows is chosen, and what a longer one may forecast worse.
MEMORY_LAYERS, LONGER = 8, 0.25
# Counts of pairs are whole numbers in the core: what one is cut into.
PARTS = 1024


def largest_move(layers: int, slots: int, devices: int) -> int:
    """Return how many copies one decision brings at most, if nobody says more.

    Of a layer's slots that are packed anew, one for each device has by chance what it had before.
    """
    anew = layers * slots * (devices - 1) / devices
    return max(math.ceil(LARGEST_MOVE * anew), FEW * devices)


@dataclass(frozen=True)
class Rebalanced:
    """What became of running slots.

    Parameters
    ----------
    slots
        Expert ids [L,D,S]; -1 where a device holds all experts that it may already.
    before, after
        Tokens of the slowest device of every layer [L], over all windows, and what pairs cost.
    brought
        Copies of every layer that come to a device [L].
    """

    slots: Slots
    before: Floats
    after: Floats
    brought: NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Co-activated pairs of an offline profile [L,E,E], and what one costs, in tokens [L].

    That is, of a pair whose experts are not on one device; a pair stands for its part of a visit.
    """

    counts: NDArray[np.uint64]
    cost: Floats


def rebalance(
    windows: Floats,
    slots: Slots,
    *,
    time: Floats,
    budget: int,
    dead_zone: float = DEAD_ZONE,
    deviations: float = DEVIATIONS,
    pairs: Pairs | None = None,
    full: bool = True,
    price: float = 0.0,
) -> Rebalanced:
    """Relieve the slowest devices of running slots by few copies that come to a device.

    The answer is a function of the arguments alone. The work is bounded by steps and trials, not
    by time; it runs in the calling thread, without the interpreter's lock.

    Parameters
    ----------
    windows
        Tokens [L,E], or in windows [W,L,E], the last one last: finite, at least 0. Of windows as
        many of the last ones count as forecast the next best.
    slots
        Experts [L,D,S], -1 where a slot is empty. Experts that have no slot get one and empty slots
        may be filled, whatever they bring. What stays on a device keeps its slot.
    time
        Time of every device per token, as a share of the slowest one's [D].
    budget
        Copies that are brought at most, where they gain most.
    dead_zone
        A layer stays unless its slowest device gains more than this share of its time.
    deviations
        And more than so many standard deviations of counts as large, which are by chance.
    pairs
        What else counts, besides load.
    full
        Whether empty slots are filled; on one load alone they may stay.
    price
        Tokens that a copy must gain at least, on one load.
    """
    load = windows[None] if windows.ndim == 2 else recent(windows)

    def relieved() -> Rebalanced:
        return _relieved(
            load.sum(axis=0),
            slots,
            time,
            budget,
            dead_zone,
            deviations,
            full=full,
            price=price,
        )

    if len(load) == 1 and pairs is None:
        return relieved()
    if not slots.size:
        raise ValueError(f"no slots in a layer: {list(slots.shape)}")
    search = _Search(np.ascontiguousarray(load), slots, time, pairs)
    if not search.held.any():
        found = search.run(None)
        cost = search.cost(found)
        return Rebalanced(found, cost, cost, _brought(search.held, found))
    return _budgeted(search, relieved(), budget, dead_zone, deviations)


def recent(windows: Floats) -> Floats:
    """Return as many of the last windows [W,L,E] as forecast the windows seen best.

    Each window of the later half is forecast by the mean of so many windows before it, as far as
    there are any; of memories that are nearly as good the longest one is taken.
    """
    count = len(windows)
    if count < 3:
        return windows
    some = windows[:, :: -(-windows.shape[1] // MEMORY_LAYERS)]
    share = some / np.maximum(some.sum(axis=2, keepdims=True), 1e-300)
    share = share.reshape(count, -1)
    before = np.concatenate([np.zeros((1, share.shape[1])), share.cumsum(axis=0)])
    at = np.arange(count // 2 + count % 2, count)
    memories = [count]
    while memories[-1] > 1:
        memories.append(memories[-1] // 2)
    errors = []
    for memory in memories:
        first = np.maximum(at - memory, 0)
        forecast = (before[at] - before[first]) / (at - first)[:, None]
        errors.append(float(((share[at] - forecast) ** 2).sum()))
    good = [error <= min(errors) * (1 + LONGER) for error in errors]
    return windows[-memories[good.index(True)] :]


def _relieved(
    load: Floats,
    slots: Slots,
    time: Floats,
    budget: int,
    dead_zone: float,
    deviations: float,
    *,
    full: bool = True,
    price: float = 0.0,
    steps: int = effort.ADAPT_STEPS,
) -> Rebalanced:
    """Relieve devices on one load [L,E], by the core's steps."""
    found, before, after, brought = _core.adapt_slots(
        np.ascontiguousarray(load),
        np.ascontiguousarray(slots),
        time,
        most=min(budget, slots.size),
        dead_zone=dead_zone,
        deviations=deviations,
        steps=steps,
        trials=effort.QUICK,
        full=full,
        price=price,
    )
    return Rebalanced(found, np.array(before), np.array(after), np.array(brought, dtype=np.int64))


class _Search:
    """What suits every window, and pairs, not the sum of windows alone."""

    def __init__(
        self,
        windows: Floats,
        slots: Slots,
        time: Floats,
        pairs: Pairs | None,
    ) -> None:
        layers, devices, width = slots.shape
        self.windows, self.slots, self.time = windows, slots, time
        self.pairs = pairs
        self.room = np.full((layers, devices), width, dtype=np.int64)
        self.held = _held(slots, windows.shape[2])
        self.together = None if pairs is None else self._together(pairs)

    def _together(self, pairs: Pairs) -> _core.Layers:
        layers = _core.Layers(
            self.windows,
            np.ones(len(self.windows)),
            self.room,
            [0] * len(self.time),
            self.time.tolist(),
            nearest=False,
            norm=effort.LIVE_NORM,
        )
        unit = pairs.cost.max()
        scaled = pairs.counts * (PARTS * pairs.cost / max(unit, 1e-300))[:, None, None]
        layers.price_pairs(np.rint(scaled).astype(np.uint64), float(unit) / PARTS)
        return layers

    def run(self, begin: Slots | None) -> Slots:
        """Search from slots, where a copy that comes has its price, or from nothing."""
        found = level(
            self.windows,
            self.room,
            self.time,
            begin,
            price=effort.LIVE_PRICE,
        )
        if self.together is None:
            return found
        if begin is not None:
            mean = effort.LIVE_PRICE * self.windows.sum(axis=(0, 2)) / len(self.time)
            price = np.where(self.held.transpose(0, 2, 1), 0.0, mean[:, None, None])
            self.together.hold(np.ascontiguousarray(price))
        trials = effort.LIVE_TRIALS * int(self.room.sum(axis=1).max())
        return self.together.place(found, trials=trials, empties=False, threads=1)[0]

    def cost(self, slots: Slots) -> Floats:
        """Compute what slots cost [L]."""
        return _cost(self.windows, slots, self.time, self.pairs)


def _budgeted(
    search: _Search, relieved: Rebalanced, budget: int, dead_zone: float, deviations: float
) -> Rebalanced:
    """Give every layer one of a few ways to go: to stay, few moves, or a search from there.

    The budget goes to those that gain most for a copy.
    """
    windows, slots, time, held = search.windows, search.slots, search.time, search.held
    # What must be done whatever it brings: experts that had no slot.
    least = _relieved(windows.sum(axis=0), slots, time, 0, dead_zone, deviations, steps=0).slots
    searched = keep_slots(slots, search.run(relieved.slots), search.room)
    ways = [least, relieved.slots, searched]
    costs = np.stack([search.cost(way) for way in ways])
    moves = np.stack([_brought(held, way) for way in ways])
    chosen = _spent(costs, moves, budget, dead_zone, deviations)
    layer = np.arange(len(slots))
    return Rebalanced(
        np.stack(ways)[chosen, layer], costs[0], costs[chosen, layer], moves[chosen, layer]
    )


def _spent(
    costs: Floats, moves: NDArray[np.int64], budget: int, dead_zone: float, deviations: float
) -> NDArray[np.int64]:
    """Choose a way for every layer [L], of costs [N,L] and the copies that they bring [N,L].

    Way 0 is to stay. From way to way those come first that gain most for a copy, and each must gain
    more than the dead zone and chance.
    """
    _, layers = costs.shape
    chosen = np.zeros(layers, dtype=np.int64)
    left = budget - int(moves[0].sum())

    def next_of(layer: int) -> tuple[float, int] | None:
        """Return the way on that gains most for a copy, and what that is, negative."""
        now = chosen[layer]
        gain = costs[now, layer] - costs[:, layer]
        least = np.maximum(
            dead_zone * costs[now, layer],
            deviations * np.sqrt(costs[now, layer] + costs[:, layer]),
        )
        more = moves[:, layer] - moves[now, layer]
        slope = np.where((gain > least) & (more <= left), gain / np.maximum(more, 1), 0.0)
        way = int(slope.argmax())
        return (-float(slope[way]), way) if slope[way] > 0 else None

    heap = [(*on, layer) for layer in range(layers) if (on := next_of(layer))]
    heapq.heapify(heap)
    while heap:
        _, way, layer = heapq.heappop(heap)
        more = int(moves[way, layer] - moves[chosen[layer], layer])
        if more <= left:
            left -= more
            chosen[layer] = way
        # Where it was too much, another way may be open.
        if (then := next_of(layer)) is not None:
            heapq.heappush(heap, (*then, layer))
    return chosen


def _held(slots: Slots, experts: int) -> NDArray[np.bool_]:
    """Whether a device holds an expert [L,D,E]."""
    held = np.zeros((*slots.shape[:2], experts + 1), dtype=bool)
    np.put_along_axis(held, slots.astype(np.int64), True, axis=2)
    return held[:, :, :-1]


def copies_brought(before: Slots, after: Slots, experts: int) -> NDArray[np.int64]:
    """Count the copies of every layer that a device did not hold before [L]."""
    return _brought(_held(before, experts), after)


def renumbered(slots: Slots, running: Slots, experts: int) -> Slots:
    """Give what was packed for devices that are alike to those that hold most of it [L,D,S]."""
    layers, devices, _ = slots.shape
    same = _held(slots, experts).astype(np.float32)
    overlap = same @ _held(running, experts).transpose(0, 2, 1).astype(np.float32)
    order = np.empty((layers, devices), dtype=np.int64)
    row = np.arange(layers)
    for _ in range(devices):
        best = overlap.reshape(layers, -1).argmax(axis=1)
        packed, device = np.divmod(best, devices)
        order[row, device] = packed
        overlap[row, packed] = -1
        overlap[row, :, device] = -1
    return np.take_along_axis(slots, order[:, :, None], axis=1)


def _brought(held: NDArray[np.bool_], slots: Slots) -> NDArray[np.int64]:
    """Count the copies of every layer that a device does not hold [L]."""
    new = _held(slots, held.shape[2]) & ~held
    brought: NDArray[np.int64] = new.sum(axis=(1, 2))
    return brought


def _cost(windows: Floats, slots: Slots, time: Floats, pairs: Pairs | None) -> Floats:
    """Tokens of the slowest device over all windows, and what pairs apart cost [L]."""
    part = _held(slots, windows.shape[2]).astype(np.float64)
    part /= part.sum(axis=1, keepdims=True)
    load = part @ windows.transpose(1, 2, 0)
    cost: Floats = (load * time[:, None]).max(axis=1).sum(axis=1)
    if pairs is not None:
        all_pairs = pairs.counts.sum(axis=(1, 2), dtype=np.float64)
        together = ((part @ pairs.counts.astype(np.float64)) * part).sum(axis=(1, 2))
        cost += pairs.cost * (all_pairs - together) / 2
    # Sums of floats end in other bits on another processor, and every rank must choose alike.
    digits, power = np.frexp(cost)
    rounded: Floats = np.ldexp(np.rint(np.ldexp(digits, 30)), power - 30)
    return rounded
