"""``moetuner solve``: compute a placement and write it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from moetuner._checks import nth_seed
from moetuner.cli import options, work
from moetuner.cli.options import JUDGING, SEARCH, SearchOptions, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import MoveOptions
from moetuner.cli.options.pages import Pages, origin_of
from moetuner.cli.options.placed import held_out, windowed, with_input
from moetuner.cli.options.serving import ProblemOptions, settings_for_json
from moetuner.cli.options.traffic import Source, Traffic
from moetuner.cli.output import Output
from moetuner.evaluation.judgement import Judgement
from moetuner.evaluation.samples import hold_out
from moetuner.files.cells import with_values
from moetuner.placement import Placement, contiguous
from moetuner.problem import Problem
from moetuner.recording import Recording
from moetuner.report.findings import Finding
from moetuner.report.outcome import (
    Outcome,
    find_empty_slots,
    find_gain,
    find_remarks,
    find_slower,
    find_worth,
    head,
    judge_outcome,
    judge_outcomes,
    make_running_result,
    window_to_name,
)
from moetuner.report.page.data import PageData, make_outcome_data
from moetuner.serving import Serving
from moetuner.solver import METHODS, Result

FLATTERED = (
    "Judged on the traffic that the placement was computed from, which flatters it: --holdout 0.5 "
    "leaves a part to judge on."
)


@options.command(
    "solve",
    example="trace.safetensors --devices 8 --out placement.json",
    begin_with="--devices --devices-per-node --for --out --report",
)
def command(
    *,
    source: Source,
    machine: Machine,
    wanted: ProblemOptions,
    moving: MoveOptions,
    method: str = option(
        options.Text(options.read_method, words=METHODS),
        "METHOD",
        "joint",
        group=SEARCH,
        help=f"Method: {', '.join(METHODS)}; paper is the two stages of MoETuner.",
    ),
    search: SearchOptions,
    holdout: float = option(options.Number(0, 1, max_open=True), "SHARE", 0.0, group=JUDGING),
    out_file: Path = option(options.OutFile(), "FILE", Path("placement.json")),
    certificate_file: Path | None = option(options.OutFile(), "FILE", group=SEARCH),
    pages: Pages,
    output: Output,
) -> None:
    """Compute a placement and write it.

    The placement is computed from all of INPUT. With --holdout it is computed from a part of INPUT
    and judged on the other part, here and by "moetuner evaluate"; with --initial, too, what runs is
    kept where the gain on that part may be chance. Ctrl-C writes the best placement so far.

    Parameters
    ----------
    holdout
        Share of the sequences that the placement is not computed from and is judged on (without
        sequence labels: runs of windows), as in "moetuner advise" and "compare".
    out_file
        Write the placement to this file, as JSON.
    certificate_file
        Write the proof of the bound, for "moetuner verify"; fails if the bound has no proof.
    """
    topology = machine.topology()
    if not holdout:
        source, _ = wanted.resolve(source, topology)
    seen, judged_on = hold_out(source.traffic, holdout, seed=nth_seed(search.seed, 0))
    # The default method asks for what the objective is made of, and for nothing else.
    problem = wanted.problem(source, topology, seen, pairs=method != "joint")
    judged_on = source.as_divided(judged_on, problem.serving)
    initial = moving.initial(source, problem, nth_seed(search.seed, 0))
    size = wanted.expert_bytes(source, moving.expert_bytes)
    if initial is not None:
        moving = replace(moving, expert_bytes=size)
        problem.check_running(initial)  # before anything is said
    if certificate_file is not None:
        _refuse_unprovable(problem, method, moving=initial is not None)
    arguments = asdict(search)
    output.say(source.describe(), *wanted.explain_problem(problem), *moving.explain())
    moves, threads = moving.arguments(initial), source.threads
    result = work.solve(problem, method, threads=threads, **arguments, **moves)
    result = replace(result, placement=with_input(result.placement, source, holdout))
    # Written before anything is said about it: a closed pipe must not lose the answer.
    result.placement.save(out_file)
    output.say("")
    try:
        by_group = pages.wanted or output.json_file is not None
        served = replace(problem.serving, window=source.replayed)
        options_of_replay = {"by_group": by_group, "threads": threads}
        before, outcomes = _replay(result, initial, problem, served, judged_on, **options_of_replay)
        outcome, judgements = outcomes[-1], {}
        if holdout:
            recording = source.traffic
            judgements = judge_outcomes(before, outcome, recording, by_group=pages.wanted)
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; {out_file} was written") from None
    judged = FLATTERED
    if holdout:
        judged = held_out(judged_on, source.as_divided(source.traffic, problem.serving))
    judged = windowed(judged, source, judged_on)
    _show(output, problem, outcomes, before, judgements, held_out=holdout > 0)
    output.say(judged)
    kept = initial is not None and _may_be_chance(judgements) and not problem.violations(initial)
    if kept and initial != result.placement:
        assert initial is not None
        moved = initial.diff(result.placement).experts_moved
        output.tell(Finding("running kept", {"experts": moved}))
        result = replace(result, placement=_as_result(initial, result, before))
        outcome = replace(before, result=replace(before.result, placement=result.placement))
        result.placement.save(out_file)
    moves, trades = moving.show(output, problem, initial, result, threads=threads, **arguments)
    output.say(f"wrote {out_file}{', which is what runs' if kept else ''}")
    failure = certificate_file and _prove(problem, result, certificate_file, output)
    settings = settings_for_json(problem) | moving.settings() | arguments
    settings |= {"window": source.counted, "threads": threads, "holdout": holdout}
    contents: dict[str, Any] = {"input": source.facts(), "settings": settings}
    contents["placement"] = str(out_file)
    contents |= {"method": method, **outcome.to_dict(), **moves, "kept": kept}
    contents |= _facts(judgements, judged_on, holdout)

    def page() -> PageData:
        judgement = next(iter(judgements.values()), None) or judge_outcome(
            before, outcome, source.traffic, source.replayed, by_group=True
        )
        return make_outcome_data(
            judgement,
            outcome,
            origin_of(source),
            contents,
            traffic=judged,
            trades=trades,
            expert_bytes=size,
        )

    pages.write(output, page)
    output.finish(contents)
    if failure:
        raise click.ClickException(str(failure))


def _facts(
    judgements: dict[int | None, Judgement], judged_on: Recording, holdout: float
) -> dict[str, Any]:
    """Return the gains, and what they were judged on, for JSON."""
    part = {"part": "unseen" if holdout else "all", "is_seen": not holdout}
    gains = [{"window": tokens, **each.gain.to_dict()} for tokens, each in judgements.items()]
    first = next(iter(judgements.values()), None)
    facts = {"gain": None if first is None else first.gain.to_dict(), "gains": gains}
    return facts | {"judged_on": part | judged_on.size}


def _show(
    output: Output,
    problem: Problem,
    outcomes: list[Outcome],
    before: Outcome,
    judgements: dict[int | None, Judgement],
    *,
    held_out: bool,
) -> None:
    """Print the table and what the result is worth; warn where what runs, or blocks, are faster."""
    outcome = outcomes[-1]
    rows = [row.row() for row in outcomes]
    output.table(*with_values(head(problem, held_out=held_out), rows))
    warned = [each for row in (before, *outcomes[:-1]) for each in find_slower(outcome, row)]
    output.tell(
        *find_remarks([outcome], problem),
        *find_worth(outcome, held_out=held_out),
        *warned[:1],
        *find_empty_slots(outcome),
    )
    for tokens, judgement in judgements.items():
        output.tell(find_gain(judgement.gain, window_to_name(tokens, outcome)))


def _may_be_chance(judgements: dict[int | None, Judgement]) -> bool:
    """Return whether nothing is surely gained in windows of any size; False where nothing tells."""
    answers = {judgement.gain.answer for judgement in judgements.values()}
    return bool(answers) and answers <= {"no evidence", "worse"}


def _as_result(initial: Placement, result: Result, before: Outcome) -> Placement:
    """Return what runs as the result of a search that found nothing surely better."""
    return replace(result.placement, slots=initial.slots, objective=before.result.objective)


def _replay(
    result: Result,
    initial: Placement | None,
    problem: Problem,
    serving: Serving,
    judged_on: Traffic,
    **options: Any,
) -> tuple[Outcome, list[Outcome]]:
    """Replay a result and what runs, or else blocks; return what runs, and the table's rows."""
    blocks = make_running_result(problem, contiguous(result.placement), "contiguous")
    before = [blocks]
    if initial is not None and initial != blocks.placement:
        before.append(make_running_result(problem, initial))
    outcomes = work.replay([*before, result], problem, serving, judged_on, **options)
    is_shown = result.method != "contiguous" or initial is not None
    return outcomes[len(before) - 1], outcomes if is_shown else outcomes[-1:]


def _refuse_unprovable(problem: Problem, method: str, *, moving: bool) -> None:
    """Raise, before any work, where no bound that has a certificate will be found."""
    if problem.goal != "traffic":
        why = f"bounds of {problem.goal} are formulas of INPUT; pass --objective traffic"
    elif method != "joint":
        why = f"method {method} has no bound; pass --method joint"
    elif moving:
        why = "nothing is proven of moves from --initial"
    elif problem.may_copy:
        why = "nothing is proven if slots may hold copies of experts"
    elif not problem.is_plain:
        why = "nothing is proven if devices, slots or experts have rules of their own"
    elif not problem.objective_function.has_traffic:
        why = "INPUT has no transitions and no co-activation to count traffic from"
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
    worth = problem.objective_function
    proven = certificate.cost / (worth.tokens if certificate.method == "visits" else worth.scale)
    line = f"wrote {path}"
    if result.bound is not None and proven < result.bound:
        line += f", which proves {proven:.6f}; the bound beyond that has no certificate"
    output.say(line)
    return None
