"""``moetuner solve``: compute a placement and write it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np

from moetuner.cli import options
from moetuner.cli.options import SEARCH, SearchOptions, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import Moving
from moetuner.cli.options.pages import Pages, origin_of
from moetuner.cli.options.serving import ProblemOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.evaluation.auditing import contiguous
from moetuner.placement import Placement
from moetuner.problem import Problem
from moetuner.problem.objective import Objective
from moetuner.report.outcome import Outcome, head, remarks, sentences, slower
from moetuner.report.page.data import of_outcomes
from moetuner.solver import METHODS, Result

FLATTERED = (
    "The traffic that the placement was computed from, which flatters it; moetuner advise judges "
    "on unseen traffic."
)


@options.command("solve", begin_with="--devices --devices-per-node --for --out --report")
def command(
    *,
    source: Source,
    machine: Machine,
    wanted: ProblemOptions,
    moving: Moving,
    method: str = option(
        options.Text(options.read_method, words=METHODS),
        "METHOD",
        "joint",
        group=SEARCH,
        help=f"Method: {', '.join(METHODS)}; paper is the two stages of MoETuner.",
    ),
    search: SearchOptions,
    out_file: Path = option(options.OutFile(), "FILE", Path("placement.json")),
    certificate_file: Path | None = option(options.OutFile(), "FILE", group=SEARCH),
    pages: Pages,
    output: Output,
) -> None:
    """Compute a placement and write it.

    The placement is computed for all of INPUT. Ctrl-C writes the best placement so far. "moetuner
    compare" says what to expect on traffic that the solver has not seen.

    Parameters
    ----------
    out_file
        Write the placement to this file, as JSON.
    certificate_file
        Write the proof of the bound, for "moetuner verify"; the command fails if there is none.
    """
    topology = machine.topology()
    initial = moving.initial(source, topology)
    if initial is not None:
        moving = replace(moving, expert_bytes=source.expert_bytes(moving.expert_bytes))
    problem = wanted.problem(source, topology)
    if initial is not None:
        problem.check_running(initial)  # before anything is said
    if certificate_file is not None:
        _refuse_unprovable(problem, method, moving=initial is not None)
    how = asdict(search)
    output.say(source.describe(), *wanted.explain_problem(problem))
    result = source.solve(method, problem, **how, **moving.arguments(initial))
    # Written before anything is said about it: a closed pipe must not lose the answer.
    result.placement.save(out_file)
    output.say("")
    try:
        before, outcomes = _judge(result, initial, source, problem, page=pages.wanted)
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; {out_file} was written") from None
    outcome = outcomes[-1]
    _show(output, problem, outcomes, before if initial is None else None)
    moves, trades = moving.show(output, problem, initial, result, threads=source.threads, **how)
    output.say(f"wrote {out_file}")
    failure = None
    if certificate_file is not None:
        failure = _prove(problem, result, certificate_file, output)
    settings = wanted.problem_settings(problem) | moving.settings() | how
    settings |= {"window": source.counted, "threads": source.threads}
    contents = {"input": source.facts(), "settings": settings, "placement": str(out_file)}
    contents |= {"method": method, **outcome.to_dict(), **moves}
    pages.write(
        output,
        lambda: of_outcomes(
            *(before, outcome, origin_of(source), contents),
            traffic=FLATTERED,
            trades=trades,
            expert_bytes=source.expert_bytes(moving.expert_bytes),
        ),
    )
    output.finish(contents)
    if failure is not None:
        raise click.ClickException(failure)


def _show(
    output: Output, problem: Problem, outcomes: list[Outcome], blocks: Outcome | None
) -> None:
    """Print the table and what the result is worth; warn where experts in blocks are faster."""
    outcome = outcomes[-1]
    output.table(head(problem), [row.row() for row in outcomes])
    broken = [row for row in outcomes[:-1] if row.breaks_rules]
    output.say(*remarks([*broken, outcome], problem), *sentences(outcome))
    if blocks is not None:
        output.say(*slower(outcome, blocks))


def _judge(
    result: Result, initial: Placement | None, source: Source, problem: Problem, *, page: bool
) -> tuple[Outcome, list[Outcome]]:
    """Replay what runs if nothing is done, method contiguous, and a result.

    Returns
    -------
    before, rows
        What runs, a placement or else blocks, and the rows of the table.
    """
    rows, more = [result], []
    if result.method != "contiguous" and result.status != "interrupted":
        rows.insert(0, source.solve("contiguous", problem))
    running = replace(result, placement=initial or contiguous(result.placement))
    running = replace(running, method="contiguous" if initial is None else "running")
    is_shown = initial is None or page
    if is_shown and not np.array_equal(rows[0].placement.slots, running.placement.slots):
        more = [running]
    outcomes = source.judge([*more, *rows], problem, source.traffic)
    return outcomes[0], outcomes[len(more) :]


def _refuse_unprovable(problem: Problem, method: str, *, moving: bool) -> None:
    """Raise, before any work, where no bound that has a certificate will be found."""
    if problem.goal != "traffic":
        why = f"bounds of {problem.goal} have none; ask for --objective traffic"
    elif method != "joint":
        why = f"method {method} proves nothing; take joint"
    elif moving:
        why = "nothing is proven of moves from --initial"
    elif problem.may_copy:
        why = "nothing is proven if slots may hold copies of experts"
    elif not problem.is_plain:
        why = "nothing is proven if devices, slots or experts have rules of their own"
    elif not Objective(problem).has_traffic:
        why = "INPUT has none of the pairs that traffic is made of"
    else:
        return
    raise click.UsageError(f"'--certificate' needs a bound with a proof to write: {why}.")


def _prove(problem: Problem, result: Result, path: Path, output: Output) -> str | None:
    """Write the certificate of a bound and print what it proves; return why there is none."""
    certificate = result.certificate
    if certificate is None:
        if path.is_file():
            path.unlink()
        return (
            f"{path}: no certificate was written, as the solve ended ({result.status}) without a "
            "bound that has one; the placement was written"
        )
    certificate.save(path)
    worth = Objective(problem)
    proven = certificate.cost / (worth.tokens if certificate.method == "visits" else worth.scale)
    line = f"wrote {path}"
    if result.bound is not None and proven < result.bound:
        line += f", which proves {proven:.6f}; the bound beyond that has no certificate"
    output.say(line)
    return None
