"""Make the panels of a page: charts, and the same numbers in tables.

Only units and places of marks are computed here: the numbers are those of evaluations, judgements
and results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from moetuner import charts as draw
from moetuner.charts import PROPOSED, RUNNING, Chart
from moetuner.evaluation.figures import FIGURES
from moetuner.evaluation.intervals import Spread
from moetuner.files.cells import counted, digits, in_bytes, percent, sentence, signed, unit_of_time
from moetuner.report.advice.values import Advice
from moetuner.report.findings import Finding
from moetuner.report.outcome import write_left_out
from moetuner.report.page import devices
from moetuner.report.page.data import PageData, Panel, Table
from moetuner.report.page.devices import COLOURS, ROWS, SYMBOLS, count_sides
from moetuner.report.page.structure import draw_hot_experts, list_curves
from moetuner.report.words import say

# Most groups of a chart.
GROUPS = 60
# Fewest windows that a chart is drawn of; fewer are listed in a table.
FEWEST_WINDOWS = 5
# Symbol and colour of a group by how it is judged.
MARKS = {
    "": ("circle", PROPOSED),
    "worse": ("x", "var(--bad)"),
    "too few": ("circle-open", "var(--muted)"),
}


def make_panels(page: PageData) -> tuple[Panel, ...]:
    """Make the panels below the verdict, in the order of reading; empty ones are left out."""
    panels = ((key, make_panel(page)) for key, make_panel in PANELS.items())
    return tuple(replace(panel, key=key) for key, panel in panels if panel is not None)


def _show_layers(page: PageData) -> Panel | None:
    """Show predicted time, else imbalance, of every layer."""
    measure, unit = "imbalance", "busiest device / mean"
    values = [evaluation.imbalance_per_layer for evaluation in page.evaluations]
    predicted = [evaluation.predicted_us_per_layer for evaluation in page.evaluations]
    times = [by_layer for by_layer in predicted if by_layer is not None]
    if len(times) == 2:
        name, size = unit_of_time(max(map(max, times)))
        measure, unit = "predicted time", f"predicted {name} of the layer"
        values = [tuple(us / size for us in by_layer) for by_layer in times]
    layers = np.arange(len(values[0]))
    gain = np.array(values[0]) - np.array(values[1])
    worst = np.argsort(-np.array(values[1]), kind="stable")[:3]
    data = [
        draw.scatter(
            layers,
            by_layer,
            "layer %{x}: %{y:,.3r}",
            mode="markers",
            legend=name,
            kind="i2",
            marker={"symbol": symbol, "color": colour, "size": 9},
        )
        for name, by_layer, symbol, colour in zip(page.names, values, SYMBOLS, COLOURS, strict=True)
    ]
    data[1] |= {"mode": "markers+text", "textposition": "top center"}
    data[1]["text"] = [str(layer) if layer in worst else "" for layer in layers]
    rows = [
        (str(layer), *map(digits, (before, after, less)))
        for layer, before, after, less in zip(layers, *values, gain, strict=True)
    ]
    has_links = page.evaluations[0].traffic.get("dispatch") is not None
    is_linked = len(layers) > 1 and has_links and 1 < count_sides(page) <= draw.MOST_DEVICES
    click = " Click a layer to see its links below." if is_linked else ""
    label = f"{measure} of every layer under both placements"
    spec = draw.layout("layer", unit, count=len(layers))
    return Panel(
        (Chart("layers", label, draw.variant(data, spec), selects=("links", "boundary")),),
        (Table(f"Layers, {unit}", ("layer", *page.names, "less"), rows),),
        words=f"{measure}.{click}",
    )


def _show_hot_experts(page: PageData) -> Panel | None:
    """Show the shares of picks that the hottest experts take."""
    hot = page.hot_experts
    if hot is None or not page.load.any():
        return None
    rows = [(name, *map(percent, shares)) for name, shares in list_curves(hot).items()]
    head = ("experts that are kept near", *(f"{100 * size:g} %" for size in hot.sizes))
    by_group = sorted(hot.static_of_group.items(), key=lambda item: item[1])
    groups = [(draw.escape_tags(name), percent(share)) for name, share in by_group[:ROWS]]
    tables = [Table(f"Share of {'unseen ' if hot.is_unseen else ''}picks", head, rows)]
    if groups:
        title = "Half of the experts, chosen by all other groups"
        tables.append(Table(title, ("group", "share of its picks"), groups, len(by_group)))
    return Panel((draw_hot_experts(hot),), tuple(tables), (hot.sentence,))


def _show_over_time(page: PageData) -> Panel | None:
    """Show the imbalance of every window."""
    windows = len(page.evaluations[0].imbalance_per_window)
    if windows < 2:
        return None
    notes = _write_notes_over_time(page)
    if windows < FEWEST_WINDOWS:
        by_window = zip(*(each.imbalance_per_window for each in page.evaluations), strict=True)
        cells = [(str(window), *map(digits, both)) for window, both in enumerate(by_window)]
        return Panel((), (Table("Imbalance of windows", ("window", *page.names), cells),), notes)
    lines, rows = [], []
    for name, evaluation, colour, dash in zip(
        page.names, page.evaluations, COLOURS, ("dot", "solid"), strict=True
    ):
        values = evaluation.imbalance_per_window
        places, thinned = draw.thin(list(values))
        lines.append(
            draw.scatter(
                places,
                thinned,
                "window %{x}: %{y:.3r}",
                mode="lines",
                legend=name,
                kind="i4",
                line={"color": colour, "dash": dash, "width": 1.5},
            )
        )
        rows.append((name, *map(digits, np.percentile(values, (5, 50, 95)))))
    chart = draw.variant(lines, draw.layout("window", "busiest / mean", count=windows))
    return Panel(
        (Chart("time", "imbalance of every window", chart, 340),),
        (Table("Imbalance of windows", ("placement", "5 %", "median", "95 %"), rows),),
        notes,
        words=" Drag to look closer, double-click to go back.",
    )


def _write_notes_over_time(page: PageData) -> tuple[str, ...]:
    """Write the size of the windows, and how far the traffic drifts over the recording."""
    replayed = page.evaluations[0].replayed
    assert replayed is not None
    windows, rest = page.windows, write_left_out(replayed.traffic, replayed.setting.window)
    notes = [sentence(f"{windows}; {rest}" if rest else windows)]
    drift = page.advice.drift if page.advice is not None else None
    if drift is not None:
        notes.append(
            f"{percent(drift.distance)} of the tokens go to other experts in the second half of "
            f"the recording than in the first; by chance it would be {percent(drift.expected)}."
        )
    return tuple(notes)


def _show_groups(page: PageData) -> Panel | None:
    """Show the change of every group with its interval."""
    judgement = page.judgement
    if not judgement.groups:
        return None
    assert judgement.units is not None
    measure = "predicted_layer_us" if "predicted_layer_us" in judgement.whole else "imbalance"
    too_few = {*judgement.too_few}
    worse = {loss.group for loss in judgement.worse(measures=(measure,))}
    gains = ((name, figures[measure]) for name, figures in judgement.groups.items())
    changes = [(name, gain.change) for name, gain in gains if gain.before]
    # Groups that cannot be judged come last: at the top of the chart.
    changes.sort(key=lambda change: (change[0] in too_few, -change[1].value, change[0]))
    drawn = changes
    if len(changes) > GROUPS:
        drawn = [*changes[: GROUPS // 2], *changes[-GROUPS // 2 :]]
    judged = dict.fromkeys((name for name, _ in changes), "")
    judged |= dict.fromkeys(worse, "worse") | dict.fromkeys(too_few, "too few")
    rows = [
        (
            draw.escape_tags(name),
            *map(signed, (change.value, change.low, change.high)),
            judged[name],
        )
        for name, change in changes[:ROWS]
    ]
    notes = [f"Change of {FIGURES[measure].label}."]
    if len(too_few) < len(changes):
        groups = counted(len(changes) - len(too_few), "group")
        notes[0] += f" Worse beyond chance: {len(worse)} of {groups}."
    if too_few:
        groups = counted(len(too_few), "group")
        notes.append(f"Too few {judgement.units.name}s to judge: {groups}, in grey.")
    return Panel(
        (_draw_groups(drawn, judged),),
        (Table("Groups", ("group", "change", "from", "to", "judged"), rows, len(changes)),),
        tuple(notes),
    )


def _draw_groups(changes: Sequence[tuple[str, Spread]], judged: Mapping[str, str]) -> Chart:
    """Draw changes of groups; one without an interval is a point."""
    ends = [change.interval or (change.value, change.value) for _, change in changes]
    value = 100 * np.array([change.value for _, change in changes])
    low, high = 100 * np.array(ends).reshape(-1, 2).T
    places, labels = list(range(len(changes))), []
    for name, _ in changes:
        labels.append(draw.escape_tags(name) + (" (too few)" if judged[name] == "too few" else ""))
    marks = [MARKS[judged[name]] for name, _ in changes]
    data = draw.scatter(
        value,
        places,
        "%{customdata}: %{x:+.3r} %",
        mode="markers",
        customdata=labels,
        error_x=draw.whiskers(value, low, high, color="var(--muted)"),
        marker={
            "symbol": [symbol for symbol, _ in marks],
            "color": [colour for _, colour in marks],
            "size": 10,
        },
    )
    spec = draw.layout("change, %")
    spec["yaxis"] |= {"tickvals": places, "ticktext": labels, "zeroline": False}
    spec["xaxis"] |= {**draw.ZERO, "rangemode": "tozero"}
    label, height = "change of every group with its interval", 130 + 24 * len(changes)
    return Chart("groups", label, draw.variant([data], spec), height)


def _show_search(page: PageData) -> Panel | None:
    """Show the best objective and the bound during the search."""
    result = page.result
    if result is None or not result.bound or result.bound_is_of_loads:
        return None
    # The clock makes entries between steps; with a time limit the answer depends on it anyway.
    entries = (entry for entry in result.history if page.timed or entry.is_step)
    history = [entry for entry in entries if entry.objective is not None]
    if len({entry.objective for entry in history}) < 2:
        return None
    times = [max(entry.seconds, 0.001) if page.timed else n for n, entry in enumerate(history, 1)]
    data = [
        draw.scatter(
            times,
            [entry.objective or 0.0 for entry in history],
            "%{customdata}: %{y:,.3r}",
            name="best so far",
            customdata=[entry.phase for entry in history],
            line={"shape": "hv", "color": PROPOSED},
        )
    ]
    bounds = [
        (time, entry.bound) for time, entry in zip(times, history, strict=True) if entry.bound
    ]
    bounds = bounds or [(times[-1], result.bound)]
    # The first bound holds from the beginning, though it was proven later.
    x, y = zip((times[0], bounds[0][1]), *bounds, strict=True)
    line = {"shape": "hv", "color": "var(--good)", "dash": "dash"}
    marker = {"symbol": "triangle-up"}
    data.append(draw.scatter(x, y, "bound: %{y:,.3r}", name="bound", line=line, marker=marker))
    bound = {"bound": f"{digits(result.bound)} {page.unit}", "gap": result.gap}
    proven = Finding("bound", {**bound, "single": False, "cap": None})
    axis, when = "step", "after each step of the search"
    spec = draw.layout("step", page.unit, count=len(history))
    if page.timed:
        axis, when = "seconds", "over the seconds of the search"
        spec = draw.layout("seconds", page.unit)
        spec["xaxis"]["type"] = "log"
    rows = [
        (
            digits(time) if page.timed else str(time),
            entry.phase,
            *map(digits, (entry.objective, entry.bound)),
            percent(entry.gap),
        )
        for time, entry in list(zip(times, history, strict=True))[-ROWS:]
    ]
    label = f"best placement and bound {when}"
    return Panel(
        (Chart("search", label, draw.variant(data, spec)),),
        (Table(f"Progress, {page.unit}", (axis, "phase", "best", "bound", "gap"), rows),),
        (say(proven),),
    )


def _show_price(page: PageData) -> Panel | None:
    """Show what numbers of copies, and of moves, gain."""
    charts, tables, words = [], [], ""
    if page.advice is not None and len(page.advice.copies) > 1:
        words = (
            " Numbers of copies are compared by short searches, so gains are not the headline's."
        )
        charts.append(_draw_copies(page.advice))
        windows = list(page.advice.copies[0].gains)
        head = [f"windows of {window:,}" if window else "gain" for window in windows]
        rows = [
            (
                str(copies.per_device),
                *(signed(copies.mean(window)) for window in windows),
                "-" if copies.bytes_per_device is None else in_bytes(copies.bytes_per_device),
                "-" if copies.cache_share is None else percent(copies.cache_share),
                "proposed" if copies.per_device == page.advice.chosen_copies else "",
            )
            for copies in page.advice.copies
        ]
        tables.append(
            Table("Slots for copies", ("slots", *head, "per device", "of KV cache", "chosen"), rows)
        )
    if page.trades:
        unit = "experts moved" if page.expert_bytes is None else "bytes moved"
        data = draw.scatter(
            [trade.experts_moved * (page.expert_bytes or 1) for trade in page.trades],
            [trade.gain for trade in page.trades],
            "%{x:,.3r} " + unit + ": %{y:,.3r} less",
            line={"shape": "hv", "color": PROPOSED},
        )
        chart = draw.variant([data], draw.layout(unit, "less of the objective"))
        charts.append(Chart("trades", "gain against what moves", chart))
        rows = [
            (str(trade.experts_moved), digits(trade.objective), digits(trade.gain))
            for trade in page.trades
        ]
        tables.append(Table("Moves", ("experts moved", "objective", "gain"), rows))
    return Panel(tuple(charts), tuple(tables), words=words) if charts else None


def _draw_copies(advice: Advice) -> Chart:
    """Draw the gain of each number of slots for copies over their memory, or their number."""
    by_size = advice.copies[0].bytes_per_device is not None
    slots = [copies.per_device for copies in advice.copies]
    gigabytes = [(copies.bytes_per_device or 0) / 1e9 for copies in advice.copies]
    # The chosen number has a larger mark with a border.
    widths = [3 if number == advice.chosen_copies else 0 for number in slots]
    sizes = [14 if number == advice.chosen_copies else 8 for number in slots]
    border = {"color": "var(--text)", "width": widths}
    data = []
    for number, window in enumerate(advice.copies[0].gains):
        colour, symbol = ((PROPOSED, "circle"), (RUNNING, "square"))[number % 2]
        data.append(
            draw.scatter(
                gigabytes if by_size else slots,
                [100 * copies.mean(window) for copies in advice.copies],
                "%{customdata} slots: %{y:.3r} %",
                name="copies" if window is None else f"windows of {window:,}",
                customdata=slots,
                line={"color": colour},
                marker={"symbol": symbol, "size": sizes, "line": border},
            )
        )
    axis = "GB per device" if by_size else "slots for copies of a device in a layer"
    spec = draw.layout(axis, "gain on unseen traffic, %")
    spec["yaxis"]["rangemode"] = "tozero"
    label = "gain on unseen traffic against slots for copies"
    return Chart("copies", label, draw.variant(data, spec))


# Functions that make the panel of a question of the page, or None, in the order of reading.
PANELS: dict[str, Callable[[PageData], Panel | None]] = {
    "layers": _show_layers,
    "experts": devices.show_experts,
    "hot": _show_hot_experts,
    "losses": devices.show_losses,
    "links": devices.show_links,
    "next": devices.show_next,
    "time": _show_over_time,
    "groups": _show_groups,
    "search": _show_search,
    "price": _show_price,
    "moves": devices.show_moves,
}
