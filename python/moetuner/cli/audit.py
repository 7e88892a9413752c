"""``moetuner audit``: whom a placement serves worse than a baseline, group by group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.moves import baseline_option
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import JudgedOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.judgement import MEASURES, Judgement
from moetuner.evaluation.options import ReplayOptions
from moetuner.files import text
from moetuner.files.cells import counted, listed, signed, span
from moetuner.report.outcome import whose_times

# Exit status where a group got worse by more than was allowed.
WORSE = 3

# Groups that a line names; the tables have all.
NAMED = 8


@options.command("audit")
def command(
    *,
    placement_file: Path = argument("PLACEMENT", options.IN_FILE),
    source: Source,
    baseline: str | None = baseline_option(),
    machine: Machine,
    serving: JudgedOptions,
    fail_if_worse: float | None = option(options.Number(min=0), "PCT"),
    measures: tuple[str, ...] = option(
        click.Choice(MEASURES), default=(), flag="--measure", multiple=True
    ),
    output: Output,
) -> int:
    """Show which groups a placement serves worse.

    Lower is better for every measure. Every change has its 95 % interval, over whole sequences
    (without sequence labels: over runs of windows). "Beyond chance" takes all
    groups and measures together: if none is worse or behind, 19 of 20 audits name none. Groups of
    fewer than five sequences, or independent windows, are not judged.

    Parameters
    ----------
    baseline
        The placement that runs. [default: contiguous]
    fail_if_worse
        Exit with status 3 if a group got worse by more than so many percent, beyond chance.
    measures
        Measure that --fail-if-worse judges; may be repeated. [default: the predicted
        time]
    """
    placed = Placed.read(placement_file, source, machine, serving)
    if fail_if_worse is not None:
        placed.check_gate()
    running, against = placed.baseline(baseline)
    traffic = placed.judged[0]
    judged, limit = measures or ("predicted_layer_us",), fail_if_worse
    judgement = placed.judge(
        running,
        (against, placed.name),
        ReplayOptions(mixed=False, threads=source.threads),
        figure="predicted_layer_us",
        measures=measures,
        by_group=True,
    )
    _check_measures(measures, judgement)
    audited = replace(judgement, measure=judged[0])
    failures = [] if limit is None else audited.worse(limit / 100, measures=judged)
    output.say(*placed.lines())
    _show(output, audited, placed.name, against)
    output.say(whose_times(placed.serving, traffic))
    output.say(*_summary(audited, against), *_advice(audited, judged, against))
    for worst in failures[:1]:
        output.say(
            f"failed: {text.name(worst.group)} got worse by {signed(worst.change.value)} in "
            f"{FIGURES[worst.measure].label}, more than {limit:g} %"
        )
    contents = placed.contents(
        judged=judged, fail_if_worse=limit, waterfill=placed.serving.waterfill
    )
    contents |= {
        "placement": str(placement_file),
        "baseline": baseline,
        "gain": audited.gain.to_dict() if audited.gain.before else None,
    }
    output.finish({**contents, **audited.to_dict(), "failed": bool(failures)})
    return WORSE if failures else 0


def _check_measures(measures: tuple[str, ...], audited: Judgement) -> None:
    """Raise for a measure that the traffic does not tell."""
    for measure in measures:
        if measure not in audited.whole:
            raise click.BadParameter(
                f"must be of {', '.join(audited.whole)} for this input, got {measure}",
                param_hint="'--measure'",
            )


def _show(output: Output, audited: Judgement, name: str, against: str) -> None:
    """Print a table of every measure."""
    assert audited.units is not None
    kind, length = audited.units.name, audited.units.blocks.length
    in_blocks = length > 1
    judged_over = counted(audited.gain.units, f"independent {kind}" if in_blocks else kind)
    output.say(f"{name} against {against}, 95 % intervals over {judged_over}")
    if in_blocks:
        output.say(
            f"INPUT has no sequences, and windows are alike over {length} neighbours, so intervals "
            "come from blocks of so many windows."
        )
    for measure in audited.whole:
        rows = []
        for group, changes in (("all", audited.whole), *audited.groups.items()):
            row, change = changes[measure], changes[measure].change
            ends = ("-", "-")
            if row.before:
                ends = (signed(change.value), span(change.low, change.high))
            rows.append((group, *map(FIGURES[measure].text, (row.before, row.after)), *ends))
        output.say("")
        output.table((FIGURES[measure].column, "baseline", "placement", "change", "interval"), rows)
    output.say("")


def _summary(audited: Judgement, against: str) -> Iterator[str]:
    """Write what all traffic gains, and which groups got worse or gained less."""
    if audited.gain.before:
        yield f"All traffic: {audited.gain.sentence}"
    else:
        yield f"All traffic: {FIGURES[audited.measure].label} is 0 under {against}."
    worse = audited.worse()
    for line, findings in (
        (
            "worse in {}, beyond chance",
            [(each, each.change) for each in worse],
        ),
        (
            "behind the group that gains most in {}",
            [(each, each.behind) for each in audited.behind()],
        ),
    ):
        for measure in audited.whole:
            groups = [
                f"{text.name(each.group)} {signed(None if change is None else change.value)}"
                for each, change in findings
                if each.measure == measure
            ]
            if groups:
                yield f"{line.format(FIGURES[measure].label)}: {listed(groups, NAMED)}"
    if not worse:
        yield "no group got worse beyond chance"


def _advice(audited: Judgement, judged: tuple[str, ...], against: str) -> Iterator[str]:
    """Write what to do about groups that got worse, or could not be judged."""
    assert audited.units is not None
    kind = audited.units.name
    too_few = [f"{group} ({units})" for group, units in audited.too_few.items()]
    if too_few:
        yield f"too few {kind}s to judge (below {FEWEST}): {listed(too_few, NAMED)}"
    worse = audited.worse(measures=judged)
    if worse and {each.group for each in worse} >= audited.groups.keys():
        low = audited.gain.low
        if audited.groups and low is not None and low > 0:
            _, placed = audited.gain.names
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
