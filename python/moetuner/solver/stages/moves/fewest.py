"""The fewest moves that gain enough: more moves gain more, so bisection finds them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.rebalancing import rebalance
from moetuner.solver.run import Incumbent
from moetuner.solver.stages.descent import descend
from moetuner.solver.stages.layers import LayerModel, has_few_slots
from moetuner.solver.stages.moves.front import Front, list_move_limits


def find_fewest_moves(
    front: Front, budget: Budget, limit: float, enough: float
) -> Incumbent | None:
    """Return the placement with the fewest moves whose objective is ``enough`` or less.

    None if no placement within the limit of moves has it. Only steps down from the running
    placement are tried, or live rebalancing in layers of many slots. The front gets all placements
    that are tried.
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
