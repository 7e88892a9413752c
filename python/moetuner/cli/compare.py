"""``moetuner compare``: several methods on the same traffic, judged on what they have not seen."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moetuner._checks import nth_seed
from moetuner.cli import options
from moetuner.cli.attempt import judge, solve_with
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.problem import ProblemOptions, problem_options
from moetuner.cli.options.traffic import Source, Traffic, traffic_options
from moetuner.cli.output import Output
from moetuner.cli.reporting import write_comparison
from moetuner.evaluation.units import hold_out, units_of
from moetuner.problem import Problem
from moetuner.report.cells import counted
from moetuner.report.gains import Gain, gains
from moetuner.report.outcome import Outcome, head, remarks, sentences
from moetuner.solver import ALIASES, METHODS, Result
from moetuner.trace import RoutingTrace

DEFAULT_METHODS = "contiguous,lpt,eplb,paper,joint"
# Splits where nobody says how many: so counted, as long as another one ends within so many seconds.
SPLITS, SECONDS = 5, 60
# Methods are compared with this one, if it is among them.
PEER = "eplb"


def parse_methods(
    context: click.Context, parameter: click.Parameter, value: str
) -> tuple[str, ...]:
    """Split a list of methods; each is tried once."""
    given = (name.strip() for name in value.split(",") if name.strip())
    names = tuple(dict.fromkeys(ALIASES.get(name, name) for name in given))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise click.BadParameter(
            f"must be some of {','.join(METHODS)}, got {unknown[0] if unknown else value!r}"
            + (options.suggestion(unknown[0], METHODS) if unknown else "")
        )
    return names


@click.command(
    "compare",
    cls=options.Grouped,
    begin_with="--devices --devices-per-node --for --methods --report",
)
@traffic_options
@machine_options
@problem_options
@click.option(
    "--holdout",
    cls=options.Option,
    group=options.JUDGING,
    type=options.Number(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of the sequences that methods do not see and are judged on (without sequence "
    "labels: runs of windows); 0 judges on what they saw.",
)
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    callback=parse_methods,
    metavar="A,B,C",
    help=f"Out of {', '.join(METHODS)}.",
)
@click.option(
    "--splits",
    cls=options.Option,
    group=options.JUDGING,
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Ways to choose what is held out; with several, gains come with their range too.  "
    f"[default: up to {SPLITS}, as many as fit into {SECONDS} seconds]",
)
@click.option(
    "--baseline",
    cls=options.Option,
    group=options.JUDGING,
    metavar="METHOD",
    help=f"One of the methods, over which gains are told.  [default: {PEER}, else the first]",
)
@options.search_options
@options.report_option
@options.figures_option
@options.json_option
def command(
    source: Source,
    machine: Machine,
    wanted: ProblemOptions,
    holdout: float,
    methods: tuple[str, ...],
    splits: int | None,
    baseline: str | None,
    search: options.SearchOptions,
    report_file: Path | None,
    json_file: Path | None,
) -> None:
    """Compare methods on traffic that they have not seen.

    imbalance: max / mean device load, averaged over layers and windows as they arrive (--arrival);
    mixed: of windows in which sequences are served together; total: of the sum of all windows;
    crossing: share of transitions between devices; fanout, nodes: devices and nodes that a token
    visits in a layer; layer us: predicted time of a layer. objective and gap are the solver's, on
    what it saw: a time, an imbalance, or the crossing weighed by links (in regime dispatch: the
    fanout and, at what their links cost more, nodes; without expert sets, co-activations apart).
    The table is of the first split; gains are of all of them, on what was not seen. Splits overlap,
    so that all of them agree is no evidence: the last sentence is by the interval of 95 %.
    """
    over = baseline or (PEER if PEER in methods else methods[0])
    over = ALIASES.get(over, over)
    if over not in methods:
        raise click.BadParameter(
            f"must be one of the methods {','.join(methods)}, got {over!r:.40}",
            param_hint="'--baseline'",
        )
    if holdout == 0 and splits is not None and splits > 1:
        raise click.BadParameter(
            f"must be 1 where nothing is held out, got {splits}", param_hint="'--splits'"
        )
    topology, seed = machine.topology(), search.seed
    window, threads = source.counted, source.threads
    seen, unseen = hold_out(source.traffic, holdout, seed=seed)
    problem = wanted.problem(seen, topology, window=window, threads=threads)

    output = Output(json_file)
    output.say(source.describe())
    if wanted.engine is not None:
        output.say(wanted.explain_problem(problem))
    output.say(_setting(problem, window, holdout, unseen))
    output.say()
    began = time.monotonic()
    all_splits: list[dict[str, Outcome]] = []

    def split(number: int) -> dict[str, Outcome]:
        """Solve with every method on what one split shows it, and judge on the rest."""
        of = nth_seed(seed, number)
        seen, unseen = hold_out(source.traffic, holdout, seed=of)
        mine = wanted.problem(seen, topology, window=window, threads=threads) if number else problem
        results: dict[str, Result] = {}
        for place, method in enumerate(methods, 1):
            where = f"{place} of {len(methods)}, split {number + 1}"
            how: dict[str, Any] = {**asdict(search), "seed": of, "threads": threads}
            result = solve_with(method, mine, place=where, **how)
            # Only the first split shows the best so far: gains are of whole splits.
            results[method] = result if not number else result.uninterrupted()
            if result.status == "interrupted":
                break
        judged = judge(
            list(results.values()), mine, unseen, window=source.replayed, threads=threads
        )
        return dict(zip(results, judged, strict=True))

    while _goes_on(splits, holdout, len(all_splits), began):
        try:
            all_splits.append(split(len(all_splits)))
        except KeyboardInterrupt:
            if not all_splits:
                raise
            output.say(f"Interrupted: gains are of {counted(len(all_splits), 'complete split')}.")
            break
        if list(all_splits[-1].values())[-1].result.status == "interrupted":
            break
    first = list(all_splits[0].values())
    output.table(head(problem), [outcome.row() for outcome in first])
    for line in remarks(first, problem):
        output.say(line)
    best = min(first, key=lambda outcome: (outcome.breaks_rules, outcome.result.objective))
    for line in sentences(best):
        output.say(f"{best.result.method}: {line[0].lower()}{line[1:]}")
    found: list[Gain] = []
    if over in all_splits[0]:
        units = units_of(source.traffic, window=source.replayed, threads=threads)
        found = gains(all_splits, over, units, share=holdout, seed=seed)
    _show_gains(output, found, best.result.method, held_out=holdout > 0)
    told = {each.method: each.to_dict() for each in found}
    contents = {
        "input": source.facts(),
        "settings": {
            **wanted.problem_settings(problem),
            "window": window,
            **asdict(search),
            "holdout": holdout,
            "threads": threads,
            "splits": len(all_splits),
            "baseline": over,
        },
        "methods": {
            method: {**outcome.to_dict(), "gain": told.get(method)}
            for method, outcome in all_splits[0].items()
        },
    }
    if report_file is not None or options.figures_folder() is not None:
        outcomes = all_splits[0]
        rival = over if over in outcomes and over != best.result.method else first[0].result.method
        _, unseen = hold_out(source.traffic, holdout, seed=seed)
        write_comparison(
            report_file,
            source,
            outcomes[rival],
            best,
            contents,
            output,
            traffic=_judged_on(holdout),
            judged_on=unseen,
        )
    output.finish(contents)


def _judged_on(holdout: float) -> str:
    if holdout == 0:
        return "The traffic that the placements were computed from, which flatters them."
    return "Unseen traffic of the first split."


def _goes_on(splits: int | None, holdout: float, done: int, began: float) -> bool:
    """Whether one more split is due after so many."""
    if done == 0 or splits is not None:
        return done < (splits or 1)
    took = time.monotonic() - began
    return holdout > 0 and done < SPLITS and took * (done + 1) / done <= SECONDS


def _setting(problem: Problem, window: int | None, holdout: float, unseen: Traffic) -> str:
    machine = f"{counted(problem.devices, 'device')} x {counted(problem.slots, 'slot')}"
    if problem.topology.nodes > 1:
        machine += f" in {problem.topology.nodes} nodes"
    wanted = f"least {problem.goal}"
    if problem.max_imbalance is not None:
        wanted += f", load cap {problem.max_imbalance:g}"
    windows = f", windows of {window} tokens" if window else ""
    if holdout == 0:
        judged = "judged on the same traffic"
    elif isinstance(unseen, RoutingTrace):
        judged = f"judged on {counted(unseen.tokens, 'unseen token')}"
    else:
        judged = f"judged on {counted(unseen.windows, 'unseen window')}"
    return f"{machine}, {problem.regime}, {wanted}{windows}, {judged}"


def _show_gains(output: Output, found: list[Gain], best: str, *, held_out: bool) -> None:
    """Print the table, and the sentence of the method that is best by what it saw."""
    if not found:
        return
    over, splits = found[0].over, len(found[0].splits)
    head = f"gain over {over}"
    ends = ("least", "most") if splits > 1 else ("from", "to")
    output.say()
    output.table((head, "mean" if splits > 1 else "gain", *ends), [each.row() for each in found])
    told = {each.method: each for each in found}
    where = "on unseen traffic" if held_out else "on the traffic that it was computed from"
    if best in told:
        output.say(f"Gain: {told[best].sentence(where)}")
    else:
        output.say(f"Gain: no method has a smaller objective than {over} on what was seen.")
