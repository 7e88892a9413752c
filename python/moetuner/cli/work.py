"""Count and solve with progress on the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from moetuner import solver
from moetuner.cli.output import show_shares, working
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.solver import Method, Result
from moetuner.statistics import RoutingStatistics, as_counts


def count(
    recording: Recording, counted: Callable[..., RoutingStatistics] = as_counts, **options: Any
) -> RoutingStatistics:
    """Count a trace in windows; return statistics as they are.

    ``counted`` is ``as_counts`` or ``count_loads``, whose ``options`` follow.
    """
    if isinstance(recording, RoutingStatistics):
        return recording
    with working("counting") as report:
        progress = show_shares(report, "of the tokens", then="tables")
        return counted(recording, progress=progress, **options)


def solve(problem: Problem, method: str, *, place: str = "", **arguments: Any) -> Result:
    """Solve; ``place`` says which of several solves this is, ``arguments`` are as for ``solve``."""
    label = f"solving, {method}{place and f' ({place})'}"
    with working(label, time_limit=arguments.get("time_limit")) as progress:
        return solver.solve(problem, cast(Method, method), progress=progress, **arguments)
