"""``moetuner audit``: whom a placement serves worse than a baseline, group by group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from moetuner.cli import options
from moetuner.cli.options import option
from moetuner.cli.options.machine import Machine
from moetuner.cli.options.serving import Serving
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.evaluation.auditing import Audit, audit
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import FEWEST, RESAMPLES
from moetuner.files import text
from moetuner.report.cells import counted, listed, number, signed, span
from moetuner.report.outcome import whose_times

# Exit status where a group got worse by more than was allowed.
WORSE = 3

# Groups that a line names; the tables have all.
NAMED = 8

# Figures whose parts add up, so that groups have them.
MEASURES = [name for name, figure in FIGURES.items() if figure.per is not None]


@dataclass(frozen=True)
class Judging:
    """What is judged, and how.

    Parameters
    ----------
    fail_if_worse
        Exit with status 3 if a group got worse by more than so many percent, and that it got worse
        is beyond chance.
    measures
        Measures that --fail-if-worse judges, several times for several; the predicted time by
        default if there is one, else all.
    resamples
        Resamples for the intervals.
    """

    fail_if_worse: Annotated[float | None, option(options.Number(min=0), "PCT")] = None
    measures: Annotated[
        tuple[str, ...], option(click.Choice(MEASURES), flag="--measure", multiple=True)
    ] = ()
    resamples: Annotated[int, option(click.IntRange(1, 1 << 20), "N")] = RESAMPLES
    seed: options.Seed = 0

    def judged(self, audited: Audit) -> tuple[str, ...]:
        """Return the measures that are judged: those given, else the time or, without one, all."""
        for measure in self.measures:
            if measure not in audited.whole:
                raise click.BadParameter(
                    f"must be of {', '.join(audited.whole)} for this input, got {measure}",
                    param_hint="'--measure'",
                )
        default = {"predicted_layer_us"} & audited.whole.keys() or audited.whole
        return self.measures or tuple(default)

    def settings(self, audited: Audit) -> dict[str, Any]:
        """Return the options for JSON."""
        return {
            "fail_if_worse": self.fail_if_worse,
            "judged": list(self.judged(audited)),
            "resamples": self.resamples,
            "seed": self.seed,
        }


@options.command("audit")
def command(
    *,
    placement_file: options.PlacementFile,
    source: Source,
    baseline_file: Annotated[Path | None, option(options.IN_FILE, "FILE")] = None,
    machine: Machine,
    serving: Serving,
    judging: Judging,
    output: Output,
) -> int:
    """Show which groups a placement serves worse.

    Lower is better for every measure. Times are compared with --cost-model or --for. Intervals are
    of each change by itself: 95 %, over whole sequences (without sequence labels: over blocks of
    windows that are alike). Beyond chance is what remains of all groups and measures together:
    where nothing is worse or behind, 19 of 20 audits name nobody. Of fewer than five sequences, or
    blocks, nothing is said.

    Parameters
    ----------
    baseline_file
        Placement to compare with; experts in blocks by default.
    """
    placement = source.load(placement_file)
    topology = machine.topology(placement.devices)
    baseline = None if baseline_file is None else source.load(baseline_file, topology)
    traffic, window = source.traffic, source.counted
    how = serving.arguments(traffic)
    if not serving.has_times:
        how["cost_model"] = None
    served = dict(how)
    how |= {"resamples": judging.resamples, "seed": judging.seed, "threads": source.threads}
    with working("auditing"):
        audited = audit(placement, traffic, topology, baseline=baseline, window=window or 1, **how)
    judged, limit = judging.judged(audited), judging.fail_if_worse
    failures = [] if limit is None else audited.worse(limit / 100, measures=judged)
    output.say(source.describe(), *serving.explain())
    name = text.name(placement_file.name)
    against = "experts in blocks" if baseline_file is None else text.name(baseline_file.name)
    _show(output, audited, name, against)
    if how["cost_model"] is not None:
        output.say(whose_times(how["cost_model"], traffic, how["arrival"]))
    _summary(output, audited, judged, (against, name))
    if failures:
        worst = failures[0]
        output.say(
            f"failed: {text.name(worst.group)} got worse by {signed(worst.change.value)} in "
            f"{FIGURES[worst.measure].label}, more than {limit:g} %"
        )
    settings = serving.settings(topology, served) | {"window": window} | judging.settings(audited)
    contents = {
        "input": source.facts(),
        "placement": str(placement_file),
        "baseline": None if baseline_file is None else str(baseline_file),
        "settings": settings,
    }
    output.finish({**contents, **audited.to_dict(), "failed": bool(failures)})
    return WORSE if failures else 0


def _show(output: Output, audited: Audit, name: str, against: str) -> None:
    """Print a table of every measure."""
    kind, units = audited.units
    independent = "independent " if audited.block_length > 1 else ""
    output.say(
        f"{name} against {against}, 95 % intervals over {counted(units, independent + kind)}"
    )
    if audited.block_length > 1:
        output.say(
            "No sequence labels: neighbouring windows are alike, so they were resampled in blocks "
            f"of {audited.block_length}."
        )
    for measure in audited.whole:
        output.say("")
        rows = []
        for group, of in (("all", audited.whole), *audited.groups.items()):
            row, change = of[measure], of[measure].change
            ends = (
                ("-", "-")
                if change is None
                else (signed(change.value), span(change.low, change.high))
            )
            values = (number(row.baseline.value, 4), number(row.value.value, 4))
            rows.append((group, *values, *ends))
        head = (FIGURES[measure].column, "baseline", "placement", "change", "interval")
        output.table(head, rows)
    output.say("")


def _summary(
    output: Output, audited: Audit, judged: tuple[str, ...], names: tuple[str, str]
) -> None:
    """Print what all traffic gains, which groups got worse or gained less, and what to do."""
    after, before, change, *_ = audited.whole[judged[0]]
    if change is None:
        output.say(f"All traffic: {FIGURES[judged[0]].label} is 0 under {names[0]}.")
    else:
        values = (before.value, after.value, (gain := -change).value, gain.low, gain.high)
        comparison = Comparison(judged[0], *values, units=audited.units[1], names=names)
        output.say(f"All traffic: {comparison.sentence}")
    worse, behind = audited.worse(), audited.behind()
    for line, findings in (
        ("worse in {}, beyond chance", worse),
        ("behind the group that gains most in {}", behind),
    ):
        for measure in audited.whole:
            groups = [
                f"{text.name(of.group)} {signed(of.change.value)}"
                for of in findings
                if of.measure == measure
            ]
            if groups:
                output.say(f"{line.format(FIGURES[measure].label)}: {listed(groups, NAMED)}")
        if findings is worse and not worse:
            output.say("no group got worse beyond chance")
    if audited.too_few:
        few = [f"{group} ({units})" for group, units in audited.too_few.items()]
        output.say(f"too few {audited.units[0]}s to judge (below {FEWEST}): {listed(few, NAMED)}")
    for line in _advice(audited, judged, names[0]):
        output.say(line)


def _advice(audited: Audit, judged: tuple[str, ...], against: str) -> list[str]:
    """Return what to do about groups that got worse, are behind, or could not be judged."""
    lines = []
    worse, behind = (find(measures=judged) for find in (audited.worse, audited.behind))
    if worse and not audited.groups:
        lines.append(f"To do: keep {against}, or solve again on traffic of this kind.")
    elif worse or behind:
        group = (worse or behind)[0].group
        lines.append(
            f"To do: record more of {group} and solve again, with --groups minimax for the sake of "
            f'the worst served group, or --groups "{group}=3" to weigh it.'
        )
    if audited.too_few:
        lines.append(
            f"To do: record {FEWEST} {audited.units[0]}s or more of every group that is to be "
            "judged."
        )
    return lines
