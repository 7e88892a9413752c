"""From a running placement to a better one by few moves: repair, descend, search at prices.

A running placement is a start, and its moves are a term of the rank: no answer is behind staying.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.result import Details
from moetuner.solver.run import Incumbent, Moves, Role, Run, Stage
from moetuner.solver.stages.descent import Path, descend
from moetuner.solver.stages.floor import FLOOR, balanced
from moetuner.solver.stages.layers import (
    CHAIN_UNDER_CAPS,
    CONSTRUCT,
    LayerModel,
    anneal,
    has_few_slots,
)
from moetuner.solver.stages.polish import POLISH
from moetuner.solver.stages.pool import Pool
from moetuner.solver.stages.repair import repair

Floats = NDArray[np.float64]
Slots = NDArray[np.int32]

# How far prices of a move that are tried may be from what the last steps gain for a move: each try
# halves the logarithm's range.
SPREAD = 8.0
# Limits of moves that are looked at rise by so much, in the logarithm.
LIMIT_STEP = float(np.log(1.03))
# Steps from what a search found may go so far beyond twice its moves.
MORE_MOVES = 8
# The part of the objective that a move is held to gain at least, at first: prices fall from there.
DEAREST = 1e-3
# The least price: no move that gains less than this part of the objective is worth asking for.
CHEAPEST = 1e-7


def require_moves(run: Run) -> Moves:
    """Return the moves of a run that has a running placement."""
    assert run.moves is not None
    return run.moves


def offer_running(run: Run) -> Incumbent:
    """Offer what runs, or the nearest placement that keeps the rules, and return it."""
    slots = repair(run.problem, require_moves(run).initial)
    return run.offer(slots, "running", role=Role.RUNNING, is_start=True)


def _repair(run: Run, _: Budget) -> None:
    """Offer what runs, or the nearest placement that keeps the rules, if moves suffice for it."""
    problem, moves, start = run.problem, require_moves(run), offer_running(run)
    if start.moves > moves.most:
        raise ArgumentError(
            f"move_budget {moves.budget:g} is too small: "
            f"initial breaks a rule ({problem.violations(moves.initial)[0]}), and to keep "
            f"all rules takes {start.moves} moves",
            "move_budget",
        )


def _are_few(run: Run) -> bool:
    return run.is_priced and require_moves(run).most > 0


def _take(run: Run, inner: Run) -> Incumbent:
    """Offer the best of an inner run, and take over what it proved and learned."""
    best = inner.answer()
    is_ahead = best.rank <= run.best.rank
    taken = run.offer(best.slots, best.by, role=best.role)
    if run.details == Details():
        run.details = inner.details
    run.cut |= inner.cut
    if is_ahead and inner.bound is not None:
        run.bound = inner.bound
    if inner.interrupted:
        raise KeyboardInterrupt
    return taken


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
        _at_price(run, budget, model, moves.price, run.best.slots)
        return
    slope = max(run.slope, CHEAPEST * abs(run.best.value))
    low, high = max(moves.price, slope / SPREAD), max(moves.price, slope * SPREAD)
    for left in range(effort.PRICES_TRIED, 0, -1):
        price = float(np.sqrt(low * high))
        part = budget.within(1 / left)
        if _at_price(run, part, model, price, run.best.slots).moves <= moves.most:
            high = price
        else:
            low = price


def _at_price(run: Run, budget: Budget, model: LayerModel, price: float, start: Slots) -> Incumbent:
    """Search at a price of a move from slots [L,D,S], and return what was found."""
    moves = Moves(require_moves(run).initial, cost=price)
    stage = Stage(lambda inner, part: anneal(inner, part, model))
    return _take(run, run.inner((stage,), budget, moves=moves, start=start))


def _is_of_rungs(run: Run) -> bool:
    """Return whether moves have a budget, and the work does not end by the clock."""
    return 0 < require_moves(run).most < np.inf and run.budget.time_limit is None


def _is_of_prices(run: Run) -> bool:
    """Return whether moves count, and nothing but the time or their price ends the search."""
    return _are_few(run) and not _is_of_rungs(run)


def _at_rungs(run: Run, budget: Budget) -> None:
    """Search at prices that fall, the same ones whatever the budget, and take the best within it.

    They end where more moves are found than the budget has. A larger one thereby meets all that a
    smaller one does, and gives no worse placement.
    """
    pool = Pool(run, require_moves(run))
    limit = int(min(pool.moves.most, run.problem.capacity.sum()))
    model = LayerModel(run, effort.RUNGS if pool.mixes else effort.JOINED_RUNGS)
    try:
        _meet(pool, model, budget, limit)
    finally:
        pool.add(run.best)
        if pool.is_exact:
            pool.mix([limit], model.weight)
        run.offer(pool.best(limit).slots, "moves")


def _meet(pool: Pool, model: LayerModel, budget: Budget, limit: int) -> None:
    """Add to a pool what steps and searches at falling prices find, from what runs."""
    run, start = pool.run, pool.run.incumbents[0]
    pool.add(start)
    # Steps are the same to any limit that is farther, but for the last two moves before it.
    path = _go_down(pool, model, budget, start, 1 << (limit + 2).bit_length(), limit)
    if run.problem.capacity.sum() <= effort.STEP_SLOTS:
        _use_up(pool, model, budget, path, limit)
    first, ratio = effort.JOINED_FIRST, effort.JOINED_RATIO
    if pool.mixes:
        first, ratio = effort.RUNG_FIRST, effort.RUNG_RATIO
    price = max(path.steepest, DEAREST * abs(start.value)) * first
    for _ in range(model.parts):
        price = max(price, pool.moves.price)
        found = _at_price(run, budget, model, price, pool.best_at(price, model.weight))
        pool.add(found)
        if found.moves <= limit and _goes_on(run):
            best = run.judge(pool.best_at(price, model.weight), "moves")
            _go_down(pool, model, budget, best, 2 * best.moves + MORE_MOVES)
        if not pool.is_exact:
            pool.mix(_limits(start.moves, limit), model.weight)
        if found.moves > limit or price <= pool.moves.price:
            break
        price *= ratio


def _goes_on(run: Run) -> bool:
    """Return whether steps go on from what searches found: not of large layers that survive losses.

    There every device counts, so that steps are many and gain little (36 devices x 16 slots: three
    times as long as the steps from what runs, which take most of the time already).
    """
    return run.problem.survive is None or has_few_slots(run)


def _limits(least: int, limit: int) -> list[int]:
    """Return limits of moves that rise by 3 % from the least, the same ones up to any limit."""
    powers = np.arange(int(np.log(limit - least + 1) / LIMIT_STEP) + 2)
    rising = set(np.exp(LIMIT_STEP * powers).astype(int).tolist())
    return [least, *(least + more for more in sorted(rising) if least + more <= limit)]


def _go_down(
    pool: Pool,
    model: LayerModel,
    budget: Budget,
    start: Incumbent,
    farthest: int,
    limit: int | None = None,
) -> Path:
    """Add ends of steps down from an incumbent, with at most so many moves, to a pool."""
    initial = pool.moves.initial
    path, interrupted = descend(pool.run, model, start.slots, initial, farthest, budget.within())
    last = int(path.moves.max()) if limit is None else limit
    limits = _limits(start.moves, max(last, start.moves))
    for steps in sorted({path.before(reach) for reach in limits}):
        # No search may begin with what depends on the limit.
        pool.add(pool.run.judge(path.after(steps), "moves"), is_start=limit is None)
    if interrupted:
        raise KeyboardInterrupt
    return path


def _use_up(pool: Pool, model: LayerModel, budget: Budget, path: Path, limit: int) -> None:
    """Add steps that are left to a limit of moves where the next of a path takes too many."""
    initial = pool.moves.initial
    for reach in _limits(int(path.moves[0]), limit):
        steps = path.before(reach)
        if path.moves[steps] == reach:
            continue
        start = path.after(steps)
        rest, interrupted = descend(pool.run, model, start, initial, reach, budget.within())
        end = rest.after(rest.best(reach, 0.0))
        pool.add(pool.run.judge(end, "moves"), is_start=False)
        if interrupted:
            raise KeyboardInterrupt


REPAIR = Stage(_repair)
CONTINUE = Stage(_continue, applies=_is_ahead)
DESCEND = Stage(_descend, applies=_is_of_prices)
# A search that gets less time than the steps took adds nothing.
AT_PRICES = Stage(
    _at_prices, applies=_is_of_prices, least=lambda run: (run.budget.time_limit or 0) / 2
)
AT_RUNGS = Stage(_at_rungs, applies=_is_of_rungs)


def from_running(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages from a running placement; from nothing a method's where moves are free."""

    def solve(run: Run, budget: Budget) -> None:
        _take(run, run.inner(stages, budget.within(effort.FRESH_SHARE)))

    fresh = Stage(solve, applies=lambda run: not run.is_priced)
    return (REPAIR, fresh, CONTINUE, DESCEND, AT_PRICES, AT_RUNGS, POLISH)
