"""The panels of a page: questions, charts as plotly draws them, and the same numbers in tables.

Nothing is computed here but places of marks and units: what is drawn stands in evaluations, audits
and results.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files.text import name as one_line
from moetuner.report.advice.values import Advice
from moetuner.report.cells import percent, signed
from moetuner.report.page.shown import Shown

Spec = dict[str, Any]
Rows = list[tuple[str, ...]]

# Devices up to which a layer has a matrix of its own of devices; with more, of nodes.
MOST_DEVICES = 16
# Points of a line, groups of a chart, rows of a table.
POINTS, GROUPS, ROWS = 1000, 60, 200
LABELLED = 10
RUNNING, PROPOSED = "var(--running)", "var(--proposed)"


@dataclass(frozen=True)
class Chart:
    """One chart: what plotly draws, for each choice that a reader has.

    Parameters
    ----------
    key
        Unique on the page.
    label
        What is seen, for those who cannot see it.
    variants
        Data and layout by the name of the choice.
    height
        Pixels.
    selects
        Charts whose choice number ``n + first`` a click on point n makes.
    wide
        Least width in pixels; a narrower screen scrolls.
    """

    key: str
    label: str
    variants: dict[str, Spec]
    height: int = 360
    selects: tuple[str, ...] = ()
    wide: int = 0


@dataclass(frozen=True)
class Table:
    """Numbers of a chart."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    of: int | None = None


@dataclass(frozen=True)
class Panel:
    """A question and its answer.

    Parameters
    ----------
    key, title, reading
        Anchor, question, and a sentence on how to read the answer.
    absent
        Why there is no chart; empty where there is one.
    """

    key: str
    title: str
    reading: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    absent: str = ""
    notes: tuple[str, ...] = field(default=())


def panels_of(shown: Shown) -> tuple[Panel, ...]:
    """Make the panels after the verdict, in the order of reading."""
    makers = (
        _layers,
        _experts,
        _links,
        _next,
        _over_time,
        _groups,
        _search,
        _price,
        _moves,
    )
    return tuple(make(shown) for make in makers)


def packed(values: Any, kind: str = "f4") -> Spec:
    """Pack numbers as plotly reads them: base64, with a shape where there are two dimensions."""
    array = np.ascontiguousarray(np.asarray(values), dtype=np.dtype(kind).newbyteorder("<"))
    spec: Spec = {"dtype": kind, "bdata": base64.b64encode(array.tobytes()).decode()}
    if array.ndim > 1:
        spec["shape"] = ", ".join(map(str, array.shape))
    return spec


def layout(x: str = "", y: str = "", **others: Any) -> Spec:
    """Return a layout with titles of the axes."""
    axis = {"automargin": True, "zeroline": False, "gridcolor": "var(--grid)"}
    return {
        "xaxis": {"title": {"text": x}, **axis},
        "yaxis": {"title": {"text": y}, **axis},
        "margin": {"l": 56, "r": 16, "t": 28, "b": 44},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--text)", "size": 13},
        "hoverlabel": {"namelength": -1},
        **others,
    }


def plain(text: str, most: int = 40) -> str:
    """Return a name that is nothing but text: plotly reads some tags."""
    text = one_line(text).replace("<", "\u2039").replace(">", "\u203a").replace("&", "\uff06")
    return text if len(text) <= most else text[: most - 1] + "…"


def _layers(shown: Shown) -> Panel:
    measure, unit = "imbalance", "busiest device / mean"
    values = [each.imbalance_per_layer for each in (shown.running, shown.proposed)]
    times = [each.predicted_us_per_layer for each in (shown.running, shown.proposed)]
    if times[0] is not None and times[1] is not None:
        measure, unit = "predicted time", "predicted us of the layer"
        values = [times[0], times[1]]
    layer = np.arange(len(values[0]))
    gain = np.array(values[0]) - np.array(values[1])
    worst = np.argsort(-np.array(values[1]), kind="stable")[:LABELLED]
    data: list[Spec] = []
    for name, found, symbol, colour in (
        (shown.names[0], values[0], "x", RUNNING),
        (shown.names[1], values[1], "circle", PROPOSED),
    ):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(name),
                "x": packed(layer, "i2"),
                "y": packed(found),
                "marker": {"symbol": symbol, "color": colour, "size": 9},
                "hovertemplate": "layer %{x}: %{y:.4g}<extra>" + plain(name) + "</extra>",
            }
        )
    data[1]["mode"] = "markers+text"
    data[1]["text"] = [str(each) if each in worst[:3] else "" for each in layer]
    data[1]["textposition"] = "top center"
    rows = [
        (
            str(number),
            f"{values[0][number]:.4g}",
            f"{values[1][number]:.4g}",
            f"{gain[number]:+.4g}",
        )
        for number in layer
    ]
    click = " Click a layer to see its links below." if len(layer) > 1 else ""
    return Panel(
        "layers",
        "Which layers hold us up?",
        f"Each column is a layer; the lower, the better, and the gap between cross and dot is what "
        f"changes in {measure}.{click}",
        (
            Chart(
                "layers",
                f"{measure} of every layer under both placements",
                {"": {"data": data, "layout": layout("layer", unit)}},
                selects=("links", "boundary"),
            ),
        ),
        (Table(f"{measure} by layer", ("layer", *shown.names, "less"), rows),),
    )


def _experts(shown: Shown) -> Panel:
    variants, tables = {}, []
    if shown.load is None:
        return Panel(
            "experts",
            "Which experts are hot, and who holds them?",
            "Columns are slots, device by device; bright is busy.",
            absent="The loads of experts were not counted.",
        )
    mean = np.maximum(shown.load.mean(axis=1, keepdims=True), 1e-12)
    relative = shown.load / mean
    for name, placement in zip(shown.names, shown.placements, strict=True):
        held = placement.slots >= 0
        expert = np.maximum(placement.slots, 0)
        layer = np.arange(placement.layers)[:, None, None]
        number = np.maximum(placement.replicas[layer, expert], 1)
        busy = np.where(held, relative[layer, expert] / number, -1.0)
        order = np.argsort(-busy, axis=2, kind="stable")
        flat = [
            np.take_along_axis(each, order, axis=2).reshape(placement.layers, -1)
            for each in (busy, placement.slots, number)
        ]
        shape = placement.devices, placement.slots_per_device
        with np.errstate(divide="ignore", invalid="ignore"):
            shade = np.where(flat[0] > 0, np.log2(np.maximum(flat[0], 2**-6)), np.nan)
        labels = {
            "tickvals": [shape[1] * d + (shape[1] - 1) / 2 for d in _some(shape[0])],
            "ticktext": [f"{d}" for d in _some(shape[0])],
        }
        borders = [
            {
                "type": "line",
                "x0": shape[1] * d - 0.5,
                "x1": shape[1] * d - 0.5,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "var(--border)", "width": 1},
            }
            for d in range(1, shape[0])
        ]
        spec = layout("slots, by device", "layer", shapes=borders)
        spec["xaxis"] |= labels | {"showgrid": False}
        spec["yaxis"] |= {"autorange": "reversed", "showgrid": False}
        variants[name] = {
            "data": [
                {
                    "type": "heatmap",
                    "z": packed(shade),
                    "customdata": packed(np.stack([flat[1], flat[2]], axis=2), "i4"),
                    "text": packed(np.maximum(flat[0], 0)),
                    "hovertemplate": "layer %{y}, expert %{customdata[0]}: %{text:.2f} x the mean"
                    " of an expert (copies: %{customdata[1]})<extra></extra>",
                    "colorscale": "Cividis",
                    "zmin": -3,
                    "zmax": 3,
                    "colorbar": {
                        "title": {"text": "x mean"},
                        "tickvals": [-3, -2, -1, 0, 1, 2, 3],
                        "ticktext": ["⅛", "¼", "½", "1", "2", "4", "8"],
                        "thickness": 12,
                    },
                }
            ],
            "layout": spec,
        }
        top = np.argsort(-busy, axis=None, kind="stable")[:20]
        rows = []
        for at in top:
            place = np.unravel_index(at, busy.shape)
            cells = (place[0], placement.slots[place], place[1], number[place])
            rows.append((*map(str, cells), f"{busy[place]:.3g}"))
        tables.append(
            Table(
                f"Hottest copies, {name}",
                ("layer", "expert", "device", "copies", "x mean"),
                rows,
                busy.size,
            )
        )
    columns = shown.placements[1].devices * shown.placements[1].slots_per_device
    layers = shown.placements[1].layers
    return Panel(
        "experts",
        "Which experts are hot, and who holds them?",
        "Rows are layers, columns are slots of device after device, the busiest first; each cell "
        "is the load of a copy over the mean of an expert. All devices alike is balance.",
        (
            Chart(
                "experts",
                "heat map of the load of every copy, by layer and device",
                dict(reversed(variants.items())),
                height=max(280, min(760, 90 + 9 * layers)),
                wide=min(columns * 2 + 140, 900),
            ),
        ),
        tuple(reversed(tables)),
    )


def _some(devices: int) -> list[int]:
    """Devices that get a label."""
    step = max(1, -(-devices // 24))
    return list(range(0, devices, step))


def _matrix(
    tables: Sequence[NDArray[Any]], names: Sequence[str], what: str, unit: str, outline: int
) -> Spec:
    """Draw two matrices on one colour scale."""
    most = max(float(table.max(initial=0)) for table in tables) or 1.0
    spec = layout(f"to {what}", f"from {what}", margin={"l": 56, "r": 16, "t": 40, "b": 44})
    spec["coloraxis"] = {
        "colorscale": "Cividis",
        "cmin": 0,
        "cmax": most,
        "colorbar": {"title": {"text": unit}, "thickness": 12},
    }
    spec["annotations"] = []
    spec["shapes"] = []
    data = []
    for number, (table, name) in enumerate(zip(tables, names, strict=True)):
        last = "" if number == 0 else str(number + 1)
        if number:
            for axis in ("xaxis", "yaxis"):
                spec[axis + last] = dict(spec[axis])
        low = number / len(tables)
        spec[f"xaxis{last}"] |= {
            "domain": [low + 0.04 * number, low + 1 / len(tables) - 0.04 * (1 - number)],
            "anchor": f"y{last}",
            "showgrid": False,
            "constrain": "domain",
        }
        spec[f"yaxis{last}"] |= {
            "anchor": f"x{last}",
            "autorange": "reversed",
            "showgrid": False,
            "scaleanchor": f"x{last}",
            "constrain": "domain",
        }
        if len(table) <= MOST_DEVICES:
            spec[f"xaxis{last}"]["dtick"] = spec[f"yaxis{last}"]["dtick"] = 1
        if number:
            spec[f"yaxis{last}"]["title"] = {"text": ""}
        spec["annotations"].append(
            {
                "text": plain(name),
                "x": 0.5,
                "y": 1.02,
                "xref": f"x{last} domain",
                "yref": f"y{last} domain",
                "showarrow": False,
                "yanchor": "bottom",
            }
        )
        side = len(table)
        if outline > 1 and side > outline:
            for begin in range(0, side, outline):
                spec["shapes"].append(
                    {
                        "type": "rect",
                        "xref": f"x{last}",
                        "yref": f"y{last}",
                        "x0": begin - 0.5,
                        "x1": begin + outline - 0.5,
                        "y0": begin - 0.5,
                        "y1": begin + outline - 0.5,
                        "line": {"color": "var(--border)", "width": 1},
                    }
                )
        data.append(
            {
                "type": "heatmap",
                "z": packed(table),
                "coloraxis": "coloraxis",
                "xaxis": f"x{last}",
                "yaxis": f"y{last}",
                "hovertemplate": f"{what} %{{y}} to %{{x}}: %{{z:.4g}} {unit}<extra></extra>",
            }
        )
    return {"data": data, "layout": spec}


def _by_node(table: NDArray[Any], shown: Shown) -> tuple[NDArray[Any], str]:
    """Sum devices [..,D,D] to nodes where there are too many to draw."""
    topology = shown.topology
    if topology.devices <= MOST_DEVICES or topology.nodes == 1:
        return table, "device"
    size, nodes = topology.node_size, topology.nodes
    summed = table.reshape(*table.shape[:-2], nodes, size, nodes, size).sum(axis=(-3, -1))
    return summed, "node"


def _links(shown: Shown) -> Panel:
    title = "What crosses which link?"
    rows = [each.traffic.get("dispatch") for each in (shown.running, shown.proposed)]
    first, second = rows
    if first is None or second is None:
        return Panel(
            "links",
            title,
            "Rows that go from each device to each other one.",
            absent="A load table does not tell which experts a token chose together, so it does "
            "not tell what crosses links.",
        )
    if shown.topology.devices == 1:
        return Panel("links", title, "Rows between devices.", absent="There is one device.")
    tokens = max(shown.running.tokens or 1, 1)
    layers = len(first)
    share = [table.sum(axis=0) / layers / tokens * 1000 for table in (first, second)]
    unit = "rows of 1,000 tokens"
    node = shown.topology.node_size
    variants = {
        "mean of all layers": _matrix(share, shown.names, "device", unit, node),
    }
    if shown.token_bytes:
        inbytes = [each * shown.token_bytes / 1e3 for each in share]
        variants["mean of all layers, in kB"] = _matrix(
            inbytes, shown.names, "device", "kB of 1,000 tokens", node
        )
        microseconds = [each / shown.topology.bandwidth * 1e9 for each in inbytes]
        variants["mean of all layers, in us of their link"] = _matrix(
            microseconds, shown.names, "device", "us of 1,000 tokens", node
        )
    by = [_by_node(table / tokens * 1000, shown) for table in (first, second)]
    small = len(by[0][0][0]) <= MOST_DEVICES
    if small:
        for layer in range(layers):
            variants[f"layer {layer}"] = _matrix(
                [each[0][layer] for each in by], shown.names, by[0][1], unit, 0
            )
    table = []
    for name, each in zip(shown.names, (shown.running, shown.proposed), strict=True):
        for regime, ports in each.busiest_port.items():
            for tier, (out, into) in enumerate(
                zip(ports["out"], ports["in"], strict=True), start=1
            ):
                table.append((name, regime, str(tier), f"{out:.4g}", f"{into:.4g}"))
    return Panel(
        "links",
        title,
        "From the home device of a token (row) to the device of its expert (column), on one colour "
        "scale; as much comes back. The diagonal stays at home. Boxes are nodes.",
        (
            Chart(
                "links",
                "two matrices of what goes from each device to each other one",
                variants,
                height=420,
                wide=560,
            ),
        ),
        (
            Table(
                "Rows at the busiest port of a tier, of a layer on average",
                ("placement", "regime", "tier", "out", "in"),
                table,
            ),
        ),
    )


def _next(shown: Shown) -> Panel:
    title = "Where do tokens go next?"
    reading = (
        "From each layer to the next: the share of steps that leave the device, and the node. It "
        "costs where tokens move on from expert to expert (regime follow); engines of today send "
        "them home in between."
    )
    tables = [each.traffic.get("follow") for each in (shown.running, shown.proposed)]
    first, second = tables
    if first is None or second is None or not len(first):
        why = (
            "The model has one layer."
            if shown.placements[0].layers == 1
            else "INPUT does not tell which experts follow on which."
        )
        return Panel("next", title, reading, absent=why)
    node = shown.topology.node_of_device
    lines: list[Spec] = []
    rows: list[list[str]] = [[str(number)] for number in range(len(first))]
    head = ["boundary"]
    boundaries = np.arange(len(first))
    for name, table, colour, symbol in (
        (shown.names[0], first, RUNNING, "x"),
        (shown.names[1], second, PROPOSED, "circle"),
    ):
        total = np.maximum(table.sum(axis=(1, 2)), 1)
        leaving = {"device": 1 - np.trace(table, axis1=1, axis2=2) / total}
        if shown.topology.nodes > 1:
            inside = table[:, node[:, None] == node[None, :]].sum(axis=1)
            leaving["node"] = 1 - inside / total
        for of, found in leaving.items():
            label = f"{name}, {of}"
            head.append(label)
            for row, value in zip(rows, found, strict=True):
                row.append(percent(float(value)))
            lines.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": plain(label),
                    "x": packed(boundaries, "i2"),
                    "y": packed(100 * found),
                    "line": {"color": colour, "dash": "solid" if of == "device" else "dot"},
                    "marker": {"symbol": symbol, "color": colour},
                    "hovertemplate": "layer %{x} to the next: %{y:.1f} %<extra>"
                    + plain(label)
                    + "</extra>",
                }
            )
    spec = layout("layer", "leaves, %")
    spec["yaxis"]["rangemode"] = "tozero"
    by = [_by_node(table, shown) for table in (first, second)]
    charts = [
        Chart("next", "share of steps that leave", {"": {"data": lines, "layout": spec}}, 320)
    ]
    if len(by[0][0][0]) <= MOST_DEVICES:
        variants = {
            f"layer {number} to {number + 1}": _matrix(
                [each[0][number] / max(each[0][number].sum(), 1) * 100 for each in by],
                shown.names,
                by[0][1],
                "% of steps",
                0,
            )
            for number in boundaries
        }
        charts[0] = Chart(
            charts[0].key, charts[0].label, charts[0].variants, 320, selects=("boundary",)
        )
        charts.append(
            Chart("boundary", "steps between devices at one boundary", variants, 400, wide=560)
        )
    return Panel(
        "next",
        title,
        reading,
        tuple(charts),
        (Table("Share that leaves", tuple(head), [tuple(row) for row in rows]),),
    )


def thinned(values: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return places and values of at most 1,000 points that keep the least and most of each run."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= POINTS:
        return np.arange(len(array)), array
    chosen = []
    for run in np.array_split(np.arange(len(array)), POINTS // 2):
        chosen += sorted({int(run[array[run].argmin()]), int(run[array[run].argmax()])})
    at = np.array(chosen)
    return at, array[at]


def _over_time(shown: Shown) -> Panel:
    title = "Does it hold over time?"
    reading = (
        "Busiest device over the mean, window after window (1 is perfect); drag to look closer, "
        "double click to go back."
    )
    lines: list[Spec] = []
    count = len(shown.running.imbalance_per_window)
    if count < 2:
        return Panel(
            "time", title, reading, absent="There is one window, so nothing to see over time."
        )
    rows: Rows = []
    for name, each, colour, dash in (
        (shown.names[0], shown.running, RUNNING, "dot"),
        (shown.names[1], shown.proposed, PROPOSED, "solid"),
    ):
        at, values = thinned(each.imbalance_per_window)
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": plain(name),
                "x": packed(at, "i4"),
                "y": packed(values),
                "line": {"color": colour, "dash": dash, "width": 1.5},
                "hovertemplate": "window %{x}: %{y:.3f}<extra>" + plain(name) + "</extra>",
            }
        )
        low, middle, high = np.percentile(each.imbalance_per_window, (5, 50, 95))
        rows.append((name, *(f"{value:.3f}" for value in (low, middle, high))))
    notes = [shown.traffic]
    drift = shown.advice.drift if shown.advice is not None else None
    if drift is not None:
        notes.append(
            f"Of the tokens, {percent(drift.distance)} go to other experts in the second half of "
            f"the recording than in the first; of halves by chance {percent(drift.expected)}."
        )
    spec = layout("window", "busiest / mean")
    if count <= 12:
        spec["xaxis"]["dtick"] = 1
    return Panel(
        "time",
        title,
        reading,
        (Chart("time", "imbalance of every window", {"": {"data": lines, "layout": spec}}, 340),),
        (Table("Imbalance of windows", ("placement", "5 %", "median", "95 %"), rows),),
        notes=tuple(notes),
    )


def _groups(shown: Shown) -> Panel:
    title = "Who gains, who loses?"
    reading = (
        "Each dot is a group of the traffic with its interval of 95 %: left of zero it is served "
        "faster, right of it slower. Crosses are worse beyond chance."
    )
    audit = shown.audit
    if audit is None or not audit.groups:
        why = "INPUT tells no groups (domains, languages, tenants, phases) apart."
        return Panel("groups", title, reading, absent=why)
    measure = "predicted_layer_us" if "predicted_layer_us" in audit.whole else "imbalance"
    losers = {each.group for each in audit.worse(measures=(measure,))}
    found = []
    for name, changes in audit.groups.items():
        change = changes[measure].change
        if change is not None:
            found.append((change.value, name, change))
    found.sort(key=lambda each: (-each[0], each[1]))
    drawn = found
    if len(found) > GROUPS:
        drawn = [*found[: GROUPS // 2], *found[-GROUPS // 2 :]]
    value = np.array([each[0] for each in drawn]) * 100
    # Without an interval there is the value alone.
    low = np.array([at if of.low is None else of.low for at, _, of in drawn]) * 100
    high = np.array([at if of.high is None else of.high for at, _, of in drawn]) * 100
    labels = [plain(each[1]) for each in drawn]
    is_worse = [each[1] in losers for each in drawn]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": packed(value),
            "y": list(range(len(drawn))),
            "customdata": labels,
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": packed(np.maximum(high - value, 0)),
                "arrayminus": packed(np.maximum(value - low, 0)),
                "color": "var(--muted)",
            },
            "marker": {
                "symbol": ["x" if each else "circle" for each in is_worse],
                "color": ["var(--bad)" if each else PROPOSED for each in is_worse],
                "size": 10,
            },
            "hovertemplate": "%{customdata}: %{x:+.1f} %<extra></extra>",
        }
    ]
    spec = layout(f"change of {measure.replace('_', ' ')}, %", "")
    spec["yaxis"] |= {"tickvals": list(range(len(drawn))), "ticktext": labels}
    spec["xaxis"] |= {"zeroline": True, "zerolinecolor": "var(--text)"}
    rows = []
    for _, name, change in found[:ROWS]:
        ends = ["-" if end is None else signed(end) for end in (change.low, change.high)]
        rows.append((plain(name), signed(change.value), *ends, "worse" if name in losers else ""))
    notes = [f"{len(losers)} of {len(found)} groups are worse beyond chance."]
    if audit.too_few:
        notes.append(
            f"Too few {audit.units[0]}s to judge: "
            + ", ".join(plain(each) for each in list(audit.too_few)[:10])
            + ("." if len(audit.too_few) <= 10 else f" and {len(audit.too_few) - 10} more.")
        )
    return Panel(
        "groups",
        title,
        reading,
        (
            Chart(
                "groups",
                "change of every group with its interval",
                {"": {"data": data, "layout": spec}},
                height=130 + 24 * len(drawn),
            ),
        ),
        (Table("Groups", ("group", "change", "from", "to", ""), rows, len(found)),),
        notes=tuple(notes),
    )


def _search(shown: Shown) -> Panel:
    title = "How good is the search?"
    over = "over the seconds of the search" if shown.timed else "after each step of the search"
    reading = f"The best placement so far, and the bound that no placement is below, {over}."
    result = shown.result
    if result is None:
        return Panel(
            "search",
            title,
            reading,
            absent="A page of a saved placement knows nothing of its search; moetuner solve "
            "--report shows it.",
        )
    gap = "No bound was proven, so how far the optimum may be is not known."
    if shown.advice is not None:
        gap = "Advice searches briefly and proves no bound of time; moetuner solve searches longer."
    if result.gap is not None:
        gap = (
            f"{result.method} reached {result.objective:.6g}; no placement is below "
            f"{result.bound:.6g} ({result.bound_source}), so it is within {percent(result.gap)}."
        )
    # When somebody looked depends on the clock; without a time limit nothing else does.
    history = [
        each
        for each in result.history
        if each.objective is not None and (shown.timed or each.is_step)
    ]
    if len(history) < 2:
        return Panel(
            "search", title, reading, absent=f"The search told nothing before its answer. {gap}"
        )
    at = [max(each.seconds, 0.001) if shown.timed else n for n, each in enumerate(history, 1)]
    phases = [each.phase for each in history]
    data: list[Spec] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "best so far",
            "x": packed(at),
            "y": packed([each.objective for each in history]),
            "customdata": phases,
            "hovertemplate": "%{customdata}: %{y:.6g}<extra></extra>",
            "line": {"shape": "hv", "color": PROPOSED},
        }
    ]
    bounded = [(x, each.bound) for x, each in zip(at, history, strict=True) if each.bound]
    if len(bounded) == 1:
        # Proven at the end, and true all the time.
        bounded.insert(0, (at[0], bounded[0][1]))
    if bounded:
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "bound",
                "x": packed([x for x, _ in bounded]),
                "y": packed([bound for _, bound in bounded]),
                "hovertemplate": "bound: %{y:.6g}<extra></extra>",
                "line": {"shape": "hv", "color": "var(--good)", "dash": "dash"},
                "marker": {"symbol": "triangle-up"},
            }
        )
    spec = layout("seconds" if shown.timed else "step", "objective")
    if shown.timed:
        spec["xaxis"]["type"] = "log"
    else:
        spec["xaxis"]["dtick"] = 1 if len(history) <= 12 else None
    rows = [
        (
            f"{x:.2f}" if shown.timed else str(x),
            each.phase,
            f"{each.objective:.6g}",
            "-" if each.bound is None else f"{each.bound:.6g}",
            percent(each.gap),
        )
        for x, each in list(zip(at, history, strict=True))[-ROWS:]
    ]
    head = ("seconds" if shown.timed else "step", "phase", "best", "bound", "gap")
    return Panel(
        "search",
        title,
        reading,
        (
            Chart(
                "search", f"best placement and bound {over}", {"": {"data": data, "layout": spec}}
            ),
        ),
        (Table("Progress", head, rows),),
        notes=(gap,),
    )


def _price(shown: Shown) -> Panel:
    title = "What does the last percent cost?"
    reading = (
        "Up is gained, right is paid: copies in memory of a device, or moves in bytes. Beyond the "
        "knee (ringed) more costs and brings little."
    )
    charts, tables = [], []
    if shown.advice is not None and len(shown.advice.copies) > 1:
        chart, table = _copies(shown.advice)
        charts.append(chart)
        tables.append(table)
    if shown.trades:
        each_bytes = shown.expert_bytes
        moved = [trade.experts_moved * (each_bytes or 1) for trade in shown.trades]
        gains = [trade.gain for trade in shown.trades]
        unit = "experts moved" if each_bytes is None else "bytes moved"
        data = [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": packed(moved),
                "y": packed(gains),
                "line": {"shape": "hv", "color": PROPOSED},
                "hovertemplate": "%{x:.4g} " + unit + ": %{y:.4g} less<extra></extra>",
            }
        ]
        spec = {"data": data, "layout": layout(unit, "less of the objective")}
        charts.append(Chart("trades", "gain against what moves", {"": spec}))
        rows = [
            (str(trade.experts_moved), f"{trade.objective:.6g}", f"{trade.gain:.6g}")
            for trade in shown.trades
        ]
        tables.append(Table("Moves", ("experts moved", "objective", "gain"), rows))
    if not charts:
        return Panel(
            "price",
            title,
            reading,
            absent="Nobody asked for copies or for fewer moves: moetuner advise sweeps copies, "
            "moetuner solve --initial ... --pareto weighs moves.",
        )
    return Panel("price", title, reading, tuple(charts), tuple(tables))


def _copies(advice: Advice) -> tuple[Chart, Table]:
    data: list[Spec] = []
    windows = list(advice.copies[0].gains)
    known = advice.copies[0].bytes_per_device is not None
    for number, window in enumerate(windows):
        for shared in (False, True):
            mine = [each for each in advice.copies if each.shared == shared]
            if not mine:
                continue
            gains = [100 * np.array(each.gains[window]) for each in mine]
            mean = np.array([each.mean() for each in gains])
            knee = [each.per_device == advice.knee and not shared for each in mine]
            name = "copies" if window is None else f"windows of {window:,}"
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": name + (", shared budget" if shared else ""),
                    "x": packed(
                        [
                            (each.bytes_per_device or 0) / 1e9 if known else each.per_device
                            for each in mine
                        ]
                    ),
                    "y": packed(mean),
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": packed([each.max() - each.mean() for each in gains]),
                        "arrayminus": packed([each.mean() - each.min() for each in gains]),
                    },
                    "customdata": [each.per_device for each in mine],
                    "hovertemplate": "%{customdata} slots: %{y:.1f} %<extra></extra>",
                    "line": {
                        "color": (PROPOSED, RUNNING)[number % 2],
                        "dash": "dot" if shared else "solid",
                    },
                    "marker": {
                        "symbol": ("circle", "square")[number % 2],
                        "size": [14 if is_knee else 8 for is_knee in knee],
                        "line": {
                            "color": "var(--text)",
                            "width": [3 if is_knee else 0 for is_knee in knee],
                        },
                    },
                }
            )
    axis = "GB per device" if known else "slots for copies of a device in a layer"
    rows = []
    for each in advice.copies:
        size = each.bytes_per_device
        rows.append(
            (
                f"{each.per_device}{' on average' if each.shared else ''}",
                *(signed(float(np.mean(gains))) for gains in each.gains.values()),
                "-" if size is None else f"{size / 1e9:.3g}",
                "knee" if each.per_device == advice.knee and not each.shared else "",
            )
        )
    head = [f"windows of {window:,}" if window else "gain" for window in windows]
    return (
        Chart(
            "copies",
            "gain on unseen traffic against slots for copies",
            {"": {"data": data, "layout": layout(axis, "gain on unseen traffic, %")}},
        ),
        Table("Slots for copies", ("slots", *head, "GB per device", ""), rows),
    )


def _moves(shown: Shown) -> Panel:
    title = "What moves?"
    reading = "How many experts go from a device, or a node, to another one, to get there."
    diff = shown.moves
    if diff is None or not diff.experts_moved:
        why = "The placements hold the same experts on the same devices: nothing moves."
        if diff is None:
            why = "The placements are not of one machine."
        return Panel("moves", title, reading, absent=why)
    pairs, what = _by_node(diff.pairs, shown)
    rows = [tuple(map(str, row)) for row in diff.moves[:ROWS].tolist()]
    size = f", {diff.bytes_moved / 1e9:.3g} GB" if diff.bytes_moved is not None else ""
    return Panel(
        "moves",
        title,
        reading,
        (
            Chart(
                "moves",
                f"experts that go from {what} to {what}",
                {"": _matrix([pairs], ["experts"], what, "experts", 0)},
                height=400,
            ),
        ),
        (
            Table(
                "Moves (all are in the JSON)",
                ("layer", "expert", "from", "to"),
                rows,
                diff.experts_moved,
            ),
        ),
        notes=(f"{diff.experts_moved:,} experts move{size}.",),
    )
