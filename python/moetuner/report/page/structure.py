"""Draw the charts of ``moetuner inspect``; pages show some of them too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetuner import charts as draw
from moetuner.charts import PROPOSED, RUNNING, Chart
from moetuner.report.hot_experts import HotExperts
from moetuner.report.structure import Structure


def list_curves(hot: HotExperts) -> dict[str, Sequence[float]]:
    """Return the shares of picks that experts kept near take, by how these are chosen."""
    curves: dict[str, Sequence[float]] = {
        "most used, a fixed set": hot.static,
        "without preference": hot.chance,
    }
    return curves if hot.cache is None else {**curves, "least recently used is dropped": hot.cache}


def draw_hot_experts(hot: HotExperts) -> Chart:
    """Draw the share of picks that experts kept near take, over their number."""
    # Curves begin at no experts, which take no picks, and end at all, which take all.
    ends = 100 * np.array([0.0, *hot.sizes, 1.0])
    colours = (PROPOSED, "var(--muted)", RUNNING)
    lines = [
        draw.scatter(
            ends,
            100 * np.array([0.0, *shares, 1.0]),
            "%{x:.0f} % of the experts: %{y:.1f} %",
            mode="lines+markers",
            legend=name,
            line={"color": colour},
            marker={"color": colour, "size": 7},
        )
        for (name, shares), colour in zip(list_curves(hot).items(), colours, strict=False)
    ]
    axes = draw.layout("% of the experts that are kept near", "% of the picks")
    label = "picks that the experts take which are kept near"
    return Chart("hot", label, draw.variant(lines, axes))


def draw_structure(structure: Structure) -> tuple[Chart, ...]:
    """Draw hot experts, and the busiest expert of every layer."""
    layers = np.arange(len(structure.skew))
    skew = draw.scatter(
        layers,
        np.array(structure.skew),
        "layer %{x}: %{y:,.3r}",
        mode="markers",
        kind="i2",
        marker={"color": PROPOSED, "size": 9},
    )
    axes = draw.layout("layer", "busiest expert / mean load", count=len(layers))
    label = "load of the busiest expert of every layer"
    return draw_hot_experts(structure.hot_experts), Chart("skew", label, draw.variant([skew], axes))
