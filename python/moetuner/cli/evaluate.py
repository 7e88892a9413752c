"""``moetuner evaluate``: replay a placement on traffic, and judge what it changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetuner import _texts
from moetuner.cli import options
from moetuner.cli.options import JUDGING, argument, kinds, option
from moetuner.cli.options.gates import Gates
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import is_start, start_option
from moetuner.cli.options.pages import Pages, make_origin
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import FigureOptions, JudgedOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.evaluation import Evaluation
from moetuner.evaluation.arrival import WINDOWS_MIXED, choose_batch_size
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES, US, explain
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.judgement import Judgement
from moetuner.files.cells import counted, listed, signed, span
from moetuner.files.opened import Opened
from moetuner.frozen import as_json
from moetuner.recording import Recording, labelling
from moetuner.report.findings import Finding
from moetuner.report.outcome import find_gain, find_times_of
from moetuner.report.page.data import PageData
from moetuner.report.page.making import make_judgement_data

# Exit status where a limit is exceeded.
FAILED = 3
# Most groups that a line names; the tables have all.
NAMED = 8
# Times have a table of their own.
TIMES = [name for name, figure in FIGURES.items() if figure.unit == US]
OTHERS = [name for name in FIGURES if name not in TIMES]
HELP = f"""Replay a placement on traffic, and judge what it gains.

A placement of "moetuner solve --holdout" is judged on the part of INPUT that was held out.

{explain(*OTHERS, *TIMES)}.

Lower is better for every measure of --by-group. Every change has its 95 % interval, over whole
sequences (without sequence labels: over runs of windows). "Beyond chance" takes all groups and
measures together: if none is worse or behind, 19 of 20 evaluations name none. Groups of fewer than
five sequences, or independent windows, are not judged.
"""


@options.command(
    "evaluate",
    example="placement.json trace.safetensors --by-group --report page.html",
    help=HELP,
    begin_with="--baseline --by-group --fail-if-worse --report",
)
def command(
    *,
    placement_file: Path = argument("PLACEMENT", kinds.IN_FILE),
    source: Source,
    machine: Machine,
    baseline: str | None = start_option(),
    lost: tuple[int, ...] = option(kinds.DEVICE_LIST, "LIST", (), flag="--without"),
    serving: JudgedOptions,
    replaying: FigureOptions,
    by_group: bool = option(is_flag=True, default=False, group=JUDGING),
    gates: Gates,
    pages: Pages,
    expert_bytes: float | None = options.expert_bytes_option(),
    output: Output,
) -> int:
    """Replay a placement and its baseline, and show figures, gains, groups and a page.

    Parameters
    ----------
    baseline
        The placement that runs. [default: contiguous, as engines load experts]
    lost
        Devices that are lost, such as 3,17; the placement is replayed on those that are left.
    by_group
        Show which groups the placement serves worse.
    expert_bytes
        Bytes of one expert of one layer, for --report. [default: of INPUT's model, if known]
    """
    placed = Placed.read(Opened(placement_file), source, machine, serving).without(lost)
    gates.check(placed)
    running, against = placed.baseline(baseline)
    names, traffic = (against, placed.name), placed.parts.judged_on
    if pages.wanted:
        is_file = baseline is not None and not is_start(baseline, "--baseline")
        names = "running" if is_file else against, _texts.name(placement_file.stem)
    has_groups = pages.wanted and traffic.group is not None
    replayed = replaying.replay_options(source)
    judgement = placed.judge(
        running,
        names,
        replayed,
        measures=gates.measures,
        by_group=by_group or has_groups or gates.fail_if_worse is not None,
    )
    judgement = gates.with_measure(judgement)
    output.say(*placed.lines())
    if placed.loses_links:
        output.tell(Finding("slow links"))
    output.say(_heading(placed))
    output.tell(*(find_gain(gain) for gain in placed.gains(judgement)))
    output.say("")
    _show_figures(output, placed, judgement.after, replayed.mixed_seed)
    if by_group:
        output.say("")
        _show_groups(output, judgement)
        output.say(*_summary(judgement), *_advice(judgement, gates.judged))
    failures = [*gates.failures(judgement)]
    output.say(*failures)
    files = {"placement": str(placement_file), "baseline": baseline}
    pages.write(output, lambda: _make_page(placed, judgement, files, expert_bytes))
    settings = {"without": list(lost), "waterfill": placed.serving.waterfill, **gates.facts()}
    contents = placed.contents(**replayed.facts(), **settings)
    contents |= files | judgement.after.to_dict() | {"gain": judgement.gain.to_dict()}
    if by_group or pages.wanted:
        contents |= as_json({"running": judgement.before, "judgement": judgement})
    contents |= {"failed": bool(failures), "failures": failures}
    output.finish(contents)
    return FAILED if failures else 0


def _make_page(
    placed: Placed, judgement: Judgement, files: dict[str, Any], expert_bytes: float | None
) -> PageData:
    """Return the data of the page: both placements' evaluations, and their judgement."""
    assert placed.serving.cost_model is not None
    contents = placed.contents(**files, cost_model=placed.serving.cost_model.name)
    contents |= as_json({"running": judgement.before, "proposed": judgement.after})
    contents["audit"] = judgement.to_dict() if judgement.groups else None
    contents["gain"] = judgement.gain.to_dict()
    return make_judgement_data(
        judgement,
        make_origin(placed.source),
        contents,
        traffic=placed.parts.sentence,
        token_bytes=placed.serving.cost_model.token_bytes,
        expert_bytes=placed.expert_bytes if expert_bytes is None else expert_bytes,
    )


def _heading(placed: Placed) -> str:
    """Write the placement's sizes, the lost devices and the size of windows."""
    placement, window = placed.placement, placed.source.counting_window
    windows = f", windows of {window:,} tokens" if window else ""
    missing = f" (without {', '.join(map(str, placed.lost))})" if placed.lost else ""
    return (
        f"{placed.name}: {counted(placement.devices, 'device')} x "
        f"{counted(placement.slots_per_device, 'slot')}{missing}{windows}"
    )


def _show_figures(output: Output, placed: Placed, evaluation: Evaluation, mixed_seed: int) -> None:
    """Print the figures of all traffic and of its groups, times, losses and busiest ports."""
    traffic = placed.parts.judged_on
    _table(output, "traffic", OTHERS, evaluation)
    together = evaluation.on_one_device
    if together is not None:
        output.tell(Finding("tokens together", {"tokens": together}))
    output.tell(_find_mixed(traffic, mixed_seed))
    output.say("")
    _table(output, "layer, us", TIMES, evaluation)
    output.tell(*find_times_of(placed.serving, traffic))
    findings = [Finding("losses", {"losses": losses}) for losses in evaluation.losses.values()]
    for regime, ports in evaluation.busiest_port.items():
        findings.append(Finding("busiest ports", {"regime": regime, **ports}))
    if findings:
        output.say("")
        output.tell(*findings)


def _find_mixed(traffic: Recording, seed: int) -> Finding:
    """Return how a mixed window is made: figures depend on the number of its sequences."""
    if not traffic.ordered:
        windows = min(traffic.length, WINDOWS_MIXED)
        return Finding("mixed windows", {"windows": windows, "seed": seed})
    if traffic.sequence is None:
        return Finding("mixed tokens", {"seed": seed})
    sequences = labelling.distinct(traffic.sequence).size
    running = min(choose_batch_size(sequences), sequences)
    return Finding("mixed sequences", {"running": running, "of": sequences, "seed": seed})


def _table(output: Output, title: str, names: list[str], evaluation: Evaluation) -> None:
    """Print the figures that all traffic or a group has; times begin with their mean."""
    rows = {"all": evaluation, **evaluation.by_group}
    columns = [
        name
        for name in names
        if any(getattr(figures, name) is not None for figures in rows.values())
    ]
    head = ["mean" if name == TIMES[0] else FIGURES[name].column for name in columns]
    cells = [
        (group, *(FIGURES[name].text(getattr(figures, name)) for name in columns))
        for group, figures in rows.items()
    ]
    output.table((title, *head), cells)


def _show_groups(output: Output, judgement: Judgement) -> None:
    """Print a table per measure, with the change of all traffic and of every group."""
    assert judgement.units is not None
    kind, length = judgement.units.name, judgement.units.autocorrelation.correlation_length
    in_blocks = length > 1
    against, name = judgement.gain.names
    judged_over = counted(judgement.gain.units, f"independent {kind}" if in_blocks else kind)
    output.say(f"{name} against {against}, 95 % intervals over {judged_over}")
    if in_blocks:
        output.say(
            f"INPUT has no sequences, and windows are alike over {length} neighbours, so intervals "
            "come from blocks of so many windows."
        )
    for measure in judgement.whole:
        rows = []
        for group, changes in (("all", judgement.whole), *judgement.groups.items()):
            row, change = changes[measure], changes[measure].change
            ends = (signed(change.value), span(change.low, change.high))
            if not row.before:
                ends = (row.amount, row.interval_in_words.removeprefix("95 % interval ") or "-")
            rows.append((group, *map(FIGURES[measure].text, (row.before, row.after)), *ends))
        output.say("")
        output.table((FIGURES[measure].column, "baseline", "placement", "change", "interval"), rows)
    output.say("")


def _summary(judgement: Judgement) -> Iterator[str]:
    """Write the groups that got worse or gained less, by measure."""
    worse = judgement.worse()
    changes_by_line: dict[str, list[tuple[Comparison, str]]] = {
        "worse in {}, beyond chance": [
            (row, signed(row.change.value) if row.before else row.amount) for row in worse
        ],
        "behind the group that gains most in {}": [
            (row, signed(None if row.behind is None else row.behind.value))
            for row in judgement.behind()
        ],
    }
    for line, changes in changes_by_line.items():
        for measure in judgement.whole:
            groups = [
                f"{_texts.name(row.group)} {change}"
                for row, change in changes
                if row.measure == measure
            ]
            if groups:
                yield f"{line.format(FIGURES[measure].label)}: {listed(groups, NAMED)}"
    if not worse:
        yield "no group got worse beyond chance"


def _advice(judgement: Judgement, judged: tuple[str, ...]) -> Iterator[str]:
    """Write what to do about groups that got worse or could not be judged."""
    assert judgement.units is not None
    kind, (against, placed) = judgement.units.name, judgement.gain.names
    too_few = [f"{group} ({units})" for group, units in judgement.too_few.items()]
    if too_few:
        yield f"too few {kind}s to judge (below {FEWEST}): {listed(too_few, NAMED)}"
    worse = judgement.worse(measures=judged)
    if worse and {row.group for row in worse} >= judgement.groups.keys():
        low = judgement.gain.low
        if judgement.groups and low is not None and low > 0:
            yield (
                f"To do: keep {placed} if the groups are served together, as all traffic gains "
                f"then; keep {against} if each is served alone."
            )
        else:
            yield f"To do: keep {against}, or solve again on traffic of this kind."
    elif worse:
        group = worse[0].group
        yield (
            f"To do: record more of {group} and solve again. --groups minimax minimises for the "
            f'worst group; --groups "{group}=3" gives {group} three times its weight.'
        )
    if too_few:
        yield f"To do: record {FEWEST} {kind}s or more of every group that is to be judged."
