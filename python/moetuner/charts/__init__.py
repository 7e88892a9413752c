"""Build charts for plotly: points, lines and heat maps."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._texts import name as one_line

Spec = dict[str, Any]

# Most devices of a matrix of a single layer; with more devices it has nodes.
MOST_DEVICES = 16
# Most points of a line.
POINTS = 1000
ZERO: Spec = {"zeroline": True, "zerolinecolor": "var(--text)", "zerolinewidth": 1}
RUNNING, PROPOSED = "var(--running)", "var(--proposed)"


@dataclass(frozen=True)
class Chart:
    """One chart: plotly's data and layout, in one variant or several to choose from.

    Parameters
    ----------
    key
        Name that is unique on the page.
    label
        Description for readers who cannot see the chart.
    variants
        Data and layout by the name of the variant.
    height
        Height in pixels.
    selects
        Keys of charts in which a click on layer n chooses the variant of that layer.
    stacked
        Height and axes of matrices below each other, for narrow screens.
    """

    key: str
    label: str
    variants: dict[str, Spec]
    height: int = 360
    selects: tuple[str, ...] = ()
    stacked: Spec | None = None


def pack(values: ArrayLike, kind: str = "f4") -> Spec:
    """Encode numbers as plotly reads them: base64, with a shape where there are two dimensions."""
    array = np.ascontiguousarray(np.asarray(values), dtype=np.dtype(kind).newbyteorder("<"))
    spec: Spec = {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode()}
    if array.ndim > 1:
        spec["shape"] = ", ".join(map(str, array.shape))
    return spec


def escape_tags(text: str, limit: int = 40) -> str:
    """Return a name of at most ``limit`` characters in which plotly finds no tags."""
    text = one_line(text).replace("<", "\u2039").replace(">", "\u203a").replace("&", "\uff06")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def layout(x: str = "", y: str = "", *, count: int = 0, **others: Any) -> Spec:
    """Return a layout with titles of the axes.

    Where x has ``count`` whole numbers, and these are few, every one has a label.
    """
    axis = {"automargin": True, "gridcolor": "var(--grid)"}
    return {
        "xaxis": {"title": {"text": x}, **axis, "zeroline": False, **label_each(count)},
        "yaxis": {"title": {"text": y}, **axis, **ZERO},
        "margin": {"l": 56, "r": 16, "t": 28, "b": 44},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--text)", "size": 13},
        "hoverlabel": {"namelength": -1},
        **others,
    }


def variant(data: list[Spec], layout: Spec) -> dict[str, Spec]:
    """Return the variants of a chart that has only one."""
    return {"": {"data": data, "layout": layout}}


def label_each(count: int) -> Spec:
    """Return the axis setting that labels every whole number, where there are few."""
    return {"dtick": 1} if 0 < count <= 12 else {}


def scatter(
    x: ArrayLike,
    y: ArrayLike,
    hover: str,
    *,
    mode: str = "lines+markers",
    legend: str | None = None,
    kind: str = "f4",
    **others: Any,
) -> Spec:
    """Draw points, or a line through them.

    ``legend`` is their name in the legend and under the pointer; ``kind`` is the type of x.
    """
    named = {} if legend is None else {"name": escape_tags(legend)}
    return {
        "type": "scatter",
        "mode": mode,
        **named,
        "x": pack(x, kind),
        "y": pack(y),
        "hovertemplate": f"{hover}<extra>{named.get('name', '')}</extra>",
        **others,
    }


def whiskers(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any], **others: Any) -> Spec:
    """Draw intervals around values."""
    above, below = (pack(np.maximum(length, 0)) for length in (high - values, values - low))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, **others}


def thin(values: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return places and values of at most ``POINTS`` points: the least and most of each run."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= POINTS:
        return np.arange(len(array)), array
    ends = []
    for run in np.array_split(np.arange(len(array)), POINTS // 2):
        ends += sorted({int(run[array[run].argmin()]), int(run[array[run].argmax()])})
    places = np.array(ends)
    return places, array[places]


def heat_map(table: NDArray[Any], hover: str, **others: Any) -> Spec:
    """Draw a matrix in colours."""
    return {"type": "heatmap", "z": pack(table), "hovertemplate": hover, **others}


def make_colour_scale(unit: str, low: float, high: float, **others: Any) -> Spec:
    """Return a scale of colours that colour-blind readers can tell apart by brightness."""
    bar = {"title": {"text": unit, "side": "right"}, **others, "thickness": 12}
    return {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": bar}


def outline(path: str, colour: str = "var(--border)", width: int = 1, **where: str) -> Spec:
    """Draw lines over a heat map, as one shape: many shapes make the browser slow."""
    return {"type": "path", "path": path, **where, "line": {"color": colour, "width": width}}


def stack(parts: int) -> Spec:
    """Return height and axes of matrices below each other."""
    axes: Spec = {}
    for number in range(parts):
        name = "" if number == 0 else str(number + 1)
        ends = [1 - (number + 1) / parts + 0.12 * (number < parts - 1), 1 - number / parts]
        axes |= {f"xaxis{name}": {"domain": [0, 1]}, f"yaxis{name}": {"domain": ends}}
    return {"height": 340 * parts, "axes": axes}


def matrices(
    tables: Sequence[NDArray[Any]],
    names: Sequence[str],
    what: str,
    unit: str,
    nodes: Sequence[int] = (),
) -> Spec:
    """Draw square matrices side by side on one scale of colours, with boxes around nodes.

    ``nodes`` are the devices of every node.
    """
    highest = max(float(table.max(initial=0)) for table in tables) or 1.0
    spec = layout(f"to {what}", f"from {what}", margin={"l": 56, "r": 16, "t": 40, "b": 44})
    axes = spec.pop("xaxis"), spec.pop("yaxis")
    spec |= {"coloraxis": make_colour_scale(unit, 0, highest), "annotations": [], "shapes": []}
    data = []
    for number, (table, name) in enumerate(zip(tables, names, strict=True)):
        x, y = (f"{axis}{number + 1 if number else ''}" for axis in "xy")
        low, side = number / len(tables), len(table)
        domain = [low + 0.04 * number, low + 1 / len(tables) - 0.04 * (1 - number)]
        ticks = {"dtick": 1} if side <= MOST_DEVICES else {}
        common = {"showgrid": False, "zeroline": False, "constrain": "domain", **ticks}
        spec[f"xaxis{x[1:]}"] = {**axes[0], **common, "domain": domain, "anchor": y}
        spec[f"yaxis{y[1:]}"] = {
            **axes[1],
            **common,
            **({"title": {"text": ""}} if number else {}),
            "anchor": x,
            "autorange": "reversed",
            "scaleanchor": x,
        }
        at = {"xref": f"{x} domain", "yref": f"{y} domain", "x": 0.5, "y": 1.02}
        spec["annotations"].append(
            {"text": escape_tags(name), **at, "showarrow": False, "yanchor": "bottom"}
        )
        if 1 < max(nodes, default=0) < side:
            ends = pairwise(np.cumsum([0, *nodes]) - 0.5)
            boxes = "".join(f"M{low},{low}H{high}V{high}H{low}Z" for low, high in ends)
            spec["shapes"].append(outline(boxes, xref=x, yref=y))
        hover = f"{what} %{{y}} to %{{x}}: %{{z:,.3r}} {unit}<extra></extra>"
        data.append(heat_map(table, hover, coloraxis="coloraxis", xaxis=x, yaxis=y))
    return {"data": data, "layout": spec}
