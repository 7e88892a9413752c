"""Count, solve and replay with progress on the screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from moetuner import solver
from moetuner.cli.output import show_shares, working
from moetuner.evaluation.options import ReplayOptions
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.report import outcome
from moetuner.report.outcome import Outcome
from moetuner.serving import Serving
from moetuner.solver import Method, Result
from moetuner.statistics import RoutingStatistics, as_counts


@dataclass(frozen=True)
class TrafficSplit:
    """The problem of the seen part of INPUT, and the part that its placements are judged on.

    That is all of INPUT where nothing is held out. It is served in the windows of ``serving``.
    """

    problem: Problem
    judged_on: Recording
    serving: Serving

    def replay(
        self, results: Sequence[Result], *, threads: int | None, by_group: bool = True
    ) -> list[Outcome]:
        """Evaluate the placements of results on the unseen part, by default also by group."""
        with working("replaying") as report:
            return outcome.replay_results(
                results,
                self.problem,
                self.serving,
                self.judged_on,
                ReplayOptions(threads=threads),
                by_group=by_group,
                progress=show_shares(report, "of the tokens", then="figures"),
            )


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
