"""Trying a method while somebody waits: what it finds, judged on the traffic that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moetuner.cli.options.traffic import Traffic
from moetuner.cli.output import shares, working
from moetuner.problem import Problem
from moetuner.report import outcome
from moetuner.report.outcome import Outcome
from moetuner.solver import Result, solve


def solve_with(method: str, problem: Problem, *, place: str = "", **how: Any) -> Result:
    """Solve, and show how far that is; ``how`` as for ``solve``.

    ``place`` is how far the whole is, for who waits.
    """
    with working(f"solving, {method}{place and f' ({place})'}") as progress:
        return solve(problem, method, progress=progress, **how)


def judge(
    results: Sequence[Result],
    problem: Problem,
    judged_on: Traffic,
    *,
    window: int | None,
    threads: int | None,
) -> list[Outcome]:
    """Evaluate placements on other traffic, which is read once for all of them."""
    with working("replaying") as report:
        evaluations = outcome.judge(
            [result.placement for result in results],
            problem,
            judged_on,
            window=window,
            threads=threads,
            progress=shares(report, "of the tokens"),
        )
    return [
        Outcome(problem, result, evaluation)
        for result, evaluation in zip(results, evaluations, strict=True)
    ]
