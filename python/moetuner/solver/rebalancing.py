"""rebalance(): from running slots to better ones on live loads, by few moves and bounded work.

One set of rules for all who rebalance while a model serves: the plugins of engines and the
rebalancer of expert-parallel layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import holders_of, keep_slots, moves_from
from moetuner.solver import effort
from moetuner.solver.unseen import NOISE, NORM

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Largest share of what packing a model anew would bring to other devices that one decision brings,
# if nobody says more, and copies for every device that are never too many, in a small model.
LARGEST_MOVE, FEW = 0.19, 8
# Smallest share of the slowest device's time that is worth moving a layer's experts.
DEAD_ZONE = 0.005
# Standard deviations of a count within which a gain is taken for chance.
DEVIATIONS = 2.0
# Layers by which the memory for windows is chosen, what a longer one may forecast worse, and what
# older windows count: they still show which experts are busy together.
MEMORY_LAYERS, LONGER, OLDER = 8, 0.25, 0.05
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
    moves
        Copies of every layer that come to a device [L].
    """

    slots: Slots
    before: Floats
    after: Floats
    moves: NDArray[np.int64]


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
    budget: int,
    time: Floats | None = None,
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
        many of the last ones count fully as forecast the next best.
    slots
        Experts [L,D,S], -1 where a slot is empty. Experts that have no slot get one and empty slots
        may be filled, whatever they bring. What stays on a device keeps its slot.
    budget
        Copies that are brought at most, where they gain most.
    time
        Time of every device per token, as a share of the slowest one's [D]; alike by default.
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
    if not slots.size:
        raise ValueError(f"no slots in a layer: {list(slots.shape)}")
    load = windows[None] if windows.ndim == 2 else weighted(windows)
    rules = {"dead_zone": dead_zone, "deviations": deviations}
    total, time = load.sum(axis=0), np.ones(slots.shape[1]) if time is None else time

    def relieved(budget: int, steps: int = effort.ADAPT_STEPS) -> Rebalanced:
        slots_after, before, after, moved = _core.adapt_slots(
            np.ascontiguousarray(total),
            np.ascontiguousarray(slots),
            time,
            most=min(budget, slots.size),
            steps=steps,
            trials=effort.QUICK,
            full=full,
            price=price,
            **rules,
        )
        return Rebalanced(slots_after, np.array(before), np.array(after), np.array(moved, np.int64))

    if len(load) == 1 and pairs is None:
        return relieved(budget)
    running = holders_of(slots, load.shape[2])
    if not running.any():
        packed = _searched(load, None, slots, time, pairs)
        cost = slowest(load, packed, time=time, pairs=pairs)
        return Rebalanced(packed, cost, cost, moves_from(running, packed))
    # Every layer stays, moves by few steps, or is searched from there. Experts that had no slot get
    # one whatever that gains.
    stay, few = relieved(0, steps=0).slots, relieved(budget).slots
    searched = _searched(load, few, slots, time, pairs)
    ways = [stay, few, keep_slots(slots, searched, np.full(slots.shape[:2], slots.shape[2]))]
    costs = np.stack([slowest(load, way, time=time, pairs=pairs) for way in ways])
    moves = np.stack([moves_from(running, way) for way in ways])
    layer = np.arange(len(slots))
    chosen = np.array(_core.spend_budget(costs, moves, most=budget, **rules), dtype=np.int64)
    return Rebalanced(
        np.stack(ways)[chosen, layer], costs[0], costs[chosen, layer], moves[chosen, layer]
    )


def weighted(windows: Floats) -> Floats:
    """Return windows [W,L,E] as they count: fully within the memory that forecasts best.

    Each window of the later half is forecast by the mean of so many windows before it, as far as
    there are any; of memories that are nearly as good the longest one is taken. What is older
    counts a twentieth.
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
    memory = memories[good.index(True)]
    if memory == count:
        return windows
    return np.concatenate([OLDER * windows[:-memory], windows[-memory:]])


def _searched(
    windows: Floats, start: Slots | None, running: Slots, time: Floats, pairs: Pairs | None
) -> Slots:
    """Search for what suits every window, and pairs, not the sum of windows alone.

    From a start, where a copy that comes has its price, or from nothing: then no worse than a
    packing of the sum. The slowest devices of the windows take no longer than at the start. All
    work is done in the calling thread.
    """
    layers, devices, width = running.shape
    search = _core.Layers(
        np.ascontiguousarray(windows),
        np.ones(len(windows)),
        np.full((layers, devices), width, dtype=np.int64),
        [0] * devices,
        time.tolist(),
        nearest=False,
        norm=NORM,
        noise=NOISE,
    )
    # Ranks on different processors must find the same: sums that do not depend on them.
    price = effort.LIVE_PRICE * windows.sum(axis=(0, 2)) / math.fsum((1 / time).tolist())
    if start is not None:
        search.hold(_copy_prices(start, windows.shape[2], price))
        begin = np.ascontiguousarray(start)
    else:
        begin = search.construct(windows=True, alone=True)
    trials = effort.quick_trials(devices * width, len(windows))
    slots = search.place(begin, trials=trials, empties=False, quick=True, alone=True)[0]
    if pairs is None:
        return slots
    unit = pairs.cost.max()
    scaled = pairs.counts * (PARTS * pairs.cost / max(unit, 1e-300))[:, None, None]
    search.price_pairs(np.rint(scaled).astype(np.uint64), float(unit) / PARTS)
    if start is not None:
        search.hold(_copy_prices(running, windows.shape[2], price))
    trials = effort.LIVE_TRIALS * devices * width
    return search.place(slots, trials=trials, empties=False, alone=True)[0]


def _copy_prices(slots: Slots, experts: int, price: Floats) -> Floats:
    """Compute what a copy costs [L,E,D]: ``price`` [L] where a device does not hold its expert."""
    holds = holders_of(slots, experts).transpose(0, 2, 1)
    return np.ascontiguousarray(np.where(holds, 0.0, price[:, None, None]))


def renumbered(slots: Slots, running: Slots, experts: int) -> Slots:
    """Compute slots [L,D,S] in which alike devices get what was packed for one of them.

    The one that holds most of it already, as far as another does not hold more.
    """
    layers, devices, _ = slots.shape
    same = holders_of(slots, experts).astype(np.float32)
    overlap = same @ holders_of(running, experts).transpose(0, 2, 1).astype(np.float32)
    order = np.empty((layers, devices), dtype=np.int64)
    row = np.arange(layers)
    for _ in range(devices):
        best = overlap.reshape(layers, -1).argmax(axis=1)
        packed, device = np.divmod(best, devices)
        order[row, device] = packed
        overlap[row, packed] = -1
        overlap[row, :, device] = -1
    return np.take_along_axis(slots, order[:, :, None], axis=1)


def slowest(
    windows: Floats, slots: Slots, *, time: Floats | None = None, pairs: Pairs | None = None
) -> Floats:
    """Compute the tokens of the slowest device of every layer [L], over windows [W,L,E].

    Copies share evenly, also those on one device; ``time`` is each device's per token [D], alike by
    default. What pairs cost that are apart is added.
    """
    layers, devices, _ = slots.shape
    layer, device = np.arange(layers)[:, None, None], np.arange(devices)[:, None]
    part = np.zeros((layers, devices, windows.shape[2] + 1))
    # An empty slot, -1, counts in a column of its own at the end.
    np.add.at(part, (layer, device, slots), 1.0)
    part = part[:, :, :-1] / np.maximum(part[:, :, :-1].sum(axis=1, keepdims=True), 1.0)
    load = part @ windows.transpose(1, 2, 0)
    if time is not None:
        load *= time[:, None]
    cost = load.max(axis=1).sum(axis=1)
    if pairs is not None:
        all_pairs = pairs.counts.sum(axis=(1, 2), dtype=np.float64)
        together = ((part @ pairs.counts.astype(np.float64)) * part).sum(axis=(1, 2))
        cost += pairs.cost * (all_pairs - together) / 2
    # Sums of floats end in other bits on another processor, and every rank must choose alike.
    digits, power = np.frexp(cost)
    rounded: Floats = np.ldexp(np.rint(np.ldexp(digits, 30)), power - 30)
    return rounded
