"""``moetuner compare``: several methods on the same traffic, judged on what they have not seen."""

from __future__ import annotations

from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.asked import Asked, problem_options, settings
from moetuner.cli.inputs import Source, Traffic, traffic_options
from moetuner.cli.machine import Machine, machine_options
from moetuner.cli.outcome import Outcome, head, remarks, sentences, try_method
from moetuner.cli.output import Output
from moetuner.holdout import hold_out
from moetuner.problem import Problem
from moetuner.solver import METHODS
from moetuner.trace import RoutingTrace

DEFAULT_METHODS = "contiguous,lpt,eplb,moetuner,joint"


def parse_methods(
    context: click.Context, parameter: click.Parameter, value: str
) -> tuple[str, ...]:
    """Split a list of methods; each is tried once."""
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise click.BadParameter(
            f"must be some of {','.join(METHODS)}, got {unknown[0] if unknown else value!r}"
        )
    return names


@click.command("compare")
@traffic_options
@machine_options
@problem_options
@options.time_limit_option
@click.option(
    "--holdout",
    type=options.Number(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of the sequences (of a load table: windows) that methods do not see and are judged "
    "on; 0 judges on what they saw.",
)
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    callback=parse_methods,
    metavar="A,B,C",
    help=f"Out of {', '.join(METHODS)}.",
)
@options.seed_option
@options.json_option
def command(
    source: Source,
    machine: Machine,
    asked: Asked,
    time_limit: float | None,
    holdout: float,
    methods: tuple[str, ...],
    seed: int,
    json_file: Path | None,
) -> None:
    """Compare methods on traffic that they have not seen.

    imbalance: max / mean device load, averaged over layers and windows in the order of INPUT;
    mixed: of windows in which sequences are served together; total: of the sum of all windows;
    crossing: share of transitions between devices; fanout, nodes: devices and nodes that a token
    visits in a layer; layer us: predicted time of a layer. objective and gap are the solver's, on
    what it saw: a time, an imbalance, or the crossing weighed by links (in regime dispatch: the
    fanout and, at what their links cost more, nodes; without expert sets, co-activations apart).
    """
    topology = machine.topology()
    window, threads = source.counted, source.threads
    seen, unseen = hold_out(source.traffic, holdout, seed=seed)
    problem = asked.problem(seen, topology, window=window, threads=threads)

    output = Output(json_file)
    output.say(source.describe())
    output.say(_setting(problem, window, holdout, unseen))
    output.say()
    outcomes: list[Outcome] = []
    for method in methods:
        outcomes.append(
            try_method(
                method,
                problem,
                unseen,
                window=source.replayed,
                seed=seed,
                time_limit=time_limit,
                threads=threads,
            )
        )
        if outcomes[-1].result.status == "interrupted":
            break
    output.table(head(problem), [outcome.row() for outcome in outcomes])
    for line in remarks(outcomes, problem):
        output.say(line)
    best = min(outcomes, key=lambda outcome: (outcome.breaks_rules, outcome.result.objective))
    for line in sentences(best):
        output.say(f"{best.result.method}: {line[0].lower()}{line[1:]}")
    output.finish(
        {
            "input": source.facts(),
            "settings": {
                **settings(problem),
                "window": window,
                "seed": seed,
                "time_limit": time_limit,
                "holdout": holdout,
                "threads": threads,
            },
            "methods": {outcome.result.method: outcome.to_dict() for outcome in outcomes},
        }
    )


def _setting(problem: Problem, window: int | None, holdout: float, unseen: Traffic) -> str:
    machine = f"{problem.devices} devices x {problem.slots} slots"
    if problem.topology.nodes > 1:
        machine += f" in {problem.topology.nodes} nodes"
    wanted = f"least {problem.goal}"
    if problem.max_imbalance is not None:
        wanted += f", load cap {problem.max_imbalance:g}"
    windows = f", windows of {window} tokens" if window else ""
    if holdout == 0:
        judged = "judged on the same traffic"
    elif isinstance(unseen, RoutingTrace):
        judged = f"judged on {unseen.tokens:,} unseen tokens"
    else:
        judged = f"judged on {unseen.windows:,} unseen windows"
    return f"{machine}, {problem.regime}, {wanted}{windows}, {judged}"
