"""``moetuner solve``: compute a placement and write it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from moetuner._checks import nth_seed
from moetuner.cli import options, work
from moetuner.cli.options import JUDGING, SEARCH, SearchOptions, kinds, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import MoveOptions
from moetuner.cli.options.pages import Pages, make_origin
from moetuner.cli.options.placed import add_windows, read_made, with_input, write_held_out
from moetuner.cli.options.serving import ProblemOptions, settings_for_json
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.cli.split import TrafficSplit
from moetuner.evaluation.judgement import Judgement
from moetuner.files.cells import with_values
from moetuner.placement import Placement, contiguous
from moetuner.problem import Problem
from moetuner.report.findings import Finding
from moetuner.report.outcome import (
    Outcome,
    find_empty_slots,
    find_gain,
    find_objective,
    find_remarks,
    find_slower,
    head,
    judge_outcome,
    judge_outcomes,
    make_running_result,
    window_to_name,
)
from moetuner.report.page.data import PageData
from moetuner.report.page.making import make_outcome_data
from moetuner.solver import METHODS, Result, Trade
from moetuner.topology import Topology

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
        kinds.Text(kinds.read_method, words=METHODS),
        "METHOD",
        "joint",
        group=SEARCH,
        help=f"Method: {', '.join(METHODS)}; paper is the two stages of MoETuner.",
    ),
    search: SearchOptions,
    holdout: float = option(kinds.Number(0, 1, max_open=True), "SHARE", 0.0, group=JUDGING),
    out_file: Path = option(kinds.OutFile(), "FILE", Path("placement.json")),
    certificate_file: Path | None = option(kinds.OutFile(), "FILE", group=SEARCH),
    pages: Pages,
    output: Output,
) -> None:
    """Compute a placement and write it.

    The placement is computed from all of INPUT. With --holdout it is computed from a part of INPUT
    and judged on the other part, here and by "moetuner evaluate". With --holdout and --initial, the
    running placement is kept where the gain on that part may be chance. Where no option gives a
    machine or an engine, they are those of the file of --initial. Ctrl-C writes the best placement
    so far.

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
    seed, threads = nth_seed(search.seed, 0), source.threads
    running = moving.running(source, machine.given)
    topology, wanted = _serve_as(running, moving, machine, wanted)
    # The default method counts only the tables that its objective needs.
    split = wanted.split(source, topology, holdout, seed, pairs=method != "joint")
    source, problem = split.source, split.problem
    size = wanted.expert_bytes(source, moving.expert_bytes)
    initial = moving.initial(source, problem, running, seed)
    if initial is not None:
        moving = replace(moving, expert_bytes=size)
    if certificate_file is not None:
        _refuse_unprovable(problem, method, moving=initial is not None)
    arguments = asdict(search)
    output.say(*source.lines, *wanted.explain_problem(problem), *moving.explain())
    moves = moving.arguments(initial)
    result = work.solve(problem, method, threads=threads, **arguments, **moves)
    result = replace(result, placement=with_input(result.placement, source, holdout))
    # Written before anything is said about it: a closed pipe must not lose the answer.
    result.placement.save(out_file)
    output.say("")
    try:
        replayed = _replay(result, initial, split, pages, output)
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; {out_file} was written") from None
    replayed.show(output)
    result, outcome, keeps_running = _keep_running(initial, result, replayed, output)
    if keeps_running:
        result.placement.save(out_file)
    moves, trades = moving.show(output, problem, initial, result, threads=threads, **arguments)
    output.say(f"wrote {out_file}{', which is what runs' if keeps_running else ''}")
    failure = _prove(result, problem, certificate_file, output)
    settings = settings_for_json(problem) | moving.settings() | arguments
    settings |= {"window": source.counting_window, "threads": threads, "holdout": holdout}
    contents: dict[str, Any] = {"input": source.facts, "settings": settings}
    contents |= {"placement": str(out_file), "method": method, **outcome.to_dict(), **moves}
    contents |= {"kept": keeps_running, **replayed.facts()}
    pages.write(output, lambda: replayed.make_page(outcome, contents, trades, size))
    output.finish(contents)
    if failure is not None:
        raise click.ClickException(failure)


@dataclass(frozen=True)
class ReplayedResult:
    """Outcomes of a result and of the placements that may run, on the traffic to judge on.

    Parameters
    ----------
    split
        INPUT, and the part of it that the outcomes are of.
    before
        Outcome of the running placement; contiguous if none runs.
    outcomes
        Rows of the table; the last one is that of the result.
    judgements
        Judgements of the change on unseen traffic, by tokens per window.
    """

    split: TrafficSplit
    before: Outcome
    outcomes: list[Outcome]
    judgements: dict[int | None, Judgement]

    @property
    def outcome(self) -> Outcome:
        """Outcome of the result."""
        return self.outcomes[-1]

    @property
    def may_be_chance(self) -> bool:
        """True if the gain is not certain in windows of any size; False without judgements."""
        answers = {judgement.gain.answer for judgement in self.judgements.values()}
        return bool(answers) and answers <= {"no evidence", "worse"}

    def make_page(
        self,
        outcome: Outcome,
        contents: dict[str, Any],
        trades: tuple[Trade, ...],
        expert_bytes: float | None,
    ) -> PageData:
        """Return the data of the page: what is written, judged in the first size of windows."""
        source, window = self.split.source, self.split.serving.window
        judgement = next(iter(self.judgements.values()), None)
        if judgement is None:
            judgement = judge_outcome(
                self.before, self.outcome, source.traffic, window, by_group=True
            )
        return make_outcome_data(
            judgement,
            outcome,
            make_origin(source),
            contents,
            traffic=self.sentence,
            trades=trades,
            expert_bytes=expert_bytes,
        )

    @cached_property
    def sentence(self) -> str:
        """The traffic that the result is judged on, and its windows."""
        sentence, source = FLATTERED, self.split.source
        if self.split.is_held_out:
            recorded = source.size_for_split(self.split.serving)
            sentence = write_held_out(self.split.judged_on.size, recorded)
        return add_windows(sentence, source, self.split.judged_on)

    def show(self, output: Output) -> None:
        """Print the table, the objective of the result, gains, and what they are judged on."""
        problem, held_out = self.split.problem, self.split.is_held_out
        rows = [outcome.row() for outcome in self.outcomes]
        output.table(*with_values(head(problem, held_out=held_out), rows))
        others = (self.before, *self.outcomes[:-1])
        warnings = [finding for row in others for finding in find_slower(self.outcome, row)]
        output.tell(
            *find_remarks([self.outcome], problem),
            *find_objective(self.outcome, held_out=held_out),
            *warnings[:1],
            *find_empty_slots(self.outcome),
        )
        for tokens, judgement in self.judgements.items():
            output.tell(find_gain(judgement.gain, window_to_name(tokens, self.outcome)))
        output.say(self.sentence)

    def facts(self) -> dict[str, Any]:
        """Return the gains, and the traffic that they are judged on, for JSON."""
        gains = [
            {"window": tokens, **judgement.gain.to_dict()}
            for tokens, judgement in self.judgements.items()
        ]
        first = next(iter(self.judgements.values()), None)
        is_unseen = self.split.is_held_out
        part = {"part": "unseen" if is_unseen else "all", "is_seen": not is_unseen}
        return {
            "gain": None if first is None else first.gain.to_dict(),
            "gains": gains,
            "judged_on": part | self.split.judged_on.size,
        }


def _replay(
    result: Result, initial: Placement | None, split: TrafficSplit, pages: Pages, output: Output
) -> ReplayedResult:
    """Replay a result, the running placement if there is one, and the contiguous one.

    The change is judged if traffic is held out. Only pages and JSON have groups.
    """
    blocks = make_running_result(split.problem, contiguous(result.placement), "contiguous")
    runs = [blocks]
    if initial is not None and initial != blocks.placement:
        runs.append(make_running_result(split.problem, initial))
    by_group = pages.wanted or output.json_file is not None
    outcomes = split.replay([*runs, result], by_group=by_group)
    before, after = outcomes[-2:]
    judgements = {}
    if split.is_held_out:
        traffic = split.source.traffic
        judgements = judge_outcomes(before, after, traffic, by_group=pages.wanted)
    is_shown = result.method != "contiguous" or initial is not None
    rows = outcomes if is_shown else [after]
    return ReplayedResult(split, before, rows, judgements)


def _keep_running(
    initial: Placement | None, result: Result, replayed: ReplayedResult, output: Output
) -> tuple[Result, Outcome, bool]:
    """Return a result that keeps the running placement if the gain of another may be chance.

    Also return its outcome, and whether the running placement is kept.
    """
    problem = replayed.split.problem
    if initial is None or not replayed.may_be_chance or problem.violations(initial):
        return result, replayed.outcome, False
    if initial == result.placement:
        return result, replayed.outcome, True
    before = replayed.before
    moved = initial.diff(result.placement).experts_moved
    output.tell(Finding("running kept", {"experts": moved}))
    objective = before.result.objective
    placement = replace(result.placement, slots=initial.slots, objective=objective)
    outcome = replace(before, result=replace(before.result, placement=placement))
    return replace(result, placement=placement), outcome, True


def _serve_as(
    running: Placement | None, moving: MoveOptions, machine: Machine, wanted: ProblemOptions
) -> tuple[Topology, ProblemOptions]:
    """Return machine and options; what no option says is that of the file of --initial."""
    if running is None:
        return machine.topology(), wanted
    made = read_made(Path(str(moving.initial_file)), running)
    devices = running.devices if machine.given is None else None
    topology = machine.topology(devices, made.machine)
    if topology.devices == running.devices:
        wanted = wanted.as_running(made, running)
    return topology, wanted


def _refuse_unprovable(problem: Problem, method: str, *, moving: bool) -> None:
    """Raise, before any work, if no bound with a certificate can be found."""
    if problem.aim.costs_loads:
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


def _prove(result: Result, problem: Problem, path: Path | None, output: Output) -> str | None:
    """Write the certificate of a bound and print what it proves; return why there is none."""
    certificate = result.certificate
    if path is None:
        return None
    if certificate is None:
        if path.is_file():
            path.unlink()
        return (
            f"{path}: no certificate was written, as the solve ended ({result.status}) without a "
            "bound that has one; the placement was written"
        )
    certificate.save(path)
    objective = problem.objective_function
    unit = max(objective.tokens, 1) if certificate.method == "visits" else objective.scale
    proven = certificate.cost / unit
    line = f"wrote {path}"
    if result.bound is not None and proven < result.bound:
        line += f", which proves {proven:.6f}; the bound beyond that has no certificate"
    output.say(line)
    return None
