"""``moetuner audit``: whom a placement serves worse than a baseline, group by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moetuner.cli import options
from moetuner.cli.options.machine import Machine, machine_options
from moetuner.cli.options.serving import Serving, serving_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output, working
from moetuner.evaluation.auditing import Audit, Finding, audit
from moetuner.evaluation.intervals import FEWEST, RESAMPLES, Interval
from moetuner.files import text
from moetuner.report import gains
from moetuner.report.cells import number, signed
from moetuner.report.outcome import whose_times

# Exit status where a group got worse by more than was allowed.
WORSE = 3

# Groups that a line names; the tables have all.
NAMED = 8

NAMES = {
    "imbalance": "imbalance",
    "predicted_layer_us": "layer us",
    "crossing": "crossing",
    "fanout": "fanout",
    "node_fanout": "node fanout",
}


@click.command("audit")
@click.argument("placement_file", metavar="PLACEMENT", type=options.IN_FILE)
@traffic_options
@click.option(
    "--baseline",
    "baseline_file",
    type=options.IN_FILE,
    metavar="FILE",
    help="Placement to compare with; experts in blocks by default.",
)
@machine_options
@serving_options
@click.option(
    "--fail-if-worse",
    type=options.Number(min=0),
    metavar="PCT",
    help=f"Exit with status {WORSE} if a group got worse by more than so many percent, and that "
    "it got worse is beyond chance.",
)
@click.option(
    "--measure",
    "measures",
    type=click.Choice(list(NAMES)),
    multiple=True,
    help="Measures that --fail-if-worse judges, several times for several; the predicted time by "
    "default if there is one, else all.",
)
@click.option(
    "--resamples",
    type=click.IntRange(1, 1 << 20),
    default=RESAMPLES,
    show_default=True,
    metavar="N",
    help="Resamples for the intervals.",
)
@options.seed_option
@options.json_option
def command(
    placement_file: Path,
    source: Source,
    baseline_file: Path | None,
    machine: Machine,
    serving: Serving,
    fail_if_worse: float | None,
    measures: tuple[str, ...],
    resamples: int,
    seed: int,
    json_file: Path | None,
) -> int:
    """Show which groups a placement serves worse.

    Lower is better for every measure. Times are compared with --cost-model or --for. Intervals are
    of each change by itself: 95 %, over whole sequences (without sequence labels: over blocks of
    windows that are alike). Beyond chance is what remains of all groups and measures together:
    where nothing is worse or behind, 19 of 20 audits name nobody. Of fewer than five sequences, or
    blocks, nothing is said.
    """
    placement = source.load(placement_file)
    topology = machine.topology(placement.devices)
    baseline = None if baseline_file is None else source.load(baseline_file, topology)
    traffic, window = source.traffic, source.counted
    how = serving.arguments(traffic)
    if not serving.has_times:
        how["cost_model"] = None
    with working("auditing"):
        found = audit(
            placement,
            traffic,
            topology,
            baseline=baseline,
            window=window or 1,
            **how,
            resamples=resamples,
            seed=seed,
            threads=source.threads,
        )
    known = tuple(found.whole)
    for measure in measures:
        if measure not in known:
            raise click.BadParameter(
                f"must be of {', '.join(known)} for this input, got {measure}",
                param_hint="'--measure'",
            )
    judged = measures or (("predicted_layer_us",) if "predicted_layer_us" in known else known)
    failures = []
    if fail_if_worse is not None:
        failures = found.worse(fail_if_worse / 100, measures=judged)

    output = Output(json_file)
    output.say(source.describe())
    if serving.engine is not None:
        output.say(serving.explain())
    against = "experts in blocks" if baseline_file is None else text.name(baseline_file.name)
    kind, units = found.units
    independent = "independent " if found.block_length > 1 else ""
    output.say(
        f"{text.name(placement_file.name)} against {against}, 95 % intervals over {units:,} "
        f"{independent}{kind}{'' if units == 1 else 's'}"
    )
    if found.block_length > 1:
        output.say(
            f"No sequence labels: neighbouring windows are alike, so they were resampled in blocks "
            f"of {found.block_length}."
        )
    for measure in known:
        output.say()
        head = (NAMES[measure], "baseline", "placement", "change", "interval")
        rows = [("all", found.whole), *found.groups.items()]
        output.table(head, [_row(name, changes[measure]) for name, changes in rows])
    output.say()
    if how["cost_model"] is not None:
        output.say(whose_times(how["cost_model"], traffic, how["arrival"]))
    output.say(_gain(found, judged[0], against))
    _summary(output, found)
    for line in _advice(found, judged, None if baseline_file is None else against):
        output.say(line)
    if failures:
        worst = failures[0]
        output.say(
            f"failed: {text.name(worst.group)} got worse by {signed(worst.change.value)} in "
            f"{NAMES[worst.measure]}, more than {fail_if_worse:g} %"
        )
    output.finish(
        {
            "input": source.facts(),
            "placement": str(placement_file),
            "baseline": None if baseline_file is None else str(baseline_file),
            "settings": {
                **serving.settings(topology, how),
                "window": window,
                "fail_if_worse": fail_if_worse,
                "judged": list(judged),
                "resamples": resamples,
                "seed": seed,
            },
            **found.to_dict(),
            "failed": bool(failures),
        }
    )
    return WORSE if failures else 0


def _row(name: str, of: Any) -> tuple[str, ...]:
    change: Interval | None = of.change
    span = "-"
    if change is not None and change.low is not None and change.high is not None:
        span = f"{signed(change.low).removesuffix(' %')} to {signed(change.high)}"
    return (
        name,
        number(of.baseline.value, 4),
        number(of.value.value, 4),
        "-" if change is None else signed(change.value),
        span,
    )


def _gain(found: Audit, measure: str, against: str) -> str:
    """Write in one sentence what the placement brings to all traffic, and how sure that is."""
    change = found.whole[measure].change
    kind, units = found.units
    if change is None:
        return f"All traffic: {gains.NAMES[measure]} is 0 under {against}."
    word = "more" if change.value > 0 else "less"
    line = (
        f"All traffic: {100 * abs(change.value):.1f} % {word} {gains.NAMES[measure]} than {against}"
    )
    if units < FEWEST or change.low is None or change.high is None:
        return f"{line}; too few {kind}s to say how sure that is ({units}, below {FEWEST})."
    sure = "" if change.low > 0 or change.high < 0 else ": that may be chance"
    return f"{line} (95 %: {signed(change.low)} to {signed(change.high)}){sure}."


def _summary(output: Output, found: Audit) -> None:
    """Name the groups that got worse, and those that gained less than the best."""
    worse, behind = found.worse(), found.behind()
    for measure in found.whole:
        listed = _listed(worse, measure)
        if listed:
            output.say(f"worse in {NAMES[measure]}, beyond chance: {listed}")
    if not worse:
        output.say("no group got worse beyond chance")
    for measure in found.whole:
        listed = _listed(behind, measure)
        if listed:
            output.say(f"behind the group that gains most in {NAMES[measure]}: {listed}")
    if found.too_few:
        number_of = [f"{group} ({units})" for group, units in found.too_few.items()]
        more = f" and {len(number_of) - NAMED} more" if len(number_of) > NAMED else ""
        output.say(
            f"too few {found.units[0]}s to judge (below {FEWEST}): "
            f"{', '.join(number_of[:NAMED])}{more}"
        )


def _advice(found: Audit, judged: tuple[str, ...], against: str | None) -> list[str]:
    """Return what to do about groups that got worse, are behind, or could not be judged."""
    lines = []
    worse, behind = (find(measures=judged) for find in (found.worse, found.behind))
    if worse and not found.groups:
        lines.append(
            f"To do: keep {against or 'experts in blocks'}, or solve again on traffic of this kind."
        )
    elif worse or behind:
        group = (worse or behind)[0].group
        lines.append(
            f"To do: record more of {group} and solve again, with --groups minimax for the sake of "
            f'the worst served group, or --groups "{group}=3" to weigh it.'
        )
    if found.too_few:
        lines.append(
            f"To do: record {FEWEST} {found.units[0]}s or more of every group that is to be judged."
        )
    return lines


def _listed(findings: list[Finding], measure: str) -> str:
    mine = [each for each in findings if each.measure == measure]
    named = [f"{text.name(each.group)} {signed(each.change.value)}" for each in mine[:NAMED]]
    return ", ".join(named) + (f" and {len(mine) - NAMED} more" if len(mine) > NAMED else "")
