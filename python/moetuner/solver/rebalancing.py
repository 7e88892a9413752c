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
from moetuner.placement import count_copies, find_holders, keep_slots, moves_from
from moetuner.solver import effort
from moetuner.solver.terms import Site, core_layers
from moetuner.solver.unseen import NOISE, NORM, SearchSetting

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Where arriving copies need memory beside what runs: the largest share of what packing a model anew
# would bring to other devices, and copies for every device that are never too many, in a small
# model.
LARGEST_MOVE, FEW = 0.19, 8
# Smallest share of the slowest device's time that is worth moving a layer's experts.
DEAD_ZONE = 0.005
# Standard deviations by which a count differs by chance, in those of a count of independent tokens.
DEVIATIONS = 1.0
# What windows must gain beyond chance: half of what devices differ may be chance, and a quarter of
# what is in a device's slots changes (``Change::wary`` in the core).
WARY = 0.5**0.5
# Layers by which the memory for windows is chosen, what a longer one may forecast worse, and what
# older windows count: they still show which experts are busy together.
MEMORY_LAYERS, LONGER, OLDER = 8, 0.25, 0.05
# Counts of pairs are whole numbers in the core: what one is cut into.
PARTS = 1024


def largest_move(layers: int, slots: int, devices: int) -> int:
    """Return how many copies one decision brings at most where all of them are held in memory.

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
    fresh: NDArray[np.bool_] | None = None,
    pairs: Pairs | None = None,
    full: bool = True,
    min_gain: float = 0.0,
) -> Rebalanced:
    """Relieve the slowest devices of running slots by few copies that come to a device.

    The answer is a function of the arguments alone. The work is bounded by steps and trials, not
    by time; it runs in the calling thread, without the interpreter's lock.

    Parameters
    ----------
    windows
        Tokens [L,E], or in windows [W,L,E], the last one last: finite, at least 0. Of windows as
        many of the last ones count fully as forecast the next best, each by what it tells.
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
        And more than chance. Counts differ by chance by so many of their standard deviations;
        only what devices differ more is taken to be so on the next load, too. 0 takes any gain.
    fresh
        Layers [L] of which no load has shaped what runs: packed anew as far as the budget suffices.
        By default none.
    pairs
        What else counts, besides load.
    full
        Whether empty slots are filled; on one load alone they may stay.
    min_gain
        Tokens that a copy must gain at least, on one load.
    """
    if not slots.size:
        raise ValueError(f"no slots in a layer: {list(slots.shape)}")
    windows = windows[None] if windows.ndim == 2 else windows
    load, lasts = weighted(windows)
    devices, budget = slots.shape[1], min(budget, slots.size)
    live = _Live(
        load,
        slots,
        np.ones(devices) if time is None else time,
        packed_anew(np.zeros(len(slots), dtype=bool) if fresh is None else fresh, slots, budget),
        dead_zone,
        deviations,
    )
    if len(load) == 1 and pairs is None:
        # Every step brings a copy.
        steps = effort.ADAPT_STEPS if budget else 0
        return live.relieved(budget, steps=steps, full=full, min_gain=min_gain)
    if pairs is not None:
        # Pairs are counted as often as loads are.
        counted = load.sum(axis=(0, 2)) / np.maximum(windows.sum(axis=(0, 2)), 1e-300)
        pairs = Pairs(pairs.counts, pairs.cost * counted)
    return live.searched(budget, effort.LASTING_PRICE if lasts else effort.LIVE_PRICE, pairs)


def packed_anew(fresh: NDArray[np.bool_], slots: Slots, budget: int) -> NDArray[np.bool_]:
    """Return which layers [L] a budget packs anew, of those that no load has shaped.

    The first ones for all of whose slots it suffices, if these are three quarters of them: fewer
    copies gain more where every layer gets its part.
    """
    fits: NDArray[np.bool_] = fresh & (np.cumsum(fresh) * slots[0].size <= budget)
    return fits if 4 * fits.sum() >= 3 * fresh.sum() else np.zeros_like(fresh)


@dataclass(frozen=True)
class _Live:
    """Loads as they count [W,L,E], slots that run [L,D,S], and when a layer changes.

    ``anew`` are the layers that are packed anew [L].
    """

    load: Floats
    slots: Slots
    time: Floats
    anew: NDArray[np.bool_]
    dead_zone: float
    deviations: float

    def relieved(
        self,
        budget: int,
        *,
        steps: int = effort.ADAPT_STEPS,
        full: bool = True,
        min_gain: float = 0.0,
    ) -> Rebalanced:
        """Take steps on the sum of windows, or pack anew what no load has shaped."""
        slots, before, after, moves = _core.adapt_slots(
            np.ascontiguousarray(self.load.sum(axis=0)),
            np.ascontiguousarray(self.slots),
            self.time,
            self.anew,
            max_moves=budget,
            steps=steps,
            trials=effort.QUICK,
            full=full,
            min_gain=min_gain,
            dead_zone=self.dead_zone,
            deviations=self.deviations,
        )
        return Rebalanced(slots, np.array(before), np.array(after), np.array(moves, np.int64))

    def searched(self, budget: int, share: float, pairs: Pairs | None) -> Rebalanced:
        """Search for what suits every window; a copy must gain a share of a device's tokens.

        Every layer stays, takes steps, or is searched from the better one of both; what is packed
        anew is searched from nothing. Experts that had no slot get one whatever that gains.
        """
        load, slots = self.load, self.slots
        running, layer = find_holders(slots, load.shape[2]), np.arange(len(slots))
        rate = math.fsum((1 / self.time).tolist())
        min_gain = float(_rounded(share * load.sum() / len(slots) / rate))
        is_new = ~running.any(axis=(1, 2))
        free = self.anew | is_new
        left = budget - int((self.anew & ~is_new).sum()) * slots[0].size

        def chosen(ways: list[Slots], dead_zone: float, deviations: float) -> Rebalanced:
            costs = np.stack([slowest(load, way, time=self.time, pairs=pairs) for way in ways])
            moves = np.stack([moves_from(running, way) for way in ways])
            best = _core.spend_budget(
                costs,
                # Where all may move, copies need no gain.
                np.where(free, 0, moves),
                max_moves=max(left, 0),
                dead_zone=dead_zone,
                deviations=deviations,
                devices=slots.shape[1],
                min_gain=min_gain,
            )
            way = np.where(is_new, costs.argmin(axis=0), np.array(best, dtype=np.int64))
            figures = costs[0], costs[way, layer], moves[way, layer]
            return Rebalanced(np.stack(ways)[way, layer], *figures)

        ways = [self.relieved(0, steps=0).slots, self.relieved(budget).slots]
        start = chosen(ways, 0.0, 0.0).slots
        if free.any():
            search = _make_search(load[:, free], slots[free].shape, self.time)
            packed = search.construct(windows=True, alone=True)
            running_there = np.ascontiguousarray(slots[free])
            start[free] = _core.match_devices(packed, running_there, load.shape[2])
        copy_costs = _copy_costs(slots, load, self.time, np.where(free, 0.0, share))
        end = _place(load, start, copy_costs, self.time, pairs)
        ways.append(keep_slots(slots, end, np.full(slots.shape[:2], slots.shape[2])))
        return chosen(ways, self.dead_zone, self.deviations * WARY)


def weighted(windows: Floats) -> tuple[Floats, bool]:
    """Return windows [W,L,E] as they count, fully within the memory that forecasts best.

    And whether that is known to be all of them.

    Each window of the later half is forecast by the mean of so many windows before it, as far as
    there are any; of memories that are nearly as good the longest one is taken. What is older
    counts a twentieth. A window counts by what it tells, as forecast and as what is forecast.
    """
    count = len(windows)
    if count < 3:
        return windows, False
    sample = windows[:, :: -(-windows.shape[1] // MEMORY_LAYERS)]
    tokens = sample.sum(axis=2, keepdims=True)
    share = sample / np.maximum(tokens, 1e-300)
    part = informative_part(share, tokens)
    told = part * tokens.sum(axis=(1, 2))
    share = share.reshape(count, -1)
    sums = np.concatenate([np.zeros((1, share.shape[1])), (told[:, None] * share).cumsum(axis=0)])
    weight = np.concatenate([[0.0], told.cumsum()])
    at = np.arange(count // 2 + count % 2, count)
    memories = [count]
    while memories[-1] > 1:
        memories.append(memories[-1] // 2)
    errors = []
    for memory in memories:
        first = np.maximum(at - memory, 0)
        weights = np.maximum(weight[at] - weight[first], 1e-300)
        forecast = (sums[at] - sums[first]) / weights[:, None]
        errors.append(float((told[at, None] * (share[at] - forecast) ** 2).sum()))
    good = [error <= min(errors) * (1 + LONGER) for error in errors]
    memory = memories[good.index(True)]
    lasts = memory == count
    part[:-memory] *= OLDER
    if (part == 1).all():
        return windows, lasts
    return part[:, None, None] * windows, lasts


def informative_part(share: Floats, tokens: Floats) -> Floats:
    """Return the part [W] of each window's tokens that tells of other windows.

    Of shares [W,L,E] of tokens [W,L,1]. The share of an expert varies with share / n in a window of
    n tokens, besides what windows differ: so n tokens tell n / (1 + n / m), where m tokens vary as
    much as windows do, seen in neighbours. Relative to the smallest window, as its tokens do.
    """
    tokens = tokens[:, :, 0]
    n = tokens.mean(axis=1)
    chance = (1 / np.maximum(tokens, 1)).sum(axis=1)
    chance = chance[1:] + chance[:-1]
    differs = ((share[1:] - share[:-1]) ** 2).sum(axis=(1, 2))
    # Half of what neighbours differ is of each; sizes that tell more count more.
    variance = ((differs - chance) / chance).sum() / (1 / chance).sum() / (2 * tokens.shape[1])
    told = 1 / (1 + n * max(float(_rounded(variance)), 0.0))
    part: Floats = told / told.max()
    return part


def _make_search(windows: Floats, shape: tuple[int, ...], time: Floats) -> _core.Layers:
    """Return the core's search for windows [W,L,E] and slots of a shape [L,D,S]."""
    layers, devices, width = shape
    site = Site(np.full((layers, devices), width), [0] * devices, time.tolist())
    return core_layers(windows, np.ones(len(windows)), site, setting=SearchSetting(NORM, NOISE))


def _place(
    windows: Floats, start: Slots, copy_costs: Floats, time: Floats, pairs: Pairs | None
) -> Slots:
    """Search from a start for what suits every window, and pairs, not the sum of windows alone.

    No worse than the start by the slowest devices of the windows and the costs of copies [L,E,D].
    All work is done in the calling thread.
    """
    search, per_layer = _make_search(windows, start.shape, time), start[0].size
    search.price_copies(copy_costs)
    trials = effort.quick_trials(per_layer, len(windows))
    begin = np.ascontiguousarray(start)
    slots: Slots = search.place(begin, trials=trials, empties=False, quick=True, alone=True)[0]
    if pairs is None:
        return slots
    unit = pairs.cost.max()
    scaled = pairs.counts * (PARTS * pairs.cost / max(unit, 1e-300))[:, None, None]
    search.price_pairs(np.rint(scaled).astype(np.uint64), float(unit) / PARTS)
    trials = effort.LIVE_TRIALS * per_layer
    return np.asarray(search.place(slots, trials=trials, empties=False, alone=True)[0])


def _copy_costs(slots: Slots, windows: Floats, time: Floats, share: Floats) -> Floats:
    """Compute what a copy costs [L,E,D] where a device does not hold its expert.

    Shares [L] of a device's tokens.
    """
    cost = _rounded(share * windows.sum(axis=(0, 2)) / math.fsum((1 / time).tolist()))
    holds = find_holders(slots, windows.shape[2]).transpose(0, 2, 1)
    return np.ascontiguousarray(np.where(holds, 0.0, cost[:, None, None]))


def slowest(
    windows: Floats, slots: Slots, *, time: Floats | None = None, pairs: Pairs | None = None
) -> Floats:
    """Compute the tokens of the slowest device of every layer [L], over windows [W,L,E].

    Copies share evenly, also those on one device; ``time`` is each device's per token [D], alike by
    default. What pairs cost that are apart is added.
    """
    experts = windows.shape[2]
    share = 1 / np.maximum(count_copies(slots, experts), 1)
    layer = np.arange(len(slots))[:, None, None]
    # An empty slot, -1, takes the last expert's share, which is not asked for.
    shared = np.ascontiguousarray(slots, np.int32), share[layer, slots]
    load = _core.expected_load(shared, np.ascontiguousarray(windows, np.float64), threads=1)
    if time is not None:
        load *= time
    cost = load.max(axis=2).sum(axis=0)
    if pairs is not None:
        cost += pairs.cost * _core.expected_apart(shared, pairs.counts, threads=1)
    return _rounded(cost)


def _rounded(sums: Floats) -> Floats:
    """Round sums of floats: they end in other bits elsewhere, and every rank must choose alike."""
    digits, power = np.frexp(sums)
    rounded: Floats = np.ldexp(np.rint(np.ldexp(digits, 30)), power - 30)
    return rounded
