"""rebalance(): better slots than the running ones for live loads, by few moves and bounded work.

The plugins of engines and the rebalancer of expert-parallel layers both call it while a model
serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.placement import count_copies, find_holders, keep_slots, moves_from
from moetuner.solver import effort
from moetuner.solver.arrays import Bools, Floats, Integers, Slots
from moetuner.solver.terms import Site, core_layers
from moetuner.solver.unseen import NOISE, NORM, SearchSetting

# Where arriving copies need memory beside the running ones, a decision moves at most this share of
# the copies that packing the model from scratch would move.
LARGEST_MOVE = 0.19
# So many copies per device may move in any case: small models would move next to none.
ALWAYS_ALLOWED = 8
# Least gain that is worth moving a layer's experts, as a share of its slowest device's time.
DEAD_ZONE = 0.005
# Standard deviation of a count, over that of a count of independent tokens.
DEVIATIONS = 1.0
# Factor on ``deviations`` for windows: sqrt(f (1 - p)) / p, where a part p = 1/2 of the differences
# between devices lasts, and a part f = 1/4 of a device's slots changes
# (``LoadChange::require_gain_beyond_chance`` in the core).
CHANCE_FACTOR = 0.5**0.5
# Most layers by which the memory for windows is chosen.
MEMORY_LAYERS = 8
# A longer memory is taken if its squared error is larger by at most this share.
LONGER = 0.25
# Weight of windows older than the memory: they still show which experts are busy together.
OLDER = 0.05
# Parts that a pair is cut into: the core counts in whole numbers.
PARTS = 1024


def compute_move_limit(layers: int, slots: int, devices: int) -> int:
    """Return the most copies that one decision may move where memory holds all of them.

    Packing a layer from scratch leaves one slot in ``devices`` as it was, by chance.
    """
    moved_from_scratch = layers * slots * (devices - 1) / devices
    return max(math.ceil(LARGEST_MOVE * moved_from_scratch), ALWAYS_ALLOWED * devices)


@dataclass(frozen=True)
class Rebalanced:
    """Slots after rebalancing, and what that gains and takes.

    Parameters
    ----------
    slots
        Expert ids [L,D,S]; -1 where a device already holds all experts that it may hold.
    before, after
        Tokens of the slowest device of every layer [L], over all windows, plus the cost of pairs.
    moves
        Copies of every layer that move to another device [L].
    """

    slots: Slots
    before: Floats
    after: Floats
    moves: Integers


@dataclass(frozen=True)
class Pairs:
    """Co-activated pairs of an offline profile [L,E,E], and the cost of one, in tokens [L].

    A pair costs that if its experts share no device; it stands for its part of a visit.
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
    fresh: Bools | None = None,
    pairs: Pairs | None = None,
    full: bool = True,
    min_gain: float = 0.0,
) -> Rebalanced:
    """Return slots that relieve the slowest devices of the running ones by few moved copies.

    The answer is a function of the arguments alone. Steps and trials bound the work, not time. It
    runs in the calling thread, without the interpreter's lock.

    Parameters
    ----------
    windows
        Tokens [L,E], or in windows [W,L,E], oldest first: finite, at least 0. The last windows
        count fully, as many as forecast the next one best, each by its information.
    slots
        Running experts [L,D,S], -1 where a slot is empty. Experts without a slot get one, and empty
        slots may be filled, even if that gains nothing. Copies that stay keep their slots.
    budget
        Most copies that may move. They go where they gain most.
    time
        Time of every device per token, as a share of the slowest one's [D]; alike by default.
    dead_zone
        A layer stays unless its slowest device gains more than this share of its time.
    deviations
        The gain must also exceed chance. Counts scatter by so many standard deviations of a count
        of independent tokens; only larger differences are expected to last. 0 takes any gain.
    fresh
        Layers [L] whose running slots no load has shaped: they are packed from scratch as far as
        the budget suffices. By default none.
    pairs
        Pairs that count besides load.
    full
        True if empty slots are filled; they may stay empty only with one window of load.
    min_gain
        Least gain of a moved copy, in tokens, with one window of load.
    """
    if not slots.size:
        raise ValueError(f"no slots in a layer: {list(slots.shape)}")
    windows = windows[None] if windows.ndim == 2 else windows
    load, all_forecast = weigh_windows(windows)
    devices, budget = slots.shape[1], min(budget, slots.size)
    fresh = np.zeros(len(slots), dtype=bool) if fresh is None else fresh
    live = _Live(
        load,
        slots,
        time=np.ones(devices) if time is None else time,
        repack=choose_repacked(fresh, slots, budget),
        dead_zone=dead_zone,
        deviations=deviations,
    )
    if len(load) == 1 and pairs is None:
        # Every step moves a copy.
        steps = effort.ADAPT_STEPS if budget else 0
        return live.relieve(budget, steps=steps, full=full, min_gain=min_gain)
    if pairs is not None:
        # Pairs are counted as often as loads are.
        counted = load.sum(axis=(0, 2)) / np.maximum(windows.sum(axis=(0, 2)), 1e-300)
        pairs = Pairs(pairs.counts, pairs.cost * counted)
    price = effort.LASTING_PRICE if all_forecast else effort.LIVE_PRICE
    return live.search(budget, price, pairs)


def choose_repacked(fresh: Bools, slots: Slots, budget: int) -> Bools:
    """Return the layers [L] that a budget packs from scratch, of those that no load has shaped.

    They are the first layers whose slots the budget covers, if that is at least three quarters of
    all such layers, else none: then copies gain more if every layer gets some.
    """
    fits: Bools = fresh & (np.cumsum(fresh) * slots[0].size <= budget)
    return fits if 4 * fits.sum() >= 3 * fresh.sum() else np.zeros_like(fresh)


@dataclass(frozen=True)
class _Live:
    """Weighted loads [W,L,E], running slots [L,D,S], and what a layer must gain to change.

    Layers in ``repack`` [L] are packed from scratch.
    """

    load: Floats
    slots: Slots
    time: Floats
    repack: Bools
    dead_zone: float
    deviations: float

    def relieve(
        self,
        budget: int,
        *,
        steps: int = effort.ADAPT_STEPS,
        full: bool = True,
        min_gain: float = 0.0,
    ) -> Rebalanced:
        """Return slots after steps on the sum of windows, or packed from scratch in ``repack``."""
        slots, before, after, moves = _core.adapt_slots(
            np.ascontiguousarray(self.load.sum(axis=0)),
            np.ascontiguousarray(self.slots),
            self.time,
            self.repack,
            max_moves=budget,
            steps=steps,
            trials=effort.QUICK,
            full=full,
            min_gain=min_gain,
            dead_zone=self.dead_zone,
            deviations=self.deviations,
        )
        return Rebalanced(slots, np.array(before), np.array(after), np.array(moves, np.int64))

    def search(self, budget: int, share: float, pairs: Pairs | None) -> Rebalanced:
        """Return slots searched for all windows; a copy must gain a share of a device's tokens.

        Every layer stays, takes steps, or is searched from the better of both. Layers in ``repack``
        are searched from scratch. Experts without a slot get one whatever that gains.
        """
        load, slots = self.load, self.slots
        running, layer = find_holders(slots, load.shape[2]), np.arange(len(slots))
        rate = math.fsum((1 / self.time).tolist())
        min_gain = float(_rounded(share * load.sum() / len(slots) / rate))
        is_new = ~running.any(axis=(1, 2))
        free = self.repack | is_new
        moves_left = budget - int((self.repack & ~is_new).sum()) * slots[0].size

        def choose(choices: list[Slots], dead_zone: float, deviations: float) -> Rebalanced:
            """Return the choice of every layer on which the budget gains most."""
            costs = np.stack(
                [slowest(load, choice, time=self.time, pairs=pairs) for choice in choices]
            )
            moves = np.stack([moves_from(running, choice) for choice in choices])
            best = _core.spend_budget(
                costs,
                # Where all copies may move, none has to gain.
                np.where(free, 0, moves),
                max_moves=max(moves_left, 0),
                dead_zone=dead_zone,
                deviations=deviations,
                devices=slots.shape[1],
                min_gain=min_gain,
            )
            chosen = np.where(is_new, costs.argmin(axis=0), np.array(best, dtype=np.int64))
            return Rebalanced(
                np.stack(choices)[chosen, layer],
                before=costs[0],
                after=costs[chosen, layer],
                moves=moves[chosen, layer],
            )

        choices = [self.relieve(0, steps=0).slots, self.relieve(budget).slots]
        start = choose(choices, 0.0, 0.0).slots
        if free.any():
            search = _make_search(load[:, free], slots[free].shape, self.time)
            packed = search.construct(windows=True, alone=True)
            running_there = np.ascontiguousarray(slots[free])
            start[free] = _core.match_devices(packed, running_there, load.shape[2])
        copy_costs = _copy_costs(slots, load, self.time, np.where(free, 0.0, share))
        end = _place(load, start, copy_costs, self.time, pairs)
        choices.append(keep_slots(slots, end, np.full(slots.shape[:2], slots.shape[2])))
        return choose(choices, self.dead_zone, self.deviations * CHANCE_FACTOR)


def weigh_windows(windows: Floats) -> tuple[Floats, bool]:
    """Return weighted windows [W,L,E], and whether all of them forecast the next one best.

    Windows within the memory that forecasts best count fully, older ones a twentieth. Each memory,
    a number of windows, is tried on the later half of the windows: the mean of so many windows
    before one forecasts it. The longest of the memories that are nearly as good is taken. A window
    is weighed by its information, both in a forecast and as the one that is forecast.
    """
    count = len(windows)
    if count < 3:
        return windows, False
    sample = windows[:, :: -(-windows.shape[1] // MEMORY_LAYERS)]
    tokens = sample.sum(axis=2, keepdims=True)
    share = sample / np.maximum(tokens, 1e-300)
    informative = compute_information(share, tokens)
    information = informative * tokens.sum(axis=(1, 2))
    share = share.reshape(count, -1)
    sums = np.concatenate(
        [np.zeros((1, share.shape[1])), (information[:, None] * share).cumsum(axis=0)]
    )
    weight = np.concatenate([[0.0], information.cumsum()])
    forecasted = np.arange(count // 2 + count % 2, count)  # the later half
    memories = [count]
    while memories[-1] > 1:
        memories.append(memories[-1] // 2)
    errors = []
    for memory in memories:
        first = np.maximum(forecasted - memory, 0)
        weights = np.maximum(weight[forecasted] - weight[first], 1e-300)
        forecast = (sums[forecasted] - sums[first]) / weights[:, None]
        squares = (share[forecasted] - forecast) ** 2
        errors.append(float((information[forecasted, None] * squares).sum()))
    good = [error <= min(errors) * (1 + LONGER) for error in errors]
    memory = memories[good.index(True)]
    all_forecast = memory == count
    informative[:-memory] *= OLDER
    if (informative == 1).all():
        return windows, all_forecast
    return informative[:, None, None] * windows, all_forecast


def compute_information(share: Floats, tokens: Floats) -> Floats:
    """Return the part [W] of each window's tokens that is information about other windows.

    Takes shares [W,L,E] of tokens [W,L,1]. An expert's share in a window of n tokens has a variance
    of share / n by chance, besides the variance between windows. So n tokens are worth
    n / (1 + n / m), where m tokens scatter as much as windows differ; neighbours show how much that
    is. The parts are scaled so that the largest one, of the smallest window, is 1.
    """
    tokens = tokens[:, :, 0]
    mean_tokens = tokens.mean(axis=1)
    chance = (1 / np.maximum(tokens, 1)).sum(axis=1)
    chance = chance[1:] + chance[:-1]
    difference = ((share[1:] - share[:-1]) ** 2).sum(axis=(1, 2))
    # Each of two neighbours has half of the variance; pairs with less chance weigh more.
    variance = ((difference - chance) / chance).sum() / (1 / chance).sum() / (2 * tokens.shape[1])
    worth = 1 / (1 + mean_tokens * max(float(_rounded(variance)), 0.0))
    scaled: Floats = worth / worth.max()
    return scaled


def _make_search(windows: Floats, shape: tuple[int, ...], time: Floats) -> _core.Layers:
    """Return the core's search for windows [W,L,E] and slots of a shape [L,D,S]."""
    layers, devices, width = shape
    site = Site(np.full((layers, devices), width), [0] * devices, time.tolist())
    return core_layers(windows, np.ones(len(windows)), site, setting=SearchSetting(NORM, NOISE))


def _place(
    windows: Floats, start: Slots, copy_costs: Floats, time: Floats, pairs: Pairs | None
) -> Slots:
    """Return slots searched from a start for all windows, and pairs.

    They are no worse than the start by the slowest devices of the windows and the costs of copies
    [L,E,D]. All work is done in the calling thread.
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
    """Compute the cost of a new copy [L,E,D]: a share [L] of a device's tokens, 0 if it runs."""
    cost = _rounded(share * windows.sum(axis=(0, 2)) / math.fsum((1 / time).tolist()))
    holds = find_holders(slots, windows.shape[2]).transpose(0, 2, 1)
    return np.ascontiguousarray(np.where(holds, 0.0, cost[:, None, None]))


def slowest(
    windows: Floats, slots: Slots, *, time: Floats | None = None, pairs: Pairs | None = None
) -> Floats:
    """Compute the tokens of the slowest device of every layer [L], over windows [W,L,E].

    Copies share evenly, those on one device, too. ``time`` is each device's time per token [D],
    equal by default. The cost of pairs that are apart is added.
    """
    experts = windows.shape[2]
    share = 1 / np.maximum(count_copies(slots, experts), 1)
    layer = np.arange(len(slots))[:, None, None]
    # An empty slot, -1, reads the last expert's share, which the core does not use.
    shared = np.ascontiguousarray(slots, np.int32), share[layer, slots]
    load = _core.expected_load(shared, np.ascontiguousarray(windows, np.float64), threads=1)
    if time is not None:
        load *= time
    cost = load.max(axis=2).sum(axis=0)
    if pairs is not None:
        cost += pairs.cost * _core.expected_apart(shared, pairs.counts, threads=1)
    return _rounded(cost)


def _rounded(sums: Floats) -> Floats:
    """Round sums of floats, whose last bits depend on the machine: every rank must choose alike."""
    digits, power = np.frexp(sums)
    rounded: Floats = np.ldexp(np.rint(np.ldexp(digits, 30)), power - 30)
    return rounded
