"""From a running placement to a better one by few moves: repair, descend, search at prices.

A running placement is a start, and its moves are a term of the rank: no answer is behind staying.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError
from moetuner.placement import EMPTY, Placement
from moetuner.problem import Problem
from moetuner.problem.capacity import pad_slots
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.result import Details
from moetuner.solver.run import Moves, Role, Run, Stage
from moetuner.solver.stages.descent import descend
from moetuner.solver.stages.floor import FLOOR, balanced
from moetuner.solver.stages.layers import CHAIN_UNDER_CAPS, CONSTRUCT, LayerModel, anneal
from moetuner.solver.stages.polish import POLISH

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# How far prices of a move that are tried may be from what the last steps gain for a move: each try
# halves the logarithm's range.
SPREAD = 8.0
# The least price: no move that gains less than this part of the objective is worth asking for.
CHEAPEST = 1e-7


def repair(problem: Problem, initial: Placement) -> Slots:
    """Return slots [L,D,S] that keep the rules, to which the fewest copies have to move.

    They are full where all slots are to be full. An expert without pins needs one device, which
    costs a move if it does not hold the expert yet: in a layer that breaks a rule that is a flow of
    least cost. Slots that something has to move to in any case, to be full, cost nothing more. What
    else runs stays where there are slots.
    """
    slots = pad_slots(initial.slots, problem.capacity)
    rules = problem.rules
    for layer, running in enumerate(initial.held):
        if not rules.are_broken(layer, running):
            continue
        pinned = np.zeros_like(running) if rules.pinned is None else rules.pinned[layer].T
        banned = np.zeros_like(running) if rules.forbidden is None else rules.forbidden[layer].T
        holds, capacity = pinned.copy(), problem.capacity[layer]
        others = np.flatnonzero(~pinned.any(axis=0))
        stays = running & ~banned
        cost = np.where(banned, np.inf, np.where(running, 0.0, 1.0))
        gaps = np.maximum(capacity - (pinned | stays).sum(axis=1), 0) * problem.fill_slots
        # Every device twice: its gaps, and its other slots.
        filling = np.where(banned | stays, np.inf, 0.0)
        device_of = _assign(
            np.concatenate([cost, filling])[:, others],
            np.concatenate([capacity - pinned.sum(axis=1) - gaps, gaps]),
        )
        holds[device_of % problem.devices, others] = True
        for device in range(problem.devices):
            more = np.flatnonzero(running[device] & ~banned[device] & ~holds[device])
            if problem.may_copy:
                holds[device, more[: capacity[device] - holds[device].sum()]] = True
            held = np.flatnonzero(holds[device])
            slots[layer, device] = EMPTY
            slots[layer, device, : len(held)] = held
    return problem.filled(slots, initial)


def _assign(cost: Floats, capacity: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return devices of experts [E], under a capacity [D], at the least cost [D,E].

    Experts that cost nothing somewhere take their places first; each that is left goes the
    cheapest way, on which others may have to move on (Ford and Fulkerson, 1962).
    """
    devices, experts = cost.shape
    device_of = np.full(experts, -1, dtype=np.int64)
    left = capacity.copy()
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
            held = np.flatnonzero(device_of == device)
            if held.size:
                change = cost[:, held] - cost[device, held]
                handed[device] = held[change.argmin(axis=1)]
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


def require_moves(run: Run) -> Moves:
    """Return the moves of a run that has a running placement."""
    assert run.moves is not None
    return run.moves


def _repair(run: Run, _: Budget) -> None:
    """Offer what runs, or the nearest placement that keeps the rules, if moves suffice for it."""
    problem, moves = run.problem, require_moves(run)
    start = run.offer(repair(problem, moves.initial), "running", role=Role.RUNNING, is_start=True)
    if start.moves > moves.most:
        raise ArgumentError(
            f"move_budget {moves.budget:g} is too small: "
            f"initial breaks a rule ({problem.violations(moves.initial)[0]}), and to keep "
            f"all rules takes {start.moves} moves",
            "move_budget",
        )


def _are_few(run: Run) -> bool:
    return run.is_priced and require_moves(run).most > 0


def _take(run: Run, inner: Run) -> None:
    """Offer the best of an inner run, and take over what it proved and learned."""
    best = inner.answer()
    is_ahead = best.rank <= run.best.rank
    run.offer(best.slots, best.by, role=best.role)
    if run.details == Details():
        run.details = inner.details
    run.cut |= inner.cut
    if is_ahead and inner.bound is not None:
        run.bound = inner.bound
    if inner.interrupted:
        raise KeyboardInterrupt


def _is_ahead(run: Run) -> bool:
    return not run.is_priced and bool(run.incumbents) and run.best.role is Role.RUNNING


def _continue(run: Run, budget: Budget) -> None:
    """Search all layers from what runs, where moves are free and nothing better was found."""
    stages = (FLOOR, CONSTRUCT, CHAIN_UNDER_CAPS, Stage(anneal), POLISH)
    _take(run, run.inner(stages, budget, start=run.best.slots))


def _descend(run: Run, budget: Budget) -> None:
    """Take the steps that gain most for a move, and offer the best that are passed."""
    moves, model, start = require_moves(run), LayerModel(run), run.best.slots
    for _ in range(1 if run.problem.windows.is_mean else effort.STEP_REWEIGHTINGS):
        path, interrupted = descend(run, model, start, moves.initial, moves.most, budget.within())
        run.slope = path.slope(moves.most)
        for steps in path.lengths(moves.most, moves.price, effort.LENGTHS):
            run.offer(path.after(steps), "moves")
            if budget.is_over():
                return
        if interrupted:
            raise KeyboardInterrupt
        model.reweight(run.best.slots)


def _at_prices(run: Run, budget: Budget) -> None:
    """Search at prices of a move, from the best there is, to come nearer to the budget."""
    problem, moves, model = run.problem, require_moves(run), LayerModel(run, effort.PRICES_TRIED)
    if moves.most >= problem.capacity.sum():
        run.offer(balanced(problem), "balance", role=Role.FLOOR)
        _at_price(run, budget, model, moves.price)
        return
    slope = max(run.slope, CHEAPEST * abs(run.best.value))
    low, high = max(moves.price, slope / SPREAD), max(moves.price, slope * SPREAD)
    for left in range(effort.PRICES_TRIED, 0, -1):
        price = float(np.sqrt(low * high))
        if _at_price(run, budget.within(1 / left), model, price) <= moves.most:
            high = price
        else:
            low = price


def _at_price(run: Run, budget: Budget, model: LayerModel, price: float) -> int:
    """Search at a price of a move from the best there is, and return the moves of what it found."""
    moves = Moves(require_moves(run).initial, cost=price)
    stage = Stage(lambda inner, part: anneal(inner, part, model))
    inner = run.inner((stage,), budget, moves=moves, start=run.best.slots)
    _take(run, inner)
    return inner.best.moves


REPAIR = Stage(_repair)
CONTINUE = Stage(_continue, applies=_is_ahead)
DESCEND = Stage(_descend, applies=_are_few)
# A search that gets less time than the steps took adds nothing.
AT_PRICES = Stage(_at_prices, applies=_are_few, least=lambda run: (run.budget.time_limit or 0) / 2)


def from_running(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages from a running placement; from nothing a method's where moves are free."""

    def solve(run: Run, budget: Budget) -> None:
        _take(run, run.inner(stages, budget.within(effort.FRESH_SHARE)))

    fresh = Stage(solve, applies=lambda run: not run.is_priced)
    return (REPAIR, fresh, CONTINUE, DESCEND, AT_PRICES, POLISH)
