"""Draw placements: the experts on devices, the load of devices, and what a loss does to it.

All of this is drawn from arrays, so that placements themselves can call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import charts as draw
from moetuner.charts import PROPOSED, RUNNING, Chart, Spec

# Most devices with a label, slots of a device whose experts are drawn one by one, and copies that
# are marked one by one.
LABELLED, SEGMENTS, MARKED = 24, 32, 4000
COLOURS = (RUNNING, PROPOSED)

# Slots of a placement [L,D,S], and copies of every expert [L,E].
Table = tuple[NDArray[Any], NDArray[Any]]


def share_load(
    slots: NDArray[Any],
    load: NDArray[Any],
    replicas: NDArray[Any],
    share: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the load of slots [L,D,S] over the mean of an expert, and the copies of each slot's.

    ``load`` and ``replicas`` are of experts [L,E]. Slots serve a ``share`` [L,D,S] of their
    expert's load, by default as much as its other copies; empty slots have -1.
    """
    layer, expert = np.arange(len(slots))[:, None, None], np.maximum(slots, 0)
    copies = np.maximum(replicas[layer, expert], 1)
    relative = load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12)
    served = relative[layer, expert] * (1 / copies if share is None else share)
    return np.where(slots >= 0, served, -1.0), copies


def draw_placements(
    tables: Mapping[str, Table], load: NDArray[Any], speed: NDArray[Any] | None = None
) -> Chart:
    """Draw the experts on devices, of placements below each other, with a dot on every copy.

    Parameters
    ----------
    tables
        Slots [L,D,S] and copies of every expert [L,E] by the name of their placement.
    load
        Load of every expert [L,E].
    speed
        Relative speed of every device [D]; by default all are equal.
    """
    specs = []
    for slots, replicas in tables.values():
        served, copies = share_load(slots, load, replicas)
        times = np.maximum(served, 0).sum(axis=2) / (1.0 if speed is None else speed)
        specs.append(draw_slots(slots, served, copies, times, has_marks=True))
    layers = len(load)
    height = (90 + max(120, min(420, 18 * layers))) * len(specs) + 30
    label = "heat map of the load of every expert, by layer and device"
    return Chart("placements", label, draw.variant(*_stack(specs, [*tables])), height)


def draw_slots(
    slots: NDArray[Any],
    load: NDArray[Any],
    copies: NDArray[Any],
    times: NDArray[Any],
    *,
    has_marks: bool = False,
) -> Spec:
    """Draw the load of slots [L,D,S] as a heat map, device by device, the busiest slots first.

    ``copies`` has the number of copies of each slot's expert. ``times`` are of devices [L,D]; all
    devices wait for the one with the longest. ``has_marks`` puts a dot on experts with copies.
    """
    layers, devices, width = slots.shape
    order = np.argsort(-load, axis=2, kind="stable")
    sorted_load, expert, sorted_copies = (
        np.take_along_axis(by_slot, order, axis=2).reshape(layers, -1)
        for by_slot in (load, slots, copies)
    )
    shade = np.where(sorted_load > 0, np.log2(np.maximum(sorted_load, 2**-6)), np.nan)
    lines = "".join(f"M{width * d - 0.5},0V1" for d in range(1, devices))
    shapes = [draw.outline(lines, yref="paper")] if lines else []
    loaded = np.flatnonzero(times.any(axis=1)) if devices > 1 else ()
    slowest = [(int(layer), width * int(times[layer].argmax()) - 0.5) for layer in loaded]
    if slowest:
        boxes = "".join(
            f"M{left},{layer - 0.5}H{left + width}V{layer + 0.5}H{left}Z" for layer, left in slowest
        )
        named = {"name": "device that all others wait for", "showlegend": True}
        shapes.append(draw.outline(boxes, colour="var(--box)", width=2) | named)
    ticks = {"tickvals": [*range(-3, 4)], "ticktext": ["⅛", "¼", "½", "1", "2", "4", "8"]}
    scale = draw.make_colour_scale("x mean", -3, 3, **ticks)
    data = draw.heat_map(
        shade,
        "layer %{y}, expert %{customdata[0]}: %{text:.3r} x the mean of an expert (copies: "
        "%{customdata[1]})<extra></extra>",
        customdata=draw.pack(np.stack([expert, sorted_copies], axis=2), "i4"),
        text=draw.pack(np.maximum(sorted_load, 0)),
        colorscale=scale["colorscale"],
        zmin=scale["cmin"],
        zmax=scale["cmax"],
        colorbar=scale["colorbar"],
    )
    spec = _lay_out_slots(slots, shapes, has_legend=bool(slowest))
    marks = _mark_copies(sorted_copies, expert) if has_marks else []
    if marks:  # points widen the axes
        spec["xaxis"]["range"] = [-0.5, devices * width - 0.5]
        spec["yaxis"] |= {"autorange": False, "range": [layers - 0.5, -0.5]}
        spec["showlegend"] = True
    return {"data": [data, *marks], "layout": spec}


def _lay_out_slots(slots: NDArray[Any], shapes: list[Spec], *, has_legend: bool) -> Spec:
    """Return the layout of a heat map of slots [L,D,S]."""
    layers, devices, width = slots.shape
    labelled = range(0, devices, max(1, -(-devices // LABELLED)))
    spec = draw.layout("slots, by device", "layer", shapes=shapes, showlegend=has_legend)
    spec["xaxis"] |= {
        "tickvals": [width * d + (width - 1) / 2 for d in labelled],
        "ticktext": [f"{d}" for d in labelled],
        "showgrid": False,
    }
    spec["yaxis"] |= {"autorange": "reversed", "showgrid": False, "zeroline": False}
    spec["yaxis"] |= draw.label_each(layers)
    return spec


def _mark_copies(copies: NDArray[Any], expert: NDArray[Any]) -> list[Spec]:
    """Return dots on the cells [L,D*S] whose expert has several copies, where they are few."""
    layer, cell = np.nonzero((copies > 1) & (expert >= 0))
    if not 0 < len(layer) <= MARKED:
        return []
    border = {"color": "black", "width": 1}
    dot = {"symbol": "circle", "color": "white", "size": 8, "line": border}
    marks = draw.scatter(cell, layer, "", mode="markers", legend="expert with copies", kind="i4")
    # The numbers of a copy are those of the cell below it.
    return [marks | {"marker": dot, "hoverinfo": "skip", "showlegend": True}]


def draw_devices(
    tables: Mapping[str, Table],
    load: NDArray[Any],
    layer: int,
    speed: NDArray[Any] | None = None,
) -> Chart:
    """Draw the load of every device in one layer as bars, an expert on top of the other.

    Arguments are those of ``draw_placements``.
    """
    data: list[Spec] = []
    highest = []
    for number, (name, (slots, replicas)) in enumerate(tables.items()):
        served, _ = share_load(slots, load, replicas)
        served = np.maximum(served[layer], 0) / (1.0 if speed is None else speed[:, None])
        served /= max(float(served.sum(axis=1).mean()), 1e-12)
        experts = slots[layer]
        if served.shape[1] > SEGMENTS:
            served, experts = served.sum(axis=1, keepdims=True), np.full((len(served), 1), -1)
        highest.append(f"{name}: busiest {served.sum(axis=1).max():.2f} x the mean")
        colour = COLOURS[number % 2]
        data += _draw_segments(served, experts, name, colour)
    spec = draw.layout("device", "load / mean of devices", count=len(served), barmode="group")
    spec["yaxis"] |= {"rangemode": "tozero"}
    spec["shapes"] = [draw.outline("M0,1H1", "var(--text)", xref="paper") | {"layer": "above"}]
    spec["shapes"][0]["line"]["dash"] = "dash"
    spec["margin"]["t"] = 60
    spec["title"] = {"text": f"layer {layer}: " + "; ".join(highest), "font": {"size": 13}}
    label = f"load of every device in layer {layer}"
    return Chart("devices", label, draw.variant(data, spec), 360)


def _draw_segments(
    served: NDArray[Any], experts: NDArray[Any], name: str, colour: str
) -> list[Spec]:
    """Draw the loads of devices [D,S] as bars of segments, the largest at the bottom."""
    order = np.argsort(-served, axis=1, kind="stable")
    sizes = np.take_along_axis(served, order, axis=1)
    names = np.take_along_axis(experts, order, axis=1)
    base = np.cumsum(sizes, axis=1) - sizes
    border = {"color": "var(--back)", "width": 1}
    return [
        {
            "type": "bar",
            "name": draw.escape_tags(name),
            "legendgroup": name,
            "showlegend": rank == 0,
            "offsetgroup": name,
            "x": draw.pack(np.arange(len(sizes)), "i2"),
            "y": draw.pack(sizes[:, rank]),
            "base": draw.pack(base[:, rank]),
            "customdata": draw.pack(names[:, rank], "i4"),
            "marker": {"color": colour, "line": border},
            "hovertemplate": "device %{x}, expert %{customdata}: %{y:.3r}<extra></extra>",
        }
        for rank in range(sizes.shape[1])
    ]


def draw_losses(
    effects: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], domain: str = "device"
) -> Chart:
    """Draw what the loss of each device, or node, does.

    Parameters
    ----------
    effects
        By the name of a placement: busiest device over the mean of those that are left, and
        experts without a copy, both by loss and layer [F,L].
    domain
        Failure domain of the losses.
    """
    lost: list[Spec] = []
    busiest: list[Spec] = []
    for number, (name, (imbalance, experts)) in enumerate(effects.items()):
        colour = COLOURS[number % 2]
        texts = ("%{y:.3r} experts of a layer lose their last copy", "%{y:.3r} x the mean")
        values = (experts.mean(axis=1), imbalance.mean(axis=1))
        for bars, numbers, hover in zip((lost, busiest), values, texts, strict=True):
            bars.append(
                {
                    "type": "bar",
                    "name": draw.escape_tags(name),
                    "showlegend": bars is lost,
                    "offsetgroup": name,
                    "x": draw.pack(np.arange(len(numbers)), "i2"),
                    "y": draw.pack(numbers),
                    "marker": {"color": colour},
                    "hovertemplate": f"{domain} %{{x}}: {hover}<extra></extra>",
                }
            )
    losses = len(imbalance)
    specs = []
    for bars, unit in ((lost, "experts lost"), (busiest, "busiest / mean")):
        spec = draw.layout(f"lost {domain}", unit, count=losses, barmode="group")
        spec["yaxis"] |= {"rangemode": "tozero"}
        specs.append({"data": bars, "layout": spec})
    label = f"what the loss of each {domain} does"
    return Chart("losses", label, draw.variant(*_stack(specs, ("", ""))), 520)


def draw_on_one_device(shares: Mapping[str, float]) -> Chart:
    """Draw the tokens of a hundred that stay on one device, and those that visit both."""
    names = [draw.escape_tags(name) for name in shares][::-1]
    staying = np.array([*shares.values()][::-1])
    rows = (
        ("all experts on one device", staying, "var(--proposed)"),
        ("experts on both devices", 100 - staying, "var(--grid)"),
    )
    data: list[Spec] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": title,
            "x": draw.pack(values),
            "y": names,
            "text": [f"{value:.0f}" for value in values.tolist()],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "marker": {"color": colour},
            "hovertemplate": f"%{{y}}: %{{x:.3r}} of 100 tokens<extra>{title}</extra>",
        }
        for title, values, colour in rows
    ]
    spec = draw.layout("of 100 tokens, in a layer on average", barmode="stack")
    spec["yaxis"] |= {"zeroline": False}
    spec["xaxis"] |= {"range": [0, 100]}
    label = "share of tokens that have all their experts of a layer on one device"
    return Chart("cards", label, draw.variant(data, spec), 120 + 50 * len(shares))


def _stack(specs: Sequence[Spec], titles: Sequence[str]) -> tuple[list[Spec], Spec]:
    """Return data and layout of charts below each other, with a title above each, if any."""
    if len(specs) == 1:
        return specs[0]["data"], specs[0]["layout"]
    shows = any(spec["layout"].get("showlegend", True) for spec in specs)
    shared = {**specs[0]["layout"], "shapes": [], "annotations": [], "showlegend": shows}
    data: list[Spec] = []
    has_box = False
    for number, (spec, title) in enumerate(zip(specs, titles, strict=True)):
        suffix = str(number + 1) if number else ""
        x, y = f"x{suffix}", f"y{suffix}"
        top = 1 - number / len(specs)
        domain = [top - 1 / len(specs) + (0.12 if number + 1 < len(specs) else 0), top - 0.04]
        axis = {**spec["layout"]["xaxis"], "anchor": y}
        if number + 1 < len(specs):  # the lowest one has the title
            axis["title"] = {"text": ""}
        shared[f"xaxis{suffix}"] = axis
        shared[f"yaxis{suffix}"] = {**spec["layout"]["yaxis"], "anchor": x, "domain": domain}
        listed = {trace.get("name") for trace in data}
        for trace in spec["data"]:
            once = {"showscale": number == 0} if trace["type"] == "heatmap" else {}
            if trace.get("name") in listed and trace.get("showlegend"):
                once["showlegend"] = False
            data.append({**trace, **once, "xaxis": x, "yaxis": y})
        for shape in spec["layout"].get("shapes", ()):
            yref = f"{y} domain" if shape.get("yref") == "paper" else y
            named = {"showlegend": not has_box} if "showlegend" in shape else {}
            has_box = has_box or "showlegend" in shape
            shared["shapes"].append({**shape, "xref": x, "yref": yref, **named})
        if not title:
            continue
        at = {"xref": f"{x} domain", "yref": f"{y} domain", "x": 0, "y": 1, "showarrow": False}
        text = {"text": f"<b>{draw.escape_tags(title, 80)}</b>", "xanchor": "left"}
        shared["annotations"].append({**at, **text, "yanchor": "bottom"})
    return data, shared
