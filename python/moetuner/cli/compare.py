"""``moetuner compare``: several methods on the same traffic, judged on unseen traffic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click

from moetuner._checks import nth_seed
from moetuner._texts import suggestion
from moetuner.cli import options, work
from moetuner.cli.options import JUDGING, kinds, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import load_placement
from moetuner.cli.options.pages import Pages, make_origin
from moetuner.cli.options.serving import ComparedOptions, settings_for_json
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.cli.recipes import HOLDOUT
from moetuner.cli.split import TrafficSplit
from moetuner.evaluation.comparison import Comparison, with_splits
from moetuner.evaluation.figures import explain
from moetuner.files.cells import counted, signed, span, with_values
from moetuner.placement import Placement, blocks
from moetuner.problem.made import Made
from moetuner.recording import Recording
from moetuner.report.advice import SPLITS
from moetuner.report.findings import Finding
from moetuner.report.outcome import (
    Outcome,
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
from moetuner.solver import ALIASES, METHODS, Result

DEFAULT_METHODS = "contiguous,lpt,eplb,paper,joint"
# The placement that runs if no option names one, and the row of one that an option names.
BLOCKS, RUNNING = "contiguous", "running"
# Seconds for the paper's method without --time-limit: its integer programmes can take minutes. All
# other methods bound their own work, and a limit would change their results.
PAPER_SECONDS = 30.0

# The traffic of the page's figures.
UNSEEN = "Unseen traffic of the first split."
SEEN = "The traffic that the placements were computed from, which flatters them."

TEXT = f"""Compare methods on traffic that they have not seen.

{
    explain(
        "imbalance",
        "imbalance_mixed",
        "imbalance_total",
        "crossing",
        "fanout",
        "node_fanout",
        "predicted_layer_us",
    )
}. objective and gap are the solver's, on the seen part: a time, an imbalance, or traffic
weighed by the cost of links. The table and the gains, with 95 % intervals, are of the unseen part
of the first split, compared with what runs. Splits overlap, so their agreement is not independent
evidence. Without --time-limit method paper gets {PAPER_SECONDS:.0f} seconds per solve; all others
end by themselves.
"""


@options.command(
    "compare",
    example="trace.safetensors --devices 8 --methods eplb,joint --splits 1",
    help=TEXT,
    begin_with="--devices --devices-per-node --for --methods --report",
)
def command(
    *,
    source: Source,
    machine: Machine,
    wanted: ComparedOptions,
    methods: tuple[str, ...] = option(
        kinds.Text(kinds.read_methods, words=METHODS),
        "A,B,C",
        DEFAULT_METHODS,
        help=f"Methods to compare, out of {', '.join(METHODS)}.",
    ),
    holdout: float = option(kinds.Number(0, 1, max_open=True), "SHARE", HOLDOUT, group=JUDGING),
    splits: int | None = option(click.IntRange(1, 1000), "N", group=JUDGING),
    baseline: str | None = option(str, "METHOD", group=JUDGING),
    initial_file: Path | None = option(kinds.IN_FILE, "PLACEMENT", group=options.RUNNING),
    search: options.SearchOptions,
    pages: Pages,
    output: Output,
) -> None:
    """Compare methods on traffic that they have not seen.

    Parameters
    ----------
    holdout
        Share of the sequences that methods do not see and are evaluated on (without sequence
        labels: runs of windows); 0 evaluates on what they saw.
    splits
        Number of splits into seen and unseen; with several, gains have a range. [default:
        3; 1 where nothing is held out]
    baseline
        Method to compare against. [default: what runs, --initial or contiguous]
    initial_file
        The placement that runs.
    """
    topology = machine.topology()
    methods, baseline = _choose_baseline(baseline, methods, initial_file)
    _check_splits(splits, holdout)
    initial = None if initial_file is None else load_placement(initial_file, source, topology)

    def contest(number: int) -> Contest:
        seed = nth_seed(search.seed, number)
        split = wanted.split(source, topology, holdout, seed)
        return Contest(number, split, replace(search, seed=seed), initial)

    first = contest(0)
    source, problem = first.split.source, first.split.problem
    output.say(*source.lines, *wanted.explain_problem(problem))
    output.say(first.describe(), "")
    outcomes_by_split = _run(
        lambda number: (contest(number) if number else first).outcomes(methods),
        splits or (SPLITS if holdout else 1),
        output,
    )
    outcomes = outcomes_by_split[0]
    rival = outcomes.get(baseline, next(iter(outcomes.values())))
    best = _show(output, list(outcomes.values()), rival, held_out=first.split.is_held_out)
    compared_with = rival if rival is not best else next(iter(outcomes.values()))
    by_windows = _judge_methods(outcomes_by_split, baseline, source.traffic)
    for tokens, gains in by_windows.items():
        _show_gains(output, gains, baseline, best, tokens, held_out=first.split.is_held_out)
    settings = settings_for_json(problem) | {
        **asdict(search),
        "window": source.counting_window,
        "threads": source.threads,
        "holdout": holdout,
        "splits": len(outcomes_by_split),
        "baseline": baseline,
        "initial": None if initial_file is None else str(initial_file),
        "waterfill": wanted.given.get("waterfill"),
    }
    facts = {name: _facts(name, outcome, by_windows) for name, outcome in outcomes.items()}
    contents = {"input": source.facts, "settings": settings, "methods": facts}
    pages.write(output, lambda: _make_page(first.split, compared_with, best, contents))
    output.finish(contents)


def _make_page(
    split: TrafficSplit, before: Outcome, best: Outcome, contents: dict[str, Any]
) -> PageData:
    """Return the data of the page: the best outcome beside another one."""
    source, window = split.source, split.serving.window
    judgement = judge_outcome(before, best, source.traffic, window, by_group=True)
    traffic = UNSEEN if split.is_held_out else SEEN
    return make_outcome_data(judgement, best, make_origin(source), contents, traffic=traffic)


def _show(output: Output, rows: list[Outcome], rival: Outcome, *, held_out: bool) -> Outcome:
    """Print a row for every method and the worth of the best one; return the best one."""
    problem = rival.problem
    cells = [outcome.row() for outcome in rows]
    output.table(*with_values(head(problem, held_out=held_out), cells, unlike=True))
    output.tell(*find_remarks(rows, problem))
    solved = [row for row in rows if row.result.method != RUNNING] or rows
    best = min(solved, key=lambda outcome: (outcome.breaks_rules, outcome.result.objective))
    for finding in find_objective(best, held_out=held_out):
        output.tell(replace(finding, about=best.result.method))
    for outcome in solved:
        output.tell(*find_slower(outcome, rival, name=True))
    return best


def _check_splits(splits: int | None, holdout: float) -> None:
    """Raise for several splits where nothing is held out."""
    if holdout == 0 and splits is not None and splits > 1:
        raise click.BadParameter(
            f"must be 1 where nothing is held out, got {splits}", param_hint="'--splits'"
        )


def _choose_baseline(
    baseline: str | None, methods: tuple[str, ...], initial: Path | None
) -> tuple[tuple[str, ...], str]:
    """Return the methods of the table, with the running placement, and the baseline's name."""
    running = RUNNING if initial is not None else BLOCKS
    if running not in methods and (baseline is None or initial is not None):
        methods = (running, *methods)
    name = running if baseline is None else ALIASES.get(baseline, baseline)
    if name not in methods:
        raise click.BadParameter(
            f"must be one of the methods {','.join(methods)}, got {name!r:.40}"
            + suggestion(name, methods),
            param_hint="'--baseline'",
        )
    return methods, name


@dataclass(frozen=True)
class Contest:
    """One split on which methods are compared, and the placement that runs."""

    number: int
    split: TrafficSplit
    search: options.SearchOptions
    initial: Placement | None

    def describe(self) -> str:
        """Write the slots, what they are computed for, and the traffic to judge on."""
        judged_on = "the same traffic"
        if self.split.is_held_out:
            unseen = self.split.judged_on
            judged_on = counted(unseen.length, f"unseen {unseen.unit}")
        problem = self.split.problem
        return (
            f"{counted(problem.slots, 'slot')} on each device, for "
            f"{Made.for_problem(problem).describe()}; judged on {judged_on}."
        )

    def _find_running(self, method: str) -> Placement | None:
        """Return the running placement of a row; None if the row has to be solved."""
        problem = self.split.problem
        if method == BLOCKS and problem.fill_slots and problem.may_copy:
            # Nobody runs copies before there is a placement: those fill a proposal's slots.
            return blocks(problem.layers, problem.num_experts, problem.devices)
        return self.initial if method == RUNNING else None

    def outcomes(self, methods: Sequence[str]) -> dict[str, Outcome]:
        """Solve with every method, until one is interrupted, and evaluate on the unseen traffic."""
        results: list[Result] = []
        problem, threads = self.split.problem, self.split.source.threads
        for place, method in enumerate(methods, 1):
            if (running := self._find_running(method)) is not None:
                results.append(make_running_result(problem, running, method))
                continue
            where = f"{place} of {len(methods)}, split {self.number + 1}"
            arguments = asdict(self.search)
            if method == "paper" and arguments["time_limit"] is None:
                arguments["time_limit"] = PAPER_SECONDS
            result = work.solve(problem, method, place=where, threads=threads, **arguments)
            results.append(result.uninterrupted() if self.number else result)
            if result.status == "interrupted":
                break
        return dict(zip(methods, self.split.replay(results), strict=False))


def _run(
    solve: Callable[[int], dict[str, Outcome]], splits: int, output: Output
) -> list[dict[str, Outcome]]:
    """Solve with all methods on each split, or until Ctrl-C; return outcomes by split."""
    done = [solve(0)]
    # Only the first split shows the best so far: gains are of whole splits.
    is_whole = list(done[0].values())[-1].result.status != "interrupted"
    while is_whole and len(done) < splits:
        try:
            done.append(solve(len(done)))
        except KeyboardInterrupt:
            output.say(f"Interrupted: gains are of {counted(len(done), 'complete split')}.")
            break
    return done


def _facts(
    method: str, outcome: Outcome, by_windows: dict[int | None, dict[str, Comparison]]
) -> dict[str, Any]:
    """Return an outcome as JSON values, with its gains by window."""
    facts: dict[int | None, dict[str, Any]] = {}
    for tokens, gains_of_methods in by_windows.items():
        if method in gains_of_methods:
            gain = gains_of_methods[method]
            facts[tokens] = gain.to_dict() | {"mean": sum(gain.splits) / len(gain.splits)}
    gains = [{"window": tokens, **of_window} for tokens, of_window in facts.items()]
    return {**outcome.to_dict(), "gain": facts.get(next(iter(by_windows))), "gains": gains}


def _judge_methods(
    splits: list[dict[str, Outcome]], baseline: str, recording: Recording
) -> dict[int | None, dict[str, Comparison]]:
    """Judge all methods of the first split against one, in the objective's figure, by window.

    Comparisons have the gains of all splits in which every method ran.
    """
    outcomes = splits[0]
    first = outcomes.get(baseline)
    gains: dict[int | None, dict[str, Comparison]] = {
        tokens: {} for tokens in next(iter(outcomes.values())).phases
    }
    if first is None or getattr(first.evaluation, first.objective.figure) is None:
        return gains
    complete = [split for split in splits if list(split) == list(outcomes)]
    for method, outcome in outcomes.items():
        if method == baseline:
            continue
        for tokens, judgement in judge_outcomes(first, outcome, recording).items():
            pairs = [
                (split[baseline].phases[tokens], split[method].phases[tokens])
                for split in complete
                if tokens in split[baseline].phases
            ]
            gains[tokens][method] = with_splits(judgement.gain, pairs)
    return gains


def _show_gains(
    output: Output,
    gains: dict[str, Comparison],
    baseline: str,
    best: Outcome,
    tokens: int | None,
    *,
    held_out: bool,
) -> None:
    """Print the table of gains, and the gain of the method with the best objective."""
    if not gains:
        return
    number = len(next(iter(gains.values())).splits)
    columns = [f"gain over {baseline}", "gain", "95 %"]
    rows = [
        [method, signed(gain.gain), span(gain.low, gain.high)] for method, gain in gains.items()
    ]
    if number > 1:
        columns.append(f"{number} splits")
        for row, gain in zip(rows, gains.values(), strict=True):
            row.append(span(min(gain.splits), max(gain.splits)))
    output.say("")
    output.table(*with_values(columns, rows))
    window = window_to_name(tokens, best)
    finding = Finding("no smaller objective", {"window": window, "over": baseline})
    if best.result.method in gains:
        traffic: Literal["unseen", "seen"] = "unseen" if held_out else "seen"
        finding = find_gain(gains[best.result.method], window, traffic)
    output.tell(finding)
