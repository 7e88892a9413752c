"""``moetuner inspect``: what is in recorded routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetuner.cli import options
from moetuner.cli.options import option
from moetuner.cli.options.machine import DEVICES
from moetuner.cli.options.pages import draw_into, figures_option
from moetuner.cli.options.serving import ServingOptions
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, shares, working
from moetuner.evaluation import evaluate_each
from moetuner.evaluation.intervals import FEWEST
from moetuner.evaluation.options import ReplayOptions
from moetuner.files import text
from moetuner.files.cells import number, percent
from moetuner.placement import blocks
from moetuner.problem import TRAFFIC_CAP
from moetuner.report.hot_experts import HotExperts
from moetuner.report.outcome import whose_times
from moetuner.report.page.structure import draw_structure
from moetuner.report.structure import Structure, structure
from moetuner.topology import Topology

MOST_GROUPS = 12
# Crossing that is not worth a placement, however certain.
LITTLE = 0.005


@options.command("inspect")
def command(
    *,
    source: Source,
    devices: int = option(DEVICES, "N", 4),
    max_imbalance: float = option(options.Number(min=1, infinite=True), "X", TRAFFIC_CAP),
    serving: ServingOptions,
    seed: int = options.seed_option(),
    figures: Path | None = figures_option(),
    output: Output,
) -> None:
    """Show what is in a trace: skew, groups, structure.

    With --for, --cost-model, --regime, --split or --arrival it also predicts the time of the
    contiguous placement, as "moetuner solve" does.

    Parameters
    ----------
    devices
        Devices of the placements that measure structure between layers.
    max_imbalance
        Load cap of those placements.
    figures
        Write charts of hot experts and of skew as SVG and PNG; needs Chrome or Chromium.
    """
    with working("looking for structure") as report:
        measured = structure(
            source.traffic,
            devices,
            max_imbalance=max_imbalance,
            seed=seed,
            threads=source.threads,
            progress=shares(report, "read", then="structure"),
        )
    output.say(source.describe(), "")
    _show_skew(output, measured)
    _show_groups(output, measured)
    _show_crossings(output, measured)
    _show_hot_experts(output, measured.hot_experts)
    contents = {"input": source.facts(), **measured.to_dict()}
    if serving.is_given:
        contents["contiguous"] = _show_served(output, source, serving, devices)
    if figures is not None:
        draw_into(figures, draw_structure(measured), output)
    output.finish(contents)


def _show_served(
    output: Output, source: Source, options: ServingOptions, devices: int
) -> dict[str, float | None]:
    """Print and return the figures of experts in blocks for the traffic as it is served."""
    source, serving = options.resolve(source, Topology(devices))
    traffic = source.traffic
    placement = blocks(traffic.layers, traffic.num_experts, devices)
    with working("replaying"):
        replayed = ReplayOptions(threads=source.threads)
        [[evaluation]] = evaluate_each([placement], traffic, [serving], replayed)
    output.say(
        "",
        *serving.explain(),
        f"Contiguous placement: imbalance {number(evaluation.imbalance, 3)}, predicted time "
        f"{number(evaluation.predicted_layer_us, 1)} us per layer.",
        whose_times(serving, traffic),
    )
    names = ("imbalance", "imbalance_mixed", "predicted_layer_us")
    return {name: getattr(evaluation, name) for name in names}


def _show_skew(output: Output, structure: Structure) -> None:
    """Print what differs from layer to layer: its least, median and most, and where that is."""
    values: dict[str, tuple[Sequence[float], int]] = {
        "busiest expert / mean load": (structure.skew, 2),
        "experts never used": (structure.unused, 0),
    }
    if structure.information and structure.information_chance:
        values["information on next layer, bits"] = (structure.information, 2)
        values["  in addition, expected by chance"] = (structure.information_chance, 2)
    rows = []
    for name, (layers, decimals) in values.items():
        spread = [number(float(part), decimals) for part in np.quantile(layers, (0, 0.5, 1))]
        rows.append((name, *spread, str(int(np.argmax(layers)))))
    output.table(("per layer", "least", "median", "most", "in layer"), rows)
    output.say("")


def _show_groups(output: Output, structure: Structure) -> None:
    """Print how far groups are from the mix; those that differ most, where there are many."""
    if not structure.group_share:
        output.say("INPUT has no groups to compare.", "")
        return
    names = sorted(structure.group_share, key=lambda name: -structure.group_distance[name])
    rows = [
        (name, percent(structure.group_share[name]), number(structure.group_distance[name], 3))
        for name in names[:MOST_GROUPS]
    ]
    output.table(("group", "share", "distance"), rows)
    if len(names) > MOST_GROUPS:
        output.say(f"and {len(names) - MOST_GROUPS} groups nearer to the mix; --json has all")
    output.say("distance to the mix of all groups, from 0 (the same experts) to 1 (all others)", "")


def _show_hot_experts(output: Output, hot: HotExperts) -> None:
    """Print what part of the picks the hottest experts take, and what that says."""
    rows = {"most used, a fixed set": hot.static, "least recently used is dropped": hot.cache}
    head = (
        f"share of {'unseen ' if hot.is_unseen else ''}picks",
        *(f"{percent(size).replace('.0', '')} of experts" for size in hot.sizes),
    )
    output.say("")
    cells = [(name, *map(percent, shares)) for name, shares in rows.items() if shares is not None]
    output.table(head, cells)
    output.say(hot.sentence)
    low, high = min(hot.static_of_layer), max(hot.static_of_layer)
    details = [f"by layer {percent(low)} to {percent(high)}"]
    if hot.static_of_group:
        group = min(hot.static_of_group, key=hot.static_of_group.__getitem__)
        share = percent(hot.static_of_group[group])
        details.append(f"{share} of {text.name(group)} with the set of all other groups, the least")
    if hot.static_later is not None:
        details.append(f"{percent(hot.static_later)} of the later half with the set of the earlier")
    output.say(f"Half of the experts: {'; '.join(details)}.")


def _show_crossings(output: Output, structure: Structure) -> None:
    """Print the crossing reached beside the independence null, and what their gap means."""
    if structure.crossing_contiguous is None:
        output.say("INPUT has no transitions, so it shows no structure between layers.")
        return
    if structure.crossing is None or structure.crossing_independent is None:
        output.say(
            "Statistics have no sequences to hold out, so structure between layers is not "
            "measured. Give the trace instead."
        )
        return
    rows = {
        "contiguous": structure.crossing_contiguous,
        "independence null": structure.crossing_independent,
        f"searched, load cap {structure.max_imbalance:g}": structure.crossing,
    }
    head = ("crossing on held-out sequences", f"{structure.devices} devices")
    output.table(head, [(name, number(crossing, 4)) for name, crossing in rows.items()])
    between = (
        ""
        if structure.gain is None
        else f"95 % interval {100 * structure.gain[0]:.1f} to {percent(structure.gain[1])}"
    )
    if structure.gain is None:
        line = (
            f"Fewer than {FEWEST} independent sequences are held out: structure may be chance. "
            "Record more, with sequence labels."
        )
    elif structure.gain[1] < LITTLE:
        line = "The null is about as good: neighbouring layers route almost independently."
    elif structure.gain[0] <= 0:
        line = f"The gap to the null ({between}) may be chance."
    else:
        line = (
            f"A placement can keep "
            f"{percent(structure.crossing_independent - structure.crossing)} of the "
            f"transitions ({between}) on their device because neighbouring layers route together: "
            "the gap to the independence null."
        )
    output.say(line)
