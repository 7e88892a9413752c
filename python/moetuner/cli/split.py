"""INPUT in two parts: the problem of the one, and the traffic that its placements are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetuner.cli.options.traffic import Source
from moetuner.cli.output import show_shares, working
from moetuner.evaluation.options import ReplayOptions
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.report.outcome import Outcome, replay_results
from moetuner.serving import Serving
from moetuner.solver import Result


@dataclass(frozen=True)
class TrafficSplit:
    """The problem of the seen part of INPUT, and the part that its placements are judged on.

    That is the share ``holdout`` of INPUT, all of it if nothing is held out, as ``serving`` says.
    """

    source: Source
    holdout: float
    problem: Problem
    judged_on: Recording
    serving: Serving

    @property
    def is_held_out(self) -> bool:
        """True if placements are judged on traffic that they were not computed from."""
        return self.holdout > 0

    def replay(self, results: Sequence[Result], *, by_group: bool = True) -> list[Outcome]:
        """Evaluate the placements of results on the unseen part, by default also by group."""
        with working("replaying") as report:
            return replay_results(
                results,
                self.problem,
                self.serving,
                self.judged_on,
                ReplayOptions(threads=self.source.threads),
                by_group=by_group,
                progress=show_shares(report, "of the tokens", then="figures"),
            )
