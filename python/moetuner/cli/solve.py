"""``moetuner solve``: compute a placement and write it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from moetuner.cli import options
from moetuner.cli.attempt import judge, solve_with
from moetuner.cli.options import moves
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.moves import Moving, moving_options
from moetuner.cli.options.problem import GROUPS, Asked, problem_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output
from moetuner.cli.report import origin_of, write_pages
from moetuner.evaluation.auditing import contiguous
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.outcome import Outcome, head, remarks, sentences, slower
from moetuner.report.page.data import PageData, of_outcomes
from moetuner.solver import ALIASES, METHODS, Result, Trade


def parse_method(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return the method that a name, or another name of it, means."""
    name = ALIASES.get(value, value)
    if name not in METHODS:
        raise click.BadParameter(
            f"must be one of {', '.join(METHODS)}, got '{value:.60}'{options.meant(value, METHODS)}"
        )
    return name


HELP = {
    "Begin with": "--devices --devices-per-node --for --out --report",
    **GROUPS,
    "From a running placement": "--initial --expert-bytes --move-budget --move-cost --pareto",
    "The search": "--method --time-limit --seed --threads --certificate",
}


@click.command("solve", cls=options.Grouped, groups=HELP)
@traffic_options
@machine_options
@problem_options
@moving_options
@options.time_limit_option
@click.option(
    "--method",
    callback=parse_method,
    shell_complete=options.completing(*METHODS),
    metavar="METHOD",
    default="joint",
    show_default=True,
    help=f"Out of {', '.join(METHODS)}; paper is the two stages of MoETuner.",
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
    help='Write the proof of the bound, for "moetuner verify"; without one the command fails.',
)
@options.report_option
@options.figures_option
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
    report_file: Path | None,
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
        problem.check_running(initial)  # before anything is said
    if certificate_file is not None:
        _refuse_unprovable(problem, method, moving=initial is not None)
    how: dict[str, Any] = {"seed": seed, "threads": threads}

    output = Output(json_file)
    output.say(source.describe())
    if asked.engine is not None:
        output.say(asked.explain_problem(problem))
    results = [
        solve_with(method, problem, time_limit=time_limit, **how, **moving.arguments(initial))
    ]
    # Written before anything is said about it: a closed pipe must not lose the answer.
    results[0].placement.save(out_file)
    output.say()
    try:
        if method != "contiguous" and results[0].status != "interrupted":
            results.insert(0, solve_with("contiguous", problem, **how))
        # What runs if nothing is done: experts in blocks, each of them once. It is replayed only
        # where it is asked about and is not there already.
        blocks = contiguous(results[-1].placement)
        is_there = np.array_equal(results[0].placement.slots, blocks.slots)
        more = [] if initial is not None or is_there else [replace(results[-1], placement=blocks)]
        replayed = judge(
            [*more, *results], problem, source.traffic, window=source.replayed, threads=threads
        )
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; {out_file} was written") from None
    outcomes = replayed[len(more) :]
    outcome = outcomes[-1]
    output.table(head(problem), [each.row() for each in outcomes])
    broken = [each for each in outcomes[:-1] if each.breaks_rules]
    for line in (*remarks([*broken, outcome], problem), *sentences(outcome)):
        output.say(line)
    if initial is None:
        for line in slower(outcome, replayed[0]):
            output.say(line)
    answer: dict[str, Any] = {}
    trades: list[Trade] = []
    if initial is not None:
        diff = initial.diff(outcome.result.placement, topology=topology)
        for line in moves.sentences(diff, topology, moving):
            output.say(line)
        moves.show_pairs(output, diff)
        known = moving.expert_bytes is not None
        bytes_moved = diff.experts_moved * moving.each if known else None
        answer["moves"] = {**diff.to_dict(), "bytes_moved": bytes_moved}
        if moving.wants_pareto and outcome.result.status != "interrupted":
            trades = moves.show_pareto(
                output, problem, initial, moving, time_limit=time_limit, **how
            )
            answer["pareto"] = moves.told(trades, moving)
    output.say(f"wrote {out_file}")
    failed: click.ClickException | None = None
    if certificate_file is not None:
        try:
            output.say(_prove(problem, outcome.result, certificate_file))
        except click.ClickException as error:
            failed = error
    contents = {
        "input": source.facts(),
        "settings": {
            **asked.problem_settings(problem),
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
    write_pages(
        report_file,
        lambda: _page(source, outcomes, initial, moving, contents, trades),
        output,
    )
    output.finish(contents)
    if failed is not None:
        raise failed


def _page(
    source: Source,
    outcomes: list[Outcome],
    initial: Placement | None,
    moving: Moving,
    contents: dict[str, Any],
    trades: list[Trade],
) -> PageData:
    """Make the page of the placement beside what runs, or experts in blocks."""
    before, after = outcomes[0], outcomes[-1]
    if len(outcomes) == 1 or initial is not None:
        running = contiguous(after.result.placement) if initial is None else initial
        name = "contiguous" if initial is None else "running"
        (before,) = judge(
            [replace(after.result, placement=running, method=name)],
            after.problem,
            source.traffic,
            window=source.replayed,
            threads=source.threads,
        )
    return of_outcomes(
        *(before, after, source.traffic, origin_of(source), contents),
        traffic="The traffic that the placement was computed from, which flatters it; moetuner "
        "advise judges on unseen traffic.",
        trades=tuple(trades),
        expert_bytes=moving.expert_bytes,
    )


def _refuse_unprovable(problem: Problem, method: str, *, moving: bool) -> None:
    """Raise, before any work, where no bound that has a certificate will be found."""
    if problem.goal != "traffic":
        why = f"bounds of {problem.goal} have none; ask for --objective traffic"
    elif method != "joint":
        why = f"method {method} proves nothing; take joint"
    elif moving:
        why = "nothing is proven of moves from --initial"
    elif problem.may_copy:
        why = "nothing is proven where slots may hold copies of experts"
    elif not problem.is_plain:
        why = "nothing is proven where devices, slots or experts have rules of their own"
    elif not Objective(problem).has_traffic:
        why = "INPUT has none of the pairs that traffic is made of"
    else:
        return
    raise click.UsageError(f"'--certificate' needs a bound with a proof to write: {why}.")


def _prove(problem: Problem, result: Result, path: Path) -> str:
    """Write the certificate of a bound, and say what it proves."""
    certificate = result.certificate
    if certificate is None:
        if path.is_file():
            path.unlink()
        raise click.ClickException(
            f"{path}: no certificate was written, as the solve ended ({result.status}) without a "
            "bound that has one; the placement was written"
        )
    certificate.save(path)
    worth = Objective(problem)
    proven = certificate.cost / (worth.tokens if certificate.method == "visits" else worth.scale)
    if result.bound is None or proven >= result.bound:
        return f"wrote {path}"
    return f"wrote {path}, which proves {proven:.6f}; what was proven on top has no certificate"
