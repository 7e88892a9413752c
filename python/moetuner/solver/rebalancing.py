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
from moetuner.placement import kept
from moetuner.solver import effort

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# Largest share of a model's experts that one decision brings to other devices, if nobody says more,
# and copies for every device that are never too many, in a small model.
LARGEST_MOVE, FEW = 0.25, 8
# Smallest share of the slowest device's time that is worth moving a layer's experts.
DEAD_ZONE = 0.02
# Standard deviations of a count within which a gain is taken for chance.
DEVIATIONS = 2.0
# Counts of pairs are whole numbers in the core: what one is cut into.
PARTS = 1024


def largest_move(layers: int, experts: int, devices: int) -> int:
    """Return how many copies one decision brings at most, if nobody says more."""
    return max(math.ceil(layers * experts * LARGEST_MOVE), FEW * devices)


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
    tolerance: float | None = None,
    forbidden: NDArray[np.bool_] | None = None,
    pairs: Pairs | None = None,
) -> Rebalanced:
    """Relieve the slowest devices of running slots by few copies that come to a device.

    The answer is a function of the arguments alone. The work is bounded by steps and trials, not
    by time; it runs in the calling thread, without the interpreter's lock.

    Parameters
    ----------
    windows
        Tokens [L,E], or in windows [W,L,E]: finite, at least 0.
    slots
        Experts [L,D,S], -1 where a slot is empty. Experts that have no slot get one and empty slots
        are filled, whatever they bring. What stays on a device keeps its slot.
    time
        Time of every device per token, as a share of the slowest one's [D].
    budget
        Copies that are brought at most, where they gain most.
    dead_zone
        A layer stays unless its slowest device gains more than this share of its time.
    deviations
        And more than so many standard deviations of counts as large, which are by chance.
    tolerance
        A device within this share of the mean is relieved no further; half of the dead zone by
        default.
    forbidden
        Where experts must not be [L,E,D].
    pairs
        What else counts, besides load.
    """
    load = windows[None] if windows.ndim == 2 else windows
    found = _relieved(
        load.sum(axis=0), slots, time, budget, dead_zone, deviations, tolerance, forbidden
    )
    if len(load) == 1 and pairs is None:
        return found
    return _annealed(load, slots, found, time, budget, dead_zone, deviations, forbidden, pairs)


def _relieved(
    load: Floats,
    slots: Slots,
    time: Floats,
    budget: int,
    dead_zone: float,
    deviations: float,
    tolerance: float | None,
    forbidden: NDArray[np.bool_] | None,
) -> Rebalanced:
    """Relieve devices on one load [L,E], by the core's steps."""
    found, before, after, brought = _core.adapt_slots(
        np.ascontiguousarray(load),
        np.ascontiguousarray(slots),
        time,
        most=min(budget, slots.size),
        dead_zone=dead_zone,
        deviations=deviations,
        tolerance=dead_zone / 2 if tolerance is None else tolerance,
        steps=effort.ADAPT_STEPS,
        trials=effort.QUICK,
        forbidden=forbidden,
    )
    return Rebalanced(found, np.array(before), np.array(after), np.array(brought, dtype=np.int64))


def _annealed(
    windows: Floats,
    slots: Slots,
    start: Rebalanced,
    time: Floats,
    budget: int,
    dead_zone: float,
    deviations: float,
    forbidden: NDArray[np.bool_] | None,
    pairs: Pairs | None,
) -> Rebalanced:
    """Go on from a start that suits the sum of windows to what suits every window, and pairs.

    Where nothing runs yet, moves are free; else each layer is taken whole or not at all, those
    first that gain most for a copy.
    """
    layers, devices, width = slots.shape
    experts = windows.shape[2]
    room = np.full((layers, devices), width, dtype=np.int64)
    search = _core.Layers(
        np.ascontiguousarray(windows),
        np.ones(len(windows)),
        room,
        [0] * devices,
        time.tolist(),
        nearest=False,
        norm=effort.LIVE_NORM,
    )
    if forbidden is not None:
        search.rule(forbidden=forbidden)
    held = _held(slots, experts)
    runs = bool(held.any())
    if runs:
        mean = windows.sum(axis=(0, 2)) / devices
        price = np.where(held.transpose(0, 2, 1), 0.0, effort.LIVE_PRICE * mean[:, None, None])
        search.hold(np.ascontiguousarray(price))
    if pairs is not None:
        unit = pairs.cost.max()
        scaled = pairs.counts * (PARTS * pairs.cost / max(unit, 1e-300))[:, None, None]
        search.price_pairs(np.rint(scaled).astype(np.uint64), float(unit) / PARTS)
    trials = effort.LIVE_TRIALS * devices * width
    found, _ = search.place(
        np.ascontiguousarray(start.slots), trials=trials, empties=False, threads=1
    )
    if not runs:
        before = _cost(windows, start.slots, time, pairs)
        return Rebalanced(found, before, _cost(windows, found, time, pairs), start.brought)
    found = kept(slots, found, room)
    # What must be done whatever it brings: experts that had no slot.
    filled = _relieved(
        windows.sum(axis=0), slots, time, 0, dead_zone, deviations, None, forbidden
    ).slots
    costs = [_cost(windows, of, time, pairs) for of in (filled, start.slots, found)]
    best, answer = costs[0].copy(), filled.copy()
    brought = _brought(held, filled)
    left = budget - int(brought.sum())
    options = [(start.slots, costs[1]), (found, costs[2])]
    moves = [_brought(held, of) for of, _ in options]
    # The better of both for every layer, then layers by what they gain for a copy.
    take = (costs[2] <= costs[1]).astype(np.int64)
    cost = np.where(take, costs[2], costs[1])
    moved = np.where(take, moves[1], moves[0])
    gain = best - cost
    worth = gain > np.maximum(dead_zone * best, deviations * np.sqrt(best + cost))
    rank = np.argsort(-gain / np.maximum(moved - brought, 1), kind="stable")
    for layer in rank[worth[rank]].tolist():
        needs = int(moved[layer] - brought[layer])
        if needs <= left:
            left -= needs
            answer[layer] = options[take[layer]][0][layer]
            best[layer], brought[layer] = cost[layer], moved[layer]
    return Rebalanced(answer, costs[0], best, brought)


def _held(slots: Slots, experts: int) -> NDArray[np.bool_]:
    """Whether a device holds an expert [L,D,E]."""
    held = np.zeros((*slots.shape[:2], experts + 1), dtype=bool)
    np.put_along_axis(held, slots.astype(np.int64), True, axis=2)
    return held[:, :, :-1]


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
    return cost
