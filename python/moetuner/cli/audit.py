"""``moetuner audit``: whom a placement serves worse than a baseline, group by group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options import argument, option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.placed import Placed
from moetuner.cli.options.serving import Serving
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.evaluation.auditing import MEASURES, Audit, audit
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST
from moetuner.files import text
from moetuner.report.cells import counted, listed, number, signed, span
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
    baseline_file: Path | None = option(options.IN_FILE, "FILE"),
    machine: Machine,
    serving: Serving,
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
    baseline_file
        The placement that runs. [default: contiguous]
    fail_if_worse
        Exit with status 3 if a group got worse by more than so many percent, beyond chance.
    measures
        Measure that --fail-if-worse judges; may be repeated. [default: the predicted
        time]
    """
    placed = Placed.read(placement_file, source, machine, serving)
    baseline, against = placed.baseline(baseline_file)
    (traffic, *_), served = placed.judged, placed.arguments
    arguments: dict[str, Any] = {"threads": source.threads, "baseline": baseline, **served}
    arguments |= {"units": placed.source.units, "measures": placed.measures(measures)}
    with working("auditing"):
        audited = audit(
            placed.placement,
            traffic,
            placed.topology,
            window=placed.source.counted or 1,
            **arguments,
        )
    judged, limit = _judged(measures, audited), fail_if_worse
    failures = [] if limit is None else audited.worse(limit / 100, measures=judged)
    output.say(*placed.lines())
    _show(output, audited, placed.name, against)
    output.say(whose_times(served["cost_model"], traffic, served["arrival"]))
    gain = _gain(audited, judged[0], (against, placed.name))
    output.say(*_summary(audited, judged, gain, against), *_advice(audited, judged, against))
    for worst in failures[:1]:
        output.say(
            f"failed: {text.name(worst.group)} got worse by {signed(worst.change.value)} in "
            f"{FIGURES[worst.measure].label}, more than {limit:g} %"
        )
    contents = placed.contents(judged=judged, fail_if_worse=limit)
    contents |= {
        "placement": str(placement_file),
        "baseline": None if baseline_file is None else str(baseline_file),
        "gain": None if gain is None else gain.to_dict(),
    }
    output.finish({**contents, **audited.to_dict(), "failed": bool(failures)})
    return WORSE if failures else 0


def _judged(measures: tuple[str, ...], audited: Audit) -> tuple[str, ...]:
    """Return the measures that are judged: those given, else the time."""
    for measure in measures:
        if measure not in audited.whole:
            raise click.BadParameter(
                f"must be of {', '.join(audited.whole)} for this input, got {measure}",
                param_hint="'--measure'",
            )
    return measures or ("predicted_layer_us",)


def _show(output: Output, audited: Audit, name: str, against: str) -> None:
    """Print a table of every measure."""
    kind, units = audited.units
    in_blocks = audited.block_length > 1
    judged_over = counted(units, f"independent {kind}" if in_blocks else kind)
    output.say(f"{name} against {against}, 95 % intervals over {judged_over}")
    if in_blocks:
        output.say(
            "No sequence labels: neighbouring windows are alike, over "
            f"{audited.block_length} windows, so runs that are longer are compared."
        )
    for measure in audited.whole:
        rows = []
        for group, changes in (("all", audited.whole), *audited.groups.items()):
            row, change = changes[measure], changes[measure].change
            ends = ("-", "-")
            if change is not None:
                ends = (signed(change.value), span(change.low, change.high))
            rows.append((group, number(row.baseline.value, 4), number(row.value.value, 4), *ends))
        output.say("")
        output.table((FIGURES[measure].column, "baseline", "placement", "change", "interval"), rows)
    output.say("")


def _gain(audited: Audit, measure: str, names: tuple[str, str]) -> Comparison | None:
    """Return what all traffic gains; None where nothing was to be gained."""
    after, before, change, *_ = audited.whole[measure]
    if change is None:
        return None
    values = (before.value, after.value, (gain := -change).value, gain.low, gain.high)
    return Comparison(measure, *values, units=audited.units[1], names=names)


def _summary(
    audited: Audit, judged: tuple[str, ...], gain: Comparison | None, against: str
) -> Iterator[str]:
    """Write what all traffic gains, and which groups got worse or gained less."""
    if gain is None:
        yield f"All traffic: {FIGURES[judged[0]].label} is 0 under {against}."
    else:
        yield f"All traffic: {gain.sentence}"
    worse = audited.worse()
    for line, findings in (
        ("worse in {}, beyond chance", worse),
        ("behind the group that gains most in {}", audited.behind()),
    ):
        for measure in audited.whole:
            groups = [
                f"{text.name(finding.group)} {signed(finding.change.value)}"
                for finding in findings
                if finding.measure == measure
            ]
            if groups:
                yield f"{line.format(FIGURES[measure].label)}: {listed(groups, NAMED)}"
        if findings is worse and not worse:
            yield "no group got worse beyond chance"


def _advice(audited: Audit, judged: tuple[str, ...], against: str) -> Iterator[str]:
    """Write what to do about groups that got worse, or could not be judged."""
    kind = audited.units[0]
    too_few = [f"{group} ({units})" for group, units in audited.too_few.items()]
    if too_few:
        yield f"too few {kind}s to judge (below {FEWEST}): {listed(too_few, NAMED)}"
    worse = audited.worse(measures=judged)
    if worse and {finding.group for finding in worse} >= audited.groups.keys():
        yield f"To do: keep {against}, or solve again on traffic of this kind."
    elif worse:
        group = worse[0].group
        yield (
            f"To do: record more of {group} and solve again. --groups minimax minimises for the "
            f'worst group; --groups "{group}=3" gives {group} three times its weight.'
        )
    if too_few:
        yield f"To do: record {FEWEST} {kind}s or more of every group that is to be judged."
