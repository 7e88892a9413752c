"""``moetuner inspect``: what is in recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from moetuner._checks import DEVICE_LIMIT
from moetuner.cli import options
from moetuner.cli.options.serving import Serving, serving_options
from moetuner.cli.options.traffic import Source, traffic_options
from moetuner.cli.output import Output, shares, working
from moetuner.evaluation import evaluate
from moetuner.evaluation.auditing import blocks
from moetuner.evaluation.intervals import FEWEST
from moetuner.report.cells import number, percent
from moetuner.report.outcome import whose_times
from moetuner.report.structure import Structure, structure

MOST_GROUPS = 12
# Crossing that is not worth a placement, however certain.
LITTLE = 0.005


@click.command("inspect")
@traffic_options
@click.option(
    "--devices",
    type=click.IntRange(1, DEVICE_LIMIT),
    default=4,
    show_default=True,
    metavar="N",
    help="Devices for which inter-layer structure is measured.",
)
@click.option(
    "--max-imbalance",
    type=options.Number(min=1, infinite=True),
    default=1.05,
    show_default=True,
    metavar="X",
    help="Load cap of the placements that measure it.",
)
@serving_options
@options.seed_option
@options.json_option
def command(
    source: Source,
    devices: int,
    max_imbalance: float,
    serving: Serving,
    seed: int,
    json_file: Path | None,
) -> None:
    """Show what is in a trace: sizes, skew, differences between groups, inter-layer structure.

    With --for, or another option that says how INPUT is served, also the predicted time of experts
    in blocks, as engines load them: what "moetuner solve" names for contiguous.
    """
    traffic = source.traffic
    with working("looking for structure") as report:
        found = structure(
            traffic,
            devices,
            max_imbalance=max_imbalance,
            seed=seed,
            threads=source.threads,
            progress=shares(report, "read"),
        )
    output = Output(json_file)
    output.say(source.describe())
    output.say()
    show_skew(output, found)
    show_groups(output, found)
    show_crossings(output, found)
    contents = {"input": source.facts(), **asdict(found)}
    if serving.is_given:
        contents["contiguous"] = show_served(output, source, serving, devices)
    output.finish(contents)


def show_served(
    output: Output, source: Source, serving: Serving, devices: int
) -> dict[str, float | None]:
    """Print and return what experts in blocks make of the traffic as it is served."""
    traffic, how = source.traffic, serving.arguments(source.traffic)
    with working("replaying"):
        found = evaluate(
            blocks(traffic.layers, traffic.num_experts, devices),
            traffic,
            window=source.replayed,
            **how,
            threads=source.threads,
        )
    output.say()
    if serving.engine is not None:
        output.say(serving.explain())
    output.say(
        f"Experts in blocks: imbalance {number(found.imbalance, 3)}, predicted time "
        f"{number(found.predicted_layer_us, 1)} us per layer."
    )
    output.say(whose_times(how["cost_model"], traffic, how["arrival"]))
    names = ("imbalance", "imbalance_mixed", "predicted_layer_us")
    return {name: getattr(found, name) for name in names}


def show_skew(output: Output, found: Structure) -> None:
    """Print what differs from layer to layer."""
    rows = [
        _spread("busiest expert / mean load", found.skew, 2),
        _spread("experts never used", found.unused, 0),
    ]
    if found.information and found.information_chance:
        rows.append(_spread("bits known of the next layer", found.information, 2))
        rows.append(_spread("  and more by mere chance", found.information_chance, 2))
    output.table(("per layer", "least", "median", "most", "in layer"), rows)
    output.say()


def show_groups(output: Output, found: Structure) -> None:
    """Print how far groups are from the mix."""
    if not found.group_share:
        output.say("No groups: nothing to compare between kinds of traffic.")
        output.say()
        return
    # The groups that differ most are shown where there are many.
    names = sorted(found.group_share, key=lambda name: -found.group_distance[name])
    rows = [
        (name, percent(found.group_share[name]), number(found.group_distance[name], 3))
        for name in names[:MOST_GROUPS]
    ]
    output.table(("group", "share", "distance"), rows)
    if len(names) > MOST_GROUPS:
        output.say(f"and {len(names) - MOST_GROUPS} groups nearer to the mix; --json has all")
    output.say("distance to the mix of all groups, from 0 (the same experts) to 1 (all others)")
    output.say()


def show_crossings(output: Output, found: Structure) -> None:
    """Print the crossing reached beside the independence null, and what their gap means."""
    if found.crossing_contiguous is None:
        output.say("No transitions: nothing is known of inter-layer structure.")
        return
    if found.crossing is None or found.crossing_independent is None:
        output.say(
            "No sequences can be held out: what a placement can win by inter-layer structure is "
            "not known. Give the trace instead of its statistics."
        )
        return
    output.table(
        ("crossing on held-out sequences", f"{found.devices} devices"),
        [
            ("contiguous", number(found.crossing_contiguous, 4)),
            ("independence null", number(found.crossing_independent, 4)),
            (f"searched, load cap {found.max_imbalance:g}", number(found.crossing, 4)),
        ],
    )
    if found.gain is None:
        output.say(
            f"Fewer than {FEWEST} independent held-out sequences: too few to tell structure from "
            "chance. Record more, with sequence labels."
        )
        return
    low, high = found.gain
    between = f"{percent(low)} to {percent(high)}"
    if high < LITTLE:
        output.say("The null is about as good: neighbouring layers route all but independently.")
    elif low <= 0:
        output.say(
            f"The gap to the null, {between}, may be chance: structure between layers is not shown."
        )
    else:
        output.say(
            f"{percent(found.crossing_independent - found.crossing)} of the transitions "
            f"({between}) stay on their device because neighbouring layers route together: that "
            "gap to the null is what inter-layer placement can win here."
        )


def _spread(name: str, values: Sequence[float], decimals: int) -> tuple[str, ...]:
    """Write the least, median and most of a value per layer, and the layer that has the most."""
    array = np.asarray(values, dtype=float)
    figures = (array.min(), float(np.median(array)), array.max())
    return (name, *(number(float(f), decimals) for f in figures), str(int(array.argmax())))
