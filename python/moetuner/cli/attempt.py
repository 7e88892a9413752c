"""Trying a method while somebody waits: what it finds, judged on the traffic that is wanted."""

from __future__ import annotations

from typing import Any

from moetuner.cli.options.traffic import Traffic
from moetuner.cli.output import working
from moetuner.evaluation import evaluate
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.outcome import Outcome
from moetuner.solver import solve


def try_method(
    method: str,
    problem: Problem,
    judged_on: Traffic,
    *,
    window: int | None,
    seed: int,
    time_limit: float | None = None,
    threads: int | None = None,
    place: str = "",
    **moving: Any,
) -> Outcome:
    """Solve, and evaluate the placement on other traffic; ``moving`` as for ``solve``.

    ``place`` is how far the whole is, for who waits.
    """
    with working(f"solving, {method}{place and f' ({place})'}") as progress:
        result = solve(
            problem,
            method,
            seed=seed,
            time_limit=time_limit,
            threads=threads,
            progress=progress,
            **moving,
        )
    with working(f"replaying {method}"):
        evaluation = evaluate(
            result.placement,
            judged_on,
            problem.topology,
            window=window,
            split=problem.split,
            cost_model=Objective(problem).cost_model,
            regime=problem.regime,
            threads=threads,
        )
    return Outcome(problem, result, evaluation)
