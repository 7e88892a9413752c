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
from moetuner.evaluation import evaluate
from moetuner.evaluation.intervals import FEWEST
from moetuner.files.cells import number, percent
from moetuner.placement import blocks
from moetuner.problem import TRAFFIC_CAP
from moetuner.report.findings import Finding
from moetuner.report.hot_experts import HotExperts
from moetuner.report.outcome import find_times_of
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
        evaluation = evaluate(placement, traffic, serving, threads=source.threads)
    output.say(
        "",
        *serving.explain(),
    )
    figures = {"imbalance": evaluation.imbalance, "us": evaluation.predicted_layer_us}
    output.tell(
        Finding("contiguous placement", figures),
        *find_times_of(serving, traffic),
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
        output.tell(Finding("no groups"))
        output.say("")
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
    least = min(hot.static_of_group, key=hot.static_of_group.__getitem__, default=None)
    details = {
        "low": min(hot.static_of_layer),
        "high": max(hot.static_of_layer),
        "group": least,
        "of_group": None if least is None else hot.static_of_group[least],
        "later": hot.static_later,
    }
    output.tell(hot.finding, Finding("half of the experts", details))


def _show_crossings(output: Output, structure: Structure) -> None:
    """Print the crossing reached beside the independence null, and what their gap means."""
    if structure.crossing_contiguous is None:
        output.tell(Finding("no transitions"))
        return
    if structure.crossing is None or structure.crossing_independent is None:
        output.tell(Finding("nothing held out"))
        return
    rows = {
        "contiguous": structure.crossing_contiguous,
        "independence null": structure.crossing_independent,
        f"searched, load cap {structure.max_imbalance:g}": structure.crossing,
    }
    head = ("crossing on held-out sequences", f"{structure.devices} devices")
    output.table(head, [(name, number(crossing, 4)) for name, crossing in rows.items()])
    output.tell(_conclude(structure.gain, structure.crossing_independent - structure.crossing))


def _conclude(gain: tuple[float, float] | None, kept: float) -> Finding:
    """Return what the gap between a searched placement and the independence null means."""
    if gain is None:
        return Finding("too few sequences", {"least": FEWEST})
    low, high = gain
    if high < LITTLE:
        return Finding("no structure")
    if low <= 0:
        return Finding("uncertain structure", {"low": low, "high": high})
    return Finding("structure", {"kept": kept, "low": low, "high": high})
