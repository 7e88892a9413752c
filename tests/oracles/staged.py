"""Stages of the solver by themselves: runs through a few, for what `solve` does not show."""

from __future__ import annotations

from typing import Any

import moetuner as mt
from moetuner.solver.budget import Budget
from moetuner.solver.run import Moves, Run, Stage


def staged(
    problem: mt.Problem,
    *stages: Stage,
    start: Any = None,
    initial: mt.Placement | None = None,
    seed: int = 0,
    **effort: Any,
) -> Run:
    """Return a run through stages, from slots [L,D,S] that are offered first if there are some."""
    moves = None if initial is None else Moves(initial)
    run = Run(problem, seed=seed, budget=Budget(**effort), moves=moves)
    if start is not None:
        run.offer(start, "start", is_start=True)
    run.through(stages)
    return run
