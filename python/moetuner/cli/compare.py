"""``moetuner compare``: several methods on the same traffic, judged on what they have not seen."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any

import click

from moetuner._checks import nth_seed
from moetuner.cli import options
from moetuner.cli.options import option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.pages import Pages, origin_of
from moetuner.cli.options.serving import ProblemOptions
from moetuner.cli.options.traffic import Source, Traffic
from moetuner.cli.output import Output
from moetuner.evaluation.comparison import Comparison, compare
from moetuner.evaluation.figures import explain
from moetuner.evaluation.units import hold_out, units_of
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.cells import counted, signed
from moetuner.report.outcome import Outcome, head, remarks, sentences
from moetuner.report.page.data import of_outcomes
from moetuner.solver import ALIASES, METHODS, Result
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

DEFAULT_METHODS = "contiguous,lpt,eplb,paper,joint"
# Splits where nobody says how many: so counted, as long as another one ends within so many seconds.
SPLITS, SECONDS = 5, 60
# Methods are compared with this one, if it is among them.
PEER = "eplb"


TEXT = f"""Compare methods on traffic that they have not seen.

{
    explain(
        *("imbalance", "imbalance_mixed", "imbalance_total", "crossing", "fanout", "node_fanout"),
        "predicted_layer_us",
    )
}. objective and gap are the solver's, on what it saw: a time, an imbalance, or the crossing
weighed by links (in regime dispatch: the fanout and, at what their links cost more, nodes; without
expert sets, co-activations apart). The table is of the first split; gains are of all of them, on
what was not seen. Splits overlap, so that all of them agree is no evidence: the last sentence is by
the interval of 95 %.
"""


@dataclass(frozen=True)
class Judging:
    """What is compared, and on what it is judged.

    Parameters
    ----------
    holdout
        Share of the sequences that methods do not see and are judged on (without sequence labels:
        runs of windows); 0 judges on what they saw.
    baseline
        Method to compare against. [default: eplb, else the first]
    """

    methods: Annotated[
        tuple[str, ...],
        option(
            options.Text(options.read_methods),
            "A,B,C",
            default=DEFAULT_METHODS,
            help=f"Out of {', '.join(METHODS)}.",
        ),
    ]
    holdout: Annotated[
        float, option(options.Number(0, 1, max_open=True), "SHARE", group=options.JUDGING)
    ] = 0.5
    splits: Annotated[
        int | None,
        option(
            click.IntRange(1, 1000),
            "N",
            group=options.JUDGING,
            help="Ways to choose what is held out; with several, gains come with their range too.  "
            f"[default: up to {SPLITS}, as many as fit into {SECONDS} seconds]",
        ),
    ] = None
    baseline: Annotated[str | None, option(str, "METHOD", group=options.JUDGING)] = None

    def __post_init__(self) -> None:
        if self.over not in self.methods:
            raise click.BadParameter(
                f"must be one of the methods {','.join(self.methods)}, got {self.over!r:.40}",
                param_hint="'--baseline'",
            )
        if self.holdout == 0 and self.splits is not None and self.splits > 1:
            raise click.BadParameter(
                f"must be 1 where nothing is held out, got {self.splits}", param_hint="'--splits'"
            )

    @property
    def over(self) -> str:
        """The method that gains are over."""
        given = self.baseline or (PEER if PEER in self.methods else self.methods[0])
        return ALIASES.get(given, given)

    def goes_on(self, done: int, took: float) -> bool:
        """Whether one more split is due after so many, which took so many seconds."""
        if self.splits is not None:
            return done < self.splits
        return self.holdout > 0 and done < SPLITS and took * (done + 1) / done <= SECONDS


@options.command(
    "compare",
    help=TEXT,
    begin_with="--devices --devices-per-node --for --methods --report",
)
def command(
    *,
    source: Source,
    machine: Machine,
    wanted: ProblemOptions,
    judging: Judging,
    search: options.SearchOptions,
    pages: Pages,
    output: Output,
) -> None:
    """Compare methods on traffic that they have not seen."""
    over, holdout = judging.over, judging.holdout
    trials = _Trials(source, machine.topology(), wanted, judging, search)
    problem, unseen = trials.first
    output.say(source.describe(), *wanted.explain_problem(problem))
    output.say(_setting(problem, source.counted, holdout, unseen), "")
    all_splits = trials.run(output)
    outcomes = all_splits[0]
    first = list(outcomes.values())
    output.table(head(problem), [outcome.row() for outcome in first])
    output.say(*remarks(first, problem))
    best = min(first, key=lambda outcome: (outcome.breaks_rules, outcome.result.objective))
    for line in sentences(best):
        output.say(f"{best.result.method}: {line[0].lower()}{line[1:]}")
    comparisons = trials.gains(all_splits)
    _show_gains(output, comparisons, over, best.result.method, held_out=holdout > 0)
    contents = {
        "input": source.facts(),
        "settings": {
            **wanted.problem_settings(problem),
            "window": source.counted,
            **asdict(search),
            "holdout": holdout,
            "threads": source.threads,
            "splits": len(all_splits),
            "baseline": over,
        },
        "methods": {
            method: {
                **outcome.to_dict(),
                "gain": comparisons[method].to_dict() if method in comparisons else None,
            }
            for method, outcome in outcomes.items()
        },
    }
    rival = over if over in outcomes and over != best.result.method else first[0].result.method
    traffic = "Unseen traffic of the first split."
    if holdout == 0:
        traffic = "The traffic that the placements were computed from, which flatters them."
    pages.write(
        output,
        lambda: of_outcomes(*(outcomes[rival], best, origin_of(source), contents), traffic=traffic),
    )
    output.finish(contents)


@dataclass(frozen=True)
class _Trials:
    """All methods, on one split of the traffic after the other."""

    source: Source
    topology: Topology
    wanted: ProblemOptions
    judging: Judging
    search: options.SearchOptions

    def parts(self, number: int) -> tuple[Problem, Traffic]:
        """Return the problem of what one split shows, and the traffic that it is judged on."""
        source, seed = self.source, nth_seed(self.search.seed, number)
        seen, unseen = hold_out(source.traffic, self.judging.holdout, seed=seed)
        return self.wanted.problem(source, self.topology, seen), unseen

    @cached_property
    def first(self) -> tuple[Problem, Traffic]:
        """The parts of the first split."""
        return self.parts(0)

    def run(self, output: Output) -> list[dict[str, Outcome]]:
        """Try all methods on splits until there are enough, or somebody interrupts."""
        began, done = time.monotonic(), [self.split(0)]
        while self.judging.goes_on(len(done), time.monotonic() - began):
            # Only the first split shows the best so far: gains are of whole splits.
            if list(done[0].values())[-1].result.status == "interrupted":
                break
            try:
                done.append(self.split(len(done)))
            except KeyboardInterrupt:
                output.say(f"Interrupted: gains are of {counted(len(done), 'complete split')}.")
                break
        return done

    def gains(self, splits: list[dict[str, Outcome]]) -> dict[str, Comparison]:
        """Compare all methods with one, in the figure nearest to the objective, if it is known.

        Only splits count in which every method ran.
        """
        over, first, source = self.judging.over, splits[0], self.source
        measure = Objective(self.first[0]).figure
        if over not in first or getattr(first[over].evaluation, measure) is None:
            return {}
        units = units_of(source.traffic, window=source.replayed, threads=source.threads)
        whole = [split for split in splits if set(split) == set(first)]
        how: dict[str, Any] = {
            "units": units,
            "share": self.judging.holdout,
            "seed": self.search.seed,
        }
        comparisons = {}
        for method in first:
            if method != over:
                pairs = [(split[over].evaluation, split[method].evaluation) for split in whole]
                gain = replace(compare(pairs, [measure], **how)[measure], names=(over, method))
                few = gain.is_too_few
                comparisons[method] = replace(gain, low=None, high=None) if few else gain
        return comparisons

    def split(self, number: int) -> dict[str, Outcome]:
        """Solve with every method on what one split shows it, and judge on the rest."""
        problem, unseen = self.parts(number) if number else self.first
        how = {**asdict(self.search), "seed": nth_seed(self.search.seed, number)}
        results: list[Result] = []
        methods = self.judging.methods
        for place, method in enumerate(methods, 1):
            where = f"{place} of {len(methods)}, split {number + 1}"
            result = self.source.solve(method, problem, place=where, **how)
            results.append(result.uninterrupted() if number else result)
            if result.status == "interrupted":
                break
        return dict(zip(methods, self.source.judge(results, problem, unseen), strict=False))


def _setting(problem: Problem, window: int | None, holdout: float, unseen: Traffic) -> str:
    machine = f"{counted(problem.devices, 'device')} x {counted(problem.slots, 'slot')}"
    if problem.topology.nodes > 1:
        machine += f" in {problem.topology.nodes} nodes"
    wanted = f"least {problem.goal}"
    if problem.max_imbalance is not None:
        wanted += f", load cap {problem.max_imbalance:g}"
    windows = f", windows of {window} tokens" if window else ""
    if isinstance(unseen, RoutingTrace):
        judged = counted(unseen.tokens, "unseen token")
    else:
        judged = counted(unseen.windows, "unseen window")
    judged = judged if holdout else "the same traffic"
    return f"{machine}, {problem.regime}, {wanted}{windows}, judged on {judged}"


def _show_gains(
    output: Output, comparisons: dict[str, Comparison], over: str, best: str, *, held_out: bool
) -> None:
    """Print the table, and the sentence of the method that is best by what it saw."""
    if not comparisons:
        return
    several = len(next(iter(comparisons.values())).splits) > 1
    head = (
        f"gain over {over}",
        *(("mean", "least", "most") if several else ("gain", "from", "to")),
    )
    rows = []
    for method, gain in comparisons.items():
        ends = (min(gain.splits), max(gain.splits)) if several else (gain.low, gain.high)
        rows.append((method, *map(signed, (gain.gain, *ends))))
    output.say("")
    output.table(head, rows)
    where = "on unseen traffic" if held_out else "on the traffic that it was computed from"
    if best in comparisons:
        output.say(f"Gain: {where} {comparisons[best].sentence}")
    else:
        output.say(f"Gain: no method has a smaller objective than {over} on what was seen.")
