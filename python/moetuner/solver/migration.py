"""From a running placement to a better one, by few moves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moetuner._moves import kept
from moetuner._validation import not_negative
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.solver.caps import caps_of
from moetuner.solver.clock import Clock
from moetuner.solver.enumeration import enumerated
from moetuner.solver.layers import Search
from moetuner.solver.moving import Moving, widened
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
    clock = Clock(limits)
    start = widened(problem, initial.slots)
    broken = problem.rules.broken(initial)
    search = Search(problem, seed)

    def at(price: float, tries: int) -> tuple[Candidate, int]:
        moving = Moving(initial, price)
        # A start that breaks a rule is none: then the search makes its own, as near as it pays.
        from_here = None if broken else start
        within = clock.within(1 / tries)
        found = search.run(within, start=from_here, moving=moving)
        return found, moving.moved(Placement(found.slots, num_experts=problem.experts))

    def answer(found: Candidate, moved: int) -> Candidate:
        details = {**found.details, "experts_moved": moved}
        return replace(found, slots=kept(initial.slots, found.slots), details=details)

    own = migration.cost * migration.expert_bytes
    most = np.inf
    if migration.budget is not None and migration.expert_bytes:
        most = migration.budget / migration.expert_bytes
    found, moved = at(own, TRIES + 1)
    if moved <= most:
        return answer(found, moved)
    if found.status == "interrupted" and not broken:
        return answer(Candidate(start, "interrupted"), 0)
    if problem.goal != "traffic" and limits.time_limit is None:
        exact = enumerated(
            problem, np.inf, caps=caps_of(problem), moving=Moving(initial, own), most=most
        )
        if exact is not None and len(exact):
            moved = Moving(initial, own).moved(Placement(exact, num_experts=problem.experts))
            return answer(Candidate(exact, details=found.details), moved)
    # The price at which so much moves as the budget allows, by bisection.
    value = problem.value(initial)
    low, high = max(own, CHEAPEST * value), max(own, value)
    best, best_moved = Candidate(start, details=found.details), 0
    best_value = np.inf if broken else value
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
    if np.isinf(best_value):
        raise ValueError(
            f"move_budget {migration.budget:g} is too small: {broken}, which initial does not "
            f"keep, and no placement was found that does within {int(most)} moves"
        )
    return answer(replace(best, status=found.status), best_moved)
