"""From a running placement to a better one, by few moves."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moetuner._validation import not_negative
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.solver.layers import Moving, layers
from moetuner.solver.result import Candidate, Limits

# Prices of a move that are tried to keep a budget: each halves the logarithm's range.
TRIES = 7
# The range: no move that gains less than this part of the objective is worth asking for.
CHEAPEST = 1e-7


@dataclass(frozen=True)
class Migration:
    """Where a solve starts from, and what moving may cost.

    Parameters
    ----------
    initial
        The placement that runs.
    budget
        Bytes that may move; None for any number.
    cost
        What a moved byte costs, in units of the objective.
    expert_bytes
        Bytes of one expert of one layer; with 1, budget and cost are of experts.
    """

    initial: Placement
    budget: float | None = None
    cost: float = 0.0
    expert_bytes: float = 1.0

    def __post_init__(self) -> None:
        if self.budget is not None:
            not_negative("move_budget", self.budget, "number of bytes")
        not_negative("move_cost", self.cost, "price of a byte")
        not_negative("expert_bytes", self.expert_bytes, "number of bytes")


def check(problem: Problem, initial: Placement) -> None:
    """Raise unless a placement is one of a problem.

    Raises
    ------
    ValueError
        If it is of another model or machine, or does not fit the slots.
    """
    found = (initial.layers, initial.num_experts, initial.devices)
    wanted = (problem.layers, problem.experts, problem.devices)
    if found != wanted:
        raise ValueError(
            f"initial must have {wanted[0]} layers, {wanted[1]} experts and {wanted[2]} devices "
            f"like the problem, got {found[0]}, {found[1]} and {found[2]}"
        )
    held = (initial.slots != EMPTY).sum(axis=2)
    full = np.argwhere(held > problem.rooms)
    if full.size:
        layer, device = full[0]
        raise ValueError(
            f"initial has {held[layer, device]} experts of layer {layer} on device {device}, "
            f"which has {problem.rooms[layer, device]} slots"
        )


def migrate(problem: Problem, migration: Migration, *, seed: int, limits: Limits) -> Candidate:
    """Improve a placement within a budget; what stays keeps its slot."""
    initial = migration.initial
    check(problem, initial)
    begin = time.perf_counter()
    held = np.zeros((problem.layers, problem.experts, problem.devices), dtype=bool)
    layer, device, slot = np.nonzero(initial.slots != EMPTY)
    held[layer, initial.slots[layer, device, slot], device] = True
    start = problem.empty_slots()
    # Slots beyond a device's own are empty: what is there moves down.
    order = np.argsort(initial.slots == EMPTY, axis=2, kind="stable")
    width = min(start.shape[2], initial.slots_per_device)
    start[:, :, :width] = np.take_along_axis(initial.slots, order, axis=2)[:, :, :width]

    def at(price: float, tries: int) -> tuple[Candidate, int]:
        within = limits
        if limits.time_limit is not None:
            left = limits.time_limit - (time.perf_counter() - begin)
            within = replace(limits, time_limit=max(left, 0.0) / tries)
        moving = Moving(held, price)
        found = layers(problem, seed=seed, limits=within, start=start, moving=moving)
        moved = int(_arriving(found.slots, held))
        return found, moved

    def answer(found: Candidate, moved: int) -> Candidate:
        details = {**found.details, "experts_moved": moved}
        return replace(found, slots=_kept(initial.slots, found.slots), details=details)

    own = migration.cost * migration.expert_bytes
    most = np.inf
    if migration.budget is not None and migration.expert_bytes:
        most = migration.budget / migration.expert_bytes
    found, moved = at(own, TRIES + 1)
    if moved <= most or found.status == "interrupted":
        return answer(found, moved) if moved <= most else answer(Candidate(start, "interrupted"), 0)
    # The price at which so much moves as the budget allows, by bisection.
    value = problem.value(Placement(start, num_experts=problem.experts))
    low, high = max(own, CHEAPEST * value), max(own, value)
    best, best_moved = Candidate(start, details=found.details), 0
    best_value = value
    for left in range(TRIES, 0, -1):
        price = float(np.sqrt(low * high))
        found, moved = at(price, left)
        if moved <= most:
            high = price
            worth = problem.value(Placement(found.slots, num_experts=problem.experts))
            if worth + own * moved < best_value + own * best_moved:
                best, best_moved, best_value = found, moved, worth
        else:
            low = price
        if found.status == "interrupted":
            break
    return answer(replace(best, status=found.status), best_moved)


def _arriving(slots: NDArray[np.int32], held: NDArray[np.bool_]) -> int:
    layer, device, slot = np.nonzero(slots != EMPTY)
    return int((~held[layer, slots[layer, device, slot], device]).sum())


def _kept(initial: NDArray[np.int32], slots: NDArray[np.int32]) -> NDArray[np.int32]:
    """Order the slots of every device so that experts which stay keep theirs."""
    width = slots.shape[2]
    ordered = np.full_like(slots, EMPTY)
    for layer in range(slots.shape[0]):
        for device in range(slots.shape[1]):
            here = [int(e) for e in slots[layer, device] if e != EMPTY]
            before = {int(e): s for s, e in enumerate(initial[layer, device]) if e != EMPTY}
            stay = [e for e in here if before.get(e, width) < width]
            for expert in stay:
                ordered[layer, device, before[expert]] = expert
            free = iter(np.flatnonzero(ordered[layer, device] == EMPTY))
            for expert in here:
                if expert not in stay:
                    ordered[layer, device, next(free)] = expert
    return ordered
