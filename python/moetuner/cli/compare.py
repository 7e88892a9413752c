"""``moetuner compare``: several methods on the same traffic, judged on what they have not seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click

from moetuner._checks import nth_seed, suggestion
from moetuner.cli import options
from moetuner.cli.options import JUDGING, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.pages import Pages, origin_of
from moetuner.cli.options.serving import ProblemOptions
from moetuner.cli.options.traffic import Source, Traffic
from moetuner.cli.output import Output
from moetuner.evaluation.comparison import Comparison, compare
from moetuner.evaluation.figures import explain
from moetuner.evaluation.units import hold_out, units_of
from moetuner.problem import Problem
from moetuner.report.cells import counted, signed
from moetuner.report.outcome import Outcome, head, remarks, sentences
from moetuner.report.page.data import of_outcomes
from moetuner.solver import ALIASES, METHODS, Result
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
    methods: tuple[str, ...] = option(
        options.Text(options.read_methods, words=METHODS),
        "A,B,C",
        DEFAULT_METHODS,
        help=f"Out of {', '.join(METHODS)}.",
    ),
    holdout: float = option(options.Number(0, 1, max_open=True), "SHARE", 0.5, group=JUDGING),
    splits: int | None = option(click.IntRange(1, 1000), "N", group=JUDGING),
    baseline: str | None = option(str, "METHOD", group=JUDGING),
    search: options.SearchOptions,
    pages: Pages,
    output: Output,
) -> None:
    """Compare methods on traffic that they have not seen.

    Parameters
    ----------
    holdout
        Share of the sequences that methods do not see and are judged on (without sequence labels:
        runs of windows); 0 judges on what they saw.
    splits
        Ways to choose what is held out; with several, gains come with their range too. [default: up
        to 5, as many as fit into 60 seconds]
    baseline
        Method to compare against. [default: eplb, else the first]
    """
    over = _peer(baseline, methods, splits=splits, holdout=holdout)

    def split(number: int) -> Split:
        seed = nth_seed(search.seed, number)
        seen, unseen = hold_out(source.traffic, holdout, seed=seed)
        problem = wanted.problem(source, machine.topology(), seen)
        return Split(number, problem, unseen, replace(search, seed=seed))

    first = split(0)
    problem = first.problem
    output.say(source.describe(), *wanted.explain_problem(problem))
    output.say(_setting(first, source.counted, holdout), "")
    tries = _run(
        lambda number: (split(number) if number else first).outcomes(methods, source),
        splits if splits is not None or holdout else 1,
        output,
    )
    outcomes = tries[0]
    rows = list(outcomes.values())
    output.table(head(problem), [outcome.row() for outcome in rows])
    output.say(*remarks(rows, problem))
    best = min(rows, key=lambda outcome: (outcome.breaks_rules, outcome.result.objective))
    for line in sentences(best):
        output.say(f"{best.result.method}: {line[0].lower()}{line[1:]}")
    comparisons = _gains(tries, over, source, share=holdout, seed=search.seed)
    _show_gains(output, comparisons, over, best.result.method, held_out=holdout > 0)
    gain = {method: comparison.to_dict() for method, comparison in comparisons.items()}
    about = {**asdict(search), "window": source.counted, "threads": source.threads}
    about |= {"holdout": holdout, "splits": len(tries), "baseline": over}
    settings = wanted.problem_settings(problem) | about
    contents: dict[str, Any] = {"input": source.facts(), "settings": settings}
    contents["methods"] = {
        name: {**of.to_dict(), "gain": gain.get(name)} for name, of in outcomes.items()
    }
    rival = outcomes[over] if over in outcomes and over != best.result.method else rows[0]
    traffic = "Unseen traffic of the first split."
    if holdout == 0:
        traffic = "The traffic that the placements were computed from, which flatters them."
    pages.write(
        output, lambda: of_outcomes(rival, best, origin_of(source), contents, traffic=traffic)
    )
    output.finish(contents)


def _peer(
    baseline: str | None, methods: tuple[str, ...], *, splits: int | None, holdout: float
) -> str:
    """Return the method that others are compared with; check that it runs, and the splits."""
    over = baseline or (PEER if PEER in methods else methods[0])
    over = ALIASES.get(over, over)
    if over not in methods:
        raise click.BadParameter(
            f"must be one of the methods {','.join(methods)}, got {over!r:.40}"
            + suggestion(over, methods),
            param_hint="'--baseline'",
        )
    if holdout == 0 and splits is not None and splits > 1:
        raise click.BadParameter(
            f"must be 1 where nothing is held out, got {splits}", param_hint="'--splits'"
        )
    return over


@dataclass(frozen=True)
class Split:
    """The problem of what one split shows, and the traffic that it is judged on."""

    number: int
    problem: Problem
    unseen: Traffic
    search: options.SearchOptions

    def outcomes(self, methods: Sequence[str], source: Source) -> dict[str, Outcome]:
        """Solve with every method, until one is interrupted, and judge on the rest."""
        results: list[Result] = []
        for place, method in enumerate(methods, 1):
            where = f"{place} of {len(methods)}, split {self.number + 1}"
            result = source.solve(method, self.problem, place=where, **asdict(self.search))
            results.append(result.uninterrupted() if self.number else result)
            if result.status == "interrupted":
                break
        return dict(zip(methods, source.judge(results, self.problem, self.unseen), strict=False))


def _run(
    solve: Callable[[int], dict[str, Outcome]], most: int | None, output: Output
) -> list[dict[str, Outcome]]:
    """Try all methods on so many splits, or as time allows, or until somebody interrupts."""
    began, done = time.monotonic(), [solve(0)]
    # Only the first split shows the best so far: gains are of whole splits.
    is_whole = list(done[0].values())[-1].result.status != "interrupted"
    while is_whole and len(done) < (most or SPLITS):
        if most is None and (time.monotonic() - began) * (len(done) + 1) / len(done) > SECONDS:
            break
        try:
            done.append(solve(len(done)))
        except KeyboardInterrupt:
            output.say(f"Interrupted: gains are of {counted(len(done), 'complete split')}.")
            break
    return done


def _gains(
    splits: list[dict[str, Outcome]], over: str, source: Source, **how: Any
) -> dict[str, Comparison]:
    """Compare all methods with one, in the figure nearest to the objective, if it is known.

    Only splits count in which every method ran.
    """
    first = splits[0].get(over)
    if first is None or getattr(first.evaluation, first.worth.figure) is None:
        return {}
    how["units"] = units_of(source.traffic, window=source.replayed, threads=source.threads)
    whole = [split for split in splits if list(split) == list(splits[0])]
    comparisons = {}
    for method in (method for method in splits[0] if method != over):
        pairs = [(split[over].evaluation, split[method].evaluation) for split in whole]
        measure = first.worth.figure
        gain = replace(compare(pairs, [measure], **how)[measure], names=(over, method))
        comparisons[method] = replace(gain, low=None, high=None) if gain.is_too_few else gain
    return comparisons


def _setting(split: Split, window: int | None, holdout: float) -> str:
    """Write what is solved, and what it is judged on."""
    problem, unseen = split.problem, split.unseen
    machine = f"{counted(problem.devices, 'device')} x {counted(problem.slots, 'slot')}"
    if problem.topology.nodes > 1:
        machine += f" in {problem.topology.nodes} nodes"
    cap = "" if problem.max_imbalance is None else f", load cap {problem.max_imbalance:g}"
    windows = f", windows of {window} tokens" if window else ""
    if isinstance(unseen, RoutingTrace):
        judged = counted(unseen.tokens, "unseen token")
    else:
        judged = counted(unseen.windows, "unseen window")
    judged = judged if holdout else "the same traffic"
    return f"{machine}, {problem.regime}, least {problem.goal}{cap}{windows}, judged on {judged}"


def _show_gains(
    output: Output, comparisons: dict[str, Comparison], over: str, best: str, *, held_out: bool
) -> None:
    """Print the table, and the sentence of the method that is best by what it saw."""
    if not comparisons:
        return
    several = len(next(iter(comparisons.values())).splits) > 1
    rows = []
    for method, gain in comparisons.items():
        ends = (min(gain.splits), max(gain.splits)) if several else (gain.low, gain.high)
        rows.append((method, *map(signed, (gain.mean, *ends))))
    columns = ("mean", "least", "most") if several else ("gain", "from", "to")
    output.say("")
    output.table((f"gain over {over}", *columns), rows)
    where = "on unseen traffic" if held_out else "on the traffic that it was computed from"
    if best in comparisons:
        output.say(f"Gain: {where} {comparisons[best].sentence}")
    else:
        output.say(f"Gain: no method has a smaller objective than {over} on what was seen.")
