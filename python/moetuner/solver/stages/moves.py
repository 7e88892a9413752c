"""Few moves: the search from a running placement that fills a front.

The search goes from few moves upwards. It takes steps down from the running placement, then anneals
at the price of a move, or at falling prices where moves have none, and mixes layers of what it has
found. The budget of moves decides only where this ends, not what happens before. So a larger budget
finds every placement that a smaller one finds, and its best is no worse. A time limit cuts the
search short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

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
from moetuner.solver.stages.front import Front, list_move_limits
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
    """Offer the running placement, or the nearest one that keeps the rules, and return it."""
    slots = repair(run.problem, require_moves(run).initial)
    return run.offer(slots, "running", role=Role.RUNNING, is_start=True)


def _repair(run: Run, _: Budget) -> None:
    """Offer the same as a stage; raise if the budget of moves does not suffice for it."""
    problem, moves, start = run.problem, require_moves(run), offer_running(run)
    if start.moves > moves.most:
        raise ArgumentError(
            f"move_budget {moves.budget:g} is too small: "
            f"initial breaks a rule ({problem.violations(moves.initial)[0]}), and to keep "
            f"all rules takes {start.moves} moves",
            "move_budget",
        )


def _adopt(run: Run, inner: Run) -> Incumbent:
    """Offer the best of an inner run and return it; take over the inner run's bound and details."""
    best = inner.answer()
    is_as_good = best.rank <= run.best.rank
    incumbent = run.offer(best.slots, best.by, role=best.role)
    if run.details == Details():
        run.details = inner.details
    run.cut |= inner.cut
    if is_as_good and inner.bound is not None:
        run.bound = inner.bound
    if inner.interrupted:
        raise KeyboardInterrupt
    return incumbent


def _is_running_best(run: Run) -> bool:
    """Return whether moves are free, and no placement is better than the running one."""
    return not run.is_priced and bool(run.incumbents) and run.best.role is Role.RUNNING


def _continue(run: Run, budget: Budget) -> None:
    """Search all layers from the running placement."""
    stages = (FLOOR, CONSTRUCT, CHAIN_UNDER_CAPS, Stage(anneal), POLISH)
    _adopt(run, run.run_inner(stages, budget, start=run.best.slots))


def fill(front: Front, budget: Budget, limit: float) -> None:
    """Add placements to a front, from few moves upwards, until more experts move than a limit.

    First steps down from the running placement, then searches at prices of a move.
    """
    run, start = front.run, front.running
    limit = int(min(limit, run.problem.capacity.sum()))
    prices = effort.MIXED_PRICES if front.can_mix else effort.JOINED_PRICES
    model = LayerModel(run, prices.number)
    front.add(start)
    path = _step_down(front, model, budget, start, limit)
    if has_few_slots(run) and not front.is_exact:
        _use_up_limits(front, model, budget, path, limit)
    if budget.seconds_left is not None and budget.seconds_left <= budget.elapsed:
        # A search in less time than the steps took adds nothing.
        run.cut = True
        return
    if front.moves.price:
        # Searches at dearer prices gain nothing ("Budgets that rise").
        falling_prices = [front.moves.price]
    else:
        first_price = max(path.steepest, effort.DEAREST * abs(start.value)) * prices.first
        falling_prices = [*(first_price * prices.ratio ** np.arange(prices.number - 1)), 0.0]
    _search_at_prices(front, model, budget, falling_prices, limit)


def find_fewest_moves(
    front: Front, budget: Budget, limit: float, enough: float
) -> Incumbent | None:
    """Return the placement with the fewest moves whose objective is ``enough`` or less.

    None if no placement within the limit of moves has it. Only steps down from the running
    placement are tried, or live rebalancing in layers of many slots. More moves gain more, so
    bisection finds the fewest; the front gets all placements that are tried.
    """
    run, start = front.run, front.running
    limit = int(min(limit, run.problem.capacity.sum()))

    def is_enough(point: Incumbent) -> bool:
        front.add(point, is_start=False)
        return point.value <= enough

    if has_few_slots(run):
        _bisect_steps(front, budget, limit, is_enough)
    else:
        limits = list_move_limits(start.moves, max(limit, start.moves))
        bisect_left(limits, True, key=lambda moves: is_enough(_rebalance(front, moves)))
    return front.fewest_moves(enough)


def _bisect_steps(
    front: Front, budget: Budget, limit: int, is_enough: Callable[[Incumbent], bool]
) -> None:
    """Find by bisection the fewest steps down from the running placement that are enough.

    Paths are searched up to a growing number of moves, until the end of one is enough, or none is
    within the limit.
    """
    run, start = front.run, front.running
    model, most_moves, is_farthest = LayerModel(run), start.moves + effort.FIRST_REACH, False
    while not is_farthest:
        most_moves, initial = min(most_moves, limit), front.moves.initial
        path, interrupted = descend(
            run, model, start.slots, initial, most_moves + 2, budget.within()
        )
        if interrupted:
            raise KeyboardInterrupt
        # Excess over the caps comes before the objective, so no path ends before its least excess.
        lengths = range(int(path.excess.argmin()), path.before(most_moves) + 1)
        if lengths and is_enough(run.judge(path.after(lengths[-1]))):
            bisect_left(lengths, True, key=lambda steps: is_enough(run.judge(path.after(steps))))
            return
        is_farthest = most_moves == limit or path.moves[-1] <= most_moves
        most_moves *= effort.REACH_TIMES


def _rebalance(front: Front, moves: int) -> Incumbent:
    """Return the placement that live rebalancing reaches by at most so many moves.

    In layers of many slots a step down takes long. Live rebalancing sees loads alone, takes a tenth
    of a second, and gains nearly as much (75 layers of 256 experts on 32 devices: 1,024 moves gain
    16.9 us of 240 in 0.1 s, steps 17.4 in 7 s).
    """
    run, start = front.run, front.running
    problem, windows = run.problem, run.objective.windows
    weight = windows.weight / max(float(windows.weight.mean()), 1e-300)
    load = np.ascontiguousarray(windows.load * weight[:, None, None], dtype=np.float64)
    slots, time = np.ascontiguousarray(start.slots), problem.topology.time_of_device
    budget = moves - start.moves
    rebalanced = rebalance(load, slots, budget=budget, time=time, full=problem.fill_slots)
    return run.judge(rebalanced.slots, "moves")


def _step_down(
    front: Front,
    model: LayerModel,
    budget: Budget,
    start: Incumbent,
    limit: int,
    *,
    is_start: bool = False,
) -> Path:
    """Return steps down from a placement, within a limit of moves, after adding their ends.

    The front gets the placement after the last step within each of the rising limits of moves.
    """
    run, initial = front.run, front.moves.initial
    # A limit changes only the last two moves before it, so with two more all steps are the same.
    path, interrupted = descend(run, model, start.slots, initial, limit + 2, budget.within())
    limits = list_move_limits(front.running.moves, min(limit, int(path.moves.max())))
    for steps in sorted({path.before(moves) for moves in limits if moves >= start.moves}):
        front.add(run.judge(path.after(steps), "moves"), is_start=is_start)
    if interrupted:
        raise KeyboardInterrupt
    return path


def _use_up_limits(front: Front, model: LayerModel, budget: Budget, path: Path, limit: int) -> None:
    """Go on from the ends of a path that use fewer moves than their limit allows.

    The path's next step needs more moves than are left, but another step may need fewer. Where the
    best mixtures of layers are known, they use up every limit already.
    """
    run, initial = front.run, front.moves.initial
    for moves in list_move_limits(int(path.moves[0]), limit):
        steps = path.before(moves)
        if path.moves[steps] < moves and not budget.is_over():
            start = path.after(steps)
            extension, interrupted = descend(run, model, start, initial, moves, budget.within())
            end = extension.after(extension.best(moves, 0.0))
            front.add(run.judge(end, "moves"), is_start=False)
            if interrupted:
                raise KeyboardInterrupt


def _search_at_prices(
    front: Front, model: LayerModel, budget: Budget, falling_prices: list[float], limit: int
) -> None:
    """Add the answers of searches at falling prices of a move, until more move than a limit."""
    run = front.run
    limits = list_move_limits(front.running.moves, limit)
    for number, price in enumerate(falling_prices):
        share = budget.within(1 / (len(falling_prices) - number))
        start = front.best_start(price, model.weight)
        answer = _search_at_price(run, share, model, price, start)
        front.add(answer)
        if not front.is_exact:
            front.mix(limits, model.weight)
        # A smaller budget ends here; a larger one has mixed the same rows by now.
        if answer.moves > limit or budget.is_over():
            return
        if _steps_after_searches(run):
            best = run.judge(front.best_start(price, model.weight), "moves")
            farthest = 2 * best.moves + effort.MORE_MOVES
            _step_down(front, model, budget, best, farthest, is_start=True)
    if not front.is_exact:
        front.mix(limits, model.weight)


def _search_at_price(
    run: Run, budget: Budget, model: LayerModel, price: float, start: Slots
) -> Incumbent:
    """Return the answer of a search from slots [L,D,S] at a price of a move."""
    moves = Moves(require_moves(run).initial, cost=price)
    stage = Stage(lambda inner, share: anneal(inner, share, model))
    return _adopt(run, run.run_inner((stage,), budget, moves=moves, start=start))


def _steps_after_searches(run: Run) -> bool:
    """Return whether steps go on from what searches found: not of large layers that survive losses.

    There every device counts, so that steps are many and gain little (36 devices x 16 slots: three
    times as long as the steps from what runs, which take most of the time already).
    """
    return run.objective.is_of_windows or has_few_slots(run)


def _search_front(run: Run, budget: Budget) -> None:
    """Fill a front up to the budget of moves, and offer its best placement."""
    moves = require_moves(run)
    front = Front(run, moves)
    try:
        fill(front, budget, moves.most)
    finally:
        front.add(run.best)
        run.offer(front.best(moves.most).slots, "moves")


def _has_limited_moves(run: Run) -> bool:
    """Return whether moves have a price, or a budget that is neither zero nor unlimited."""
    moves = require_moves(run)
    return moves.most > 0 and bool(moves.price or moves.most < np.inf)


REPAIR = Stage(_repair)
CONTINUE = Stage(_continue, applies=_is_running_best)
FRONT = Stage(_search_front, applies=_has_limited_moves)


def from_running(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages from a running placement.

    Where moves are free, a method's own ``stages`` also solve the problem from scratch.
    """

    def solve(run: Run, budget: Budget) -> None:
        _adopt(run, run.run_inner(stages, budget.within(effort.SEARCH_SHARE)))

    from_scratch = Stage(solve, applies=lambda run: not run.is_priced)
    return (REPAIR, from_scratch, CONTINUE, FRONT, POLISH)
