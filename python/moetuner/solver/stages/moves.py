"""From a running placement to better ones by few moves: the search that fills a front.

It goes from few moves upwards: steps down from what runs, searches at prices of a move that fall,
and mixtures of layers. Whatever the budget of moves, it does the same in the same order, and the
budget says only where it ends. So a larger budget meets all placements that a smaller one meets,
and its best is no worse. A time limit cuts the search short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError
from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.rebalancing import rebalance
from moetuner.solver.result import Details
from moetuner.solver.run import Incumbent, Moves, Role, Run, Stage
from moetuner.solver.stages.descent import Path, descend
from moetuner.solver.stages.floor import FLOOR
from moetuner.solver.stages.front import Front, rising_limits
from moetuner.solver.stages.layers import (
    CHAIN_UNDER_CAPS,
    CONSTRUCT,
    LayerModel,
    anneal,
    has_few_slots,
)
from moetuner.solver.stages.polish import POLISH
from moetuner.solver.stages.repair import repair

Slots = NDArray[np.int32]


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


def fill(front: Front, budget: Budget, limit: float) -> None:
    """Add placements to which at most so many experts move, from few moves upwards."""
    run, start = front.run, front.run.incumbents[0]
    limit = int(min(limit, run.problem.capacity.sum()))
    prices = effort.MIXED_PRICES if front.mixes else effort.JOINED_PRICES
    model = LayerModel(run, prices.number)
    front.add(start)
    path = _step_down(front, model, budget, start, limit)
    if has_few_slots(run) and not front.is_exact:
        _spend_rest(front, model, budget, path, limit)
    if budget.left is not None and budget.left <= budget.gone:
        # A search in less time than the steps took adds nothing.
        run.cut = True
        return
    first = max(path.steepest, effort.DEAREST * abs(start.value)) * prices.first
    falling = first * prices.ratio ** np.arange(prices.number)
    _search_at_prices(front, model, budget, falling.tolist(), limit)


def first_enough(front: Front, budget: Budget, limit: float, enough: float) -> Incumbent | None:
    """Return the nearest placement, by steps alone, that has an objective of ``enough`` or less.

    None where none has to which at most so many experts move. More steps gain more, so the fewest
    are found by bisection; all that are looked at are added to the front.
    """
    run, start = front.run, front.run.incumbents[0]
    limit = int(min(limit, run.problem.capacity.sum()))

    def is_enough(point: Incumbent) -> bool:
        front.add(point, is_start=False)
        return point.value <= enough

    if not has_few_slots(run):
        limits = rising_limits(start.moves, max(limit, start.moves))
        bisect_left(limits, True, key=lambda moves: is_enough(_relieve(front, moves)))
        return front.first(enough)
    model, reach, is_farthest = LayerModel(run), start.moves + effort.FIRST_REACH, False
    while not is_farthest:
        reach = min(reach, limit)
        initial, part = front.moves.initial, budget.within()
        path, interrupted = descend(run, model, start.slots, initial, reach + 2, part)
        if interrupted:
            raise KeyboardInterrupt
        # Steps that bring layers within their caps come first.
        ends = range(int(path.excess.argmin()), path.before(reach) + 1)
        if ends and is_enough(run.judge(path.after(ends[-1]))):
            bisect_left(ends, True, key=lambda steps: is_enough(run.judge(path.after(steps))))
            break
        is_farthest = reach == limit or path.moves[-1] <= reach
        reach *= effort.REACH_TIMES
    return front.first(enough)


def _relieve(front: Front, moves: int) -> Incumbent:
    """Return what live rebalancing makes of what runs by at most so many moves.

    In layers of many slots every step down takes long. This looks at loads alone, takes a tenth of
    a second, and gains nearly as much (75 layers of 256 experts on 32 devices: 1,024 moves gain
    16.9 us of 240 in 0.1 s, steps 17.4 in 7 s).
    """
    run, start = front.run, front.run.incumbents[0]
    problem, windows = run.problem, run.objective.windows
    weight = windows.weight / max(float(windows.weight.mean()), 1e-300)
    load = np.ascontiguousarray(windows.load * weight[:, None, None], dtype=np.float64)
    slots, time = np.ascontiguousarray(start.slots), problem.topology.time_of_device
    budget = moves - start.moves
    found = rebalance(load, slots, budget=budget, time=time, full=problem.fill_slots)
    return run.judge(found.slots, "moves")


def _step_down(
    front: Front,
    model: LayerModel,
    budget: Budget,
    start: Incumbent,
    limit: int,
    *,
    is_start: bool = False,
) -> Path:
    """Add ends of the steps down from a placement to at most so many moves, and return them."""
    run, initial = front.run, front.moves.initial
    # Steps are the same to any limit, but for the last two moves before it.
    path, interrupted = descend(run, model, start.slots, initial, limit + 2, budget.within())
    limits = rising_limits(run.incumbents[0].moves, min(limit, int(path.moves.max())))
    for steps in sorted({path.before(moves) for moves in limits if moves >= start.moves}):
        front.add(run.judge(path.after(steps), "moves"), is_start=is_start)
    if interrupted:
        raise KeyboardInterrupt
    return path


def _spend_rest(front: Front, model: LayerModel, budget: Budget, path: Path, limit: int) -> None:
    """Add ends of further steps to numbers of moves that no end of a path has.

    The next step of the path takes too many. The best mixtures of layers have no need of it.
    """
    run, initial = front.run, front.moves.initial
    for moves in rising_limits(int(path.moves[0]), limit):
        steps = path.before(moves)
        if path.moves[steps] < moves and not budget.is_over():
            start = path.after(steps)
            rest, interrupted = descend(run, model, start, initial, moves, budget.within())
            end = rest.after(rest.best(moves, 0.0))
            front.add(run.judge(end, "moves"), is_start=False)
            if interrupted:
                raise KeyboardInterrupt


def _search_at_prices(
    front: Front, model: LayerModel, budget: Budget, falling: list[float], limit: int
) -> None:
    """Add what searches find at prices of a move that fall, until more move than the limit.

    None is below what a move costs, and the last one is that.
    """
    run, least = front.run, front.moves.price
    limits = rising_limits(run.incumbents[0].moves, limit)
    for number, price in enumerate([*falling[:-1], least]):
        price = max(price, least)
        part = budget.within(1 / (len(falling) - number))
        found = _search_at_price(run, part, model, price, front.start_at(price, model.weight))
        front.add(found)
        if not front.is_exact:
            front.mix(limits, model.weight)
        # Smaller budgets end here: what they mix, larger ones have mixed of the same.
        if found.moves > limit or budget.is_over():
            return
        if _goes_on(run):
            best = run.judge(front.start_at(price, model.weight), "moves")
            farthest = 2 * best.moves + effort.MORE_MOVES
            _step_down(front, model, budget, best, farthest, is_start=True)
        if price == least:
            break
    if not front.is_exact:
        front.mix(limits, model.weight)


def _search_at_price(
    run: Run, budget: Budget, model: LayerModel, price: float, start: Slots
) -> Incumbent:
    """Search at a price of a move from slots [L,D,S], and return what was found."""
    moves = Moves(require_moves(run).initial, cost=price)
    stage = Stage(lambda inner, part: anneal(inner, part, model))
    return _take(run, run.inner((stage,), budget, moves=moves, start=start))


def _goes_on(run: Run) -> bool:
    """Return whether steps go on from what searches found: not of large layers that survive losses.

    There every device counts, so that steps are many and gain little (36 devices x 16 slots: three
    times as long as the steps from what runs, which take most of the time already).
    """
    return run.objective.is_of_windows or has_few_slots(run)


def _fill_front(run: Run, budget: Budget) -> None:
    """Fill a front up to the budget of moves, and offer the best within it."""
    moves = require_moves(run)
    front = Front(run, moves)
    try:
        fill(front, budget, moves.most)
    finally:
        front.add(run.best)
        run.offer(front.best(moves.most).slots, "moves")


def _are_few(run: Run) -> bool:
    """Return whether moves have a price, or a budget for some of them."""
    moves = require_moves(run)
    return moves.most > 0 and bool(moves.price or moves.most < np.inf)


REPAIR = Stage(_repair)
CONTINUE = Stage(_continue, applies=_is_ahead)
FRONT = Stage(_fill_front, applies=_are_few)


def from_running(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages from a running placement; from nothing a method's where moves are free."""

    def solve(run: Run, budget: Budget) -> None:
        _take(run, run.inner(stages, budget.within(effort.FRESH_SHARE)))

    fresh = Stage(solve, applies=lambda run: not run.is_priced)
    return (REPAIR, fresh, CONTINUE, FRONT, POLISH)
