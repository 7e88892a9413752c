"""The last step where windows weigh by how bad they are: by the true objective, change by change.

Weights that make the best placement the best need not exist, so a search under weights can end
beside it. Where layers are small every change can be tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem

Slots = NDArray[np.int32]

# Changes that are tried in all, which take a millisecond each or less.
MOST = 4000


def polish(
    problem: Problem,
    slots: Slots,
    value: Callable[[Slots], float],
    seconds: float | None,
) -> Slots:
    """Take changes of slots [L,D,S] that lower a value until none does, or enough is tried.

    A change swaps the contents of two slots of a layer, or puts another expert into one.
    """
    begin = time.perf_counter()
    best, worth = slots, value(slots)
    tried, improved = 0, True
    while improved:
        improved = False
        for changed in _changes(problem, best):
            if not _is_allowed(problem, changed):
                continue
            tried += 1
            if tried > MOST or (seconds is not None and time.perf_counter() - begin > seconds):
                return best
            found = value(changed)
            if found < worth * (1 - 1e-12):
                best, worth, improved = changed, found, True
                break
    return best


def _changes(problem: Problem, slots: Slots) -> Iterator[Slots]:
    width = slots.shape[2]
    for layer, rooms in enumerate(problem.rooms.tolist()):
        flat = slots[layer].ravel()
        usable = [d * width + s for d, room in enumerate(rooms) for s in range(room)]
        for at, here in enumerate(usable):
            for there in usable[at + 1 :]:
                if here // width != there // width and flat[here] != flat[there]:
                    yield _with(slots, layer, {here: flat[there], there: flat[here]})
            for expert in range(EMPTY, problem.experts):
                if expert != flat[here]:
                    yield _with(slots, layer, {here: expert})


def _with(slots: Slots, layer: int, contents: dict[int, int]) -> Slots:
    changed = slots.copy()
    for slot, expert in contents.items():
        changed[layer].reshape(-1)[slot] = expert
    return changed


def _is_allowed(problem: Problem, slots: Slots) -> bool:
    """Whether slots are a placement that keeps the rules."""
    try:
        placement = Placement(slots, num_experts=problem.experts)
    except ValueError:
        return False
    return problem.rules.broken(placement.held.transpose(0, 2, 1)) is None
