"""``moetuner solve``: compute a placement and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moetuner.cli import moving as moves
from moetuner.cli import options
from moetuner.cli.asked import Asked, problem_options, settings
from moetuner.cli.inputs import Source, traffic_options
from moetuner.cli.machine import Machine, machine_options
from moetuner.cli.moving import Moving, moving_options
from moetuner.cli.outcome import head, remarks, sentences, try_method
from moetuner.cli.output import Output, number
from moetuner.solver import METHODS
from moetuner.solver.migration import check
from moetuner.solver.result import Result


@click.command("solve")
@traffic_options
@machine_options
@problem_options
@moving_options
@options.time_limit_option
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="joint",
    show_default=True,
    help="joint, the paper's two stages (moetuner), the search alone, or a baseline.",
)
@options.seed_option
@click.option(
    "--out",
    "out_file",
    type=options.OutFile(),
    default="placement.json",
    show_default=True,
    metavar="FILE",
    help="Placement to write, as JSON.",
)
@click.option(
    "--certificate",
    "certificate_file",
    type=options.OutFile(),
    metavar="FILE",
    help='Write the proof of the bound, for "moetuner verify".',
)
@options.json_option
def command(
    source: Source,
    machine: Machine,
    asked: Asked,
    moving: Moving,
    time_limit: float | None,
    method: str,
    seed: int,
    out_file: Path,
    certificate_file: Path | None,
    json_file: Path | None,
) -> None:
    """Compute a placement for all of INPUT and write it.

    Ctrl-C writes the best placement so far. "moetuner compare" says what to expect on traffic that
    the solver has not seen.
    """
    topology, initial = machine.topology(), moving.initial()
    window, threads = source.counted, source.threads
    problem = asked.problem(source.traffic, topology, window=window, threads=threads)
    if initial is not None:
        check(problem, initial)  # before anything is said
    how: dict[str, Any] = {"seed": seed, "threads": threads}

    output = Output(json_file)
    output.say(source.describe())
    outcome = try_method(
        method,
        problem,
        source.traffic,
        window=source.replayed,
        time_limit=time_limit,
        **how,
        **moving.arguments(initial),
    )
    # Written before anything is said about it: a closed pipe must not lose the answer.
    outcome.result.placement.save(out_file)
    output.say()
    outcomes = [outcome]
    if method != "contiguous" and outcome.result.status != "interrupted":
        before = try_method("contiguous", problem, source.traffic, window=source.replayed, **how)
        outcomes.insert(0, before)
    output.table(head(problem), [each.row() for each in outcomes])
    for line in (*remarks([outcome], problem), *sentences(outcome)):
        output.say(line)
    if problem.goal == "time" and source.replayed is not None:
        # Counts know windows and expert sets, but not which sets were in which window.
        replayed = outcome.evaluation.predicted_layer_us
        output.say(f"Replayed token by token: {number(replayed, 1)} us per layer.")
    answer: dict[str, Any] = {}
    if initial is not None:
        diff = initial.diff(outcome.result.placement, topology=topology)
        for line in moves.sentences(diff, topology, moving):
            output.say(line)
        moves.show_pairs(output, diff)
        known = moving.expert_bytes is not None
        bytes_moved = diff.experts_moved * moving.each if known else None
        answer["moves"] = {**diff.to_dict(), "bytes_moved": bytes_moved}
        if moving.wants_pareto and outcome.result.status != "interrupted":
            answer["pareto"] = moves.show_pareto(
                output, problem, initial, moving, time_limit=time_limit, **how
            )
    output.say(f"wrote {out_file}")
    if certificate_file is not None:
        output.say(_prove(outcome.result, certificate_file))
    output.finish(
        {
            "input": source.facts(),
            "settings": {
                **settings(problem),
                **moving.settings(),
                "window": window,
                "time_limit": time_limit,
                **how,
            },
            "placement": str(out_file),
            "method": method,
            **outcome.to_dict(),
            **answer,
        }
    )


def _prove(result: Result, path: Path) -> str:
    """Write the certificate of a bound, and say so."""
    if result.certificate is None:
        source = result.bound_source or "no bound"
        return f"no certificate: {source} has no multipliers to write"
    result.certificate.save(path)
    return f"wrote {path}"
