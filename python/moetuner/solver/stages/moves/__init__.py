"""The stages from a running placement: repair it, solve without a price, and search few moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetuner.solver import effort
from moetuner.solver.budget import Budget
from moetuner.solver.run import Role, Run, Stage
from moetuner.solver.stages.floor import FLOOR
from moetuner.solver.stages.layers import CHAIN_UNDER_CAPS, CONSTRUCT, anneal
from moetuner.solver.stages.moves.filling import fill
from moetuner.solver.stages.moves.front import Front
from moetuner.solver.stages.polish import POLISH
from moetuner.solver.stages.repair import REPAIR


def _is_running_best(run: Run) -> bool:
    """Return whether moves are free, and no placement is better than the running one."""
    return not run.is_priced and bool(run.incumbents) and run.best.role is Role.RUNNING


def _continue(run: Run, budget: Budget) -> None:
    """Search all layers from the running placement."""
    stages = (FLOOR, CONSTRUCT, CHAIN_UNDER_CAPS, Stage(anneal), POLISH)
    run.adopt(run.run_inner(stages, budget, start=run.best.slots))


def _has_limited_moves(run: Run) -> bool:
    """Return whether moves have a price, or a budget that is neither zero nor unlimited."""
    moves = run.require_moves()
    return moves.most > 0 and bool(moves.price or moves.most < np.inf)


def _search_front(run: Run, budget: Budget) -> None:
    """Fill a front up to the budget of moves, and offer its best placement."""
    front = Front(run)
    try:
        fill(front, budget, front.moves.most)
    finally:
        front.add(run.best)
        run.offer(front.best(front.moves.most).slots, "moves")


CONTINUE = Stage(_continue, applies=_is_running_best)
FRONT = Stage(_search_front, applies=_has_limited_moves)


def from_running(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return the stages from a running placement.

    Where moves are free, a method's own ``stages`` also solve the problem from scratch.
    """

    def solve(run: Run, budget: Budget) -> None:
        run.adopt(run.run_inner(stages, budget.within(effort.SEARCH_SHARE)))

    from_scratch = Stage(solve, applies=lambda run: not run.is_priced)
    return (REPAIR, from_scratch, CONTINUE, FRONT, POLISH)
