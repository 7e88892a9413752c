"""Make the panels of devices: their experts, what a loss does, what crosses links, what moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import charts as draw
from moetuner.charts import PROPOSED, RUNNING, Chart, Spec
from moetuner.charts.placements import draw_losses, draw_on_one_device, draw_slots, share_load
from moetuner.evaluation.copies import compute_slot_shares
from moetuner.files.cells import counted, digits, percent
from moetuner.report.outcome import find_moves
from moetuner.report.page.data import PageData, Panel, Table
from moetuner.report.words import say
from moetuner.topology import sum_by_node

# Most rows of a table.
ROWS = 200
COLOURS, SYMBOLS = (RUNNING, PROPOSED), ("x", "circle")


def show_experts(page: PageData) -> Panel | None:
    """Show the load of every copy, by layer and device, and the slowest devices."""
    variants, tables, times = {}, [], {}
    for name, setting in reversed(list(zip(page.names, page.settings, strict=True))):
        placement = setting.placement
        slots = placement.slots
        shares = compute_slot_shares(placement, page.topology, setting.serving.split)
        load, copies = share_load(slots, page.load, placement.replicas, shares)
        times[name] = np.maximum(load, 0).sum(axis=2) / page.topology.speed_of_device
        variants[name] = draw_slots(slots, load, copies, times[name])
        rows = []
        for index in np.argsort(-load, axis=None, kind="stable")[:20]:
            place = np.unravel_index(index, load.shape)
            cells = (place[0], slots[place], place[1], copies[place])
            rows.append((*map(str, cells), digits(float(load[place]))))
        head = ("layer", "expert", "device", "copies", "x mean")
        tables.append(Table(f"Hottest copies, {name}", head, rows, load.size))
    label = "heat map of the load of every copy, by layer and device"
    height = max(280, min(760, 90 + 9 * page.placements[1].layers))
    chart = Chart("experts", label, variants, height)
    notes: tuple[str, ...] = ()
    if page.topology.devices > 1 and page.load.any():
        table, notes = _list_slowest_devices({name: times[name] for name in page.names})
        tables.insert(0, table)
    words = " A red box is the device that all others wait for." if notes else ""
    return Panel((chart,), tuple(tables), notes, words)


def _list_slowest_devices(by_placement: dict[str, NDArray[Any]]) -> tuple[Table, tuple[str, ...]]:
    """List the device that all others wait for in every layer, of times [L,D] by placement."""
    columns, notes = [], []
    for name, times in by_placement.items():
        slowest, loaded = times.argmax(axis=1), times.any(axis=1)
        ratios = times.max(axis=1) / np.maximum(times.mean(axis=1), 1e-12)
        columns.append(np.where(loaded, slowest.astype(str), "-").tolist())
        columns.append([digits(ratio) if ratio else "-" for ratio in ratios.tolist()])
        layers = np.bincount(slowest[loaded], minlength=times.shape[1])
        device, number = int(layers.argmax()), int(layers.max())
        notes.append(
            f"With {name}, all others wait most often for device {device}: in {number} of "
            f"{counted(len(times), 'layer')}."
        )
    head = [f"{name}, {column}" for name in by_placement for column in ("device", "x mean")]
    rows = [(str(layer), *row) for layer, row in enumerate(zip(*columns, strict=True))]
    return Table("Devices that all others wait for", ("layer", *head), rows), tuple(notes)


def show_losses(page: PageData) -> Panel | None:
    """Show what the loss of each device does, where experts have copies."""
    if "device" not in page.evaluations[1].losses:
        return None
    effects = {
        name: evaluation.measure_each_loss()
        for name, evaluation in zip(page.names, page.evaluations, strict=True)
    }
    columns = [
        values
        for imbalance, lost in effects.values()
        for values in (lost.mean(axis=1), imbalance.mean(axis=1))
    ]
    head = [f"{name}, {column}" for name in page.names for column in ("lost", "x mean")]
    rows = [
        (str(device), *map(digits, row)) for device, row in enumerate(zip(*columns, strict=True))
    ]
    title = "Loss of each device: experts lost of a layer, and busiest of the others"
    table = Table(title, ("device", *head), rows[:ROWS], len(rows))
    return Panel((draw_losses(effects),), (table,))


def count_sides(page: PageData) -> int:
    """Count the rows of a layer's matrix: devices, or nodes where devices are too many."""
    topology = page.topology
    has_devices = topology.devices <= draw.MOST_DEVICES or topology.nodes == 1
    return topology.devices if has_devices else topology.nodes


def _sum_by_node(table: NDArray[Any], page: PageData) -> tuple[NDArray[Any], str]:
    """Sum a table [...,D,D] by node where devices are too many to draw.

    Also return what its rows are: "device" or "node".
    """
    topology = page.topology
    if count_sides(page) == topology.devices:
        return table, "device"
    to_nodes = sum_by_node(table, topology)
    return sum_by_node(to_nodes.swapaxes(-2, -1), topology).swapaxes(-2, -1), "node"


def _list_traffic(page: PageData, regime: str) -> list[NDArray[Any]]:
    """Return the traffic of both placements in a regime; fewer tables where it is unknown."""
    tables = (evaluation.traffic.get(regime) for evaluation in page.evaluations)
    return [table for table in tables if table is not None]


def show_links(page: PageData) -> Panel | None:
    """Show the traffic from device to device, and at the busiest ports."""
    rows = _list_traffic(page, "dispatch")
    if len(rows) < 2 or page.topology.devices == 1:
        return None
    tokens, layers = max(page.evaluations[0].tokens or 1, 1), len(rows[0])
    mean_rows = [table.sum(axis=0) / layers / tokens * 1000 for table in rows]
    units = {"": ("rows", mean_rows)}
    if page.token_bytes:
        sizes = [table * page.token_bytes / 1e3 for table in mean_rows]
        units[", in kB"] = ("kB", sizes)
        times = [table / page.topology.bandwidth * 1e9 for table in sizes]
        units[", in us of their link"] = ("us", times)
    variants = {
        f"mean of all layers{name}": draw.matrices(
            tables, page.names, "device", f"{unit} of 1,000 tokens", page.topology.node_sizes
        )
        for name, (unit, tables) in units.items()
    }
    if count_sides(page) <= draw.MOST_DEVICES:
        rows_by_layer = [table / tokens * 1000 for table in rows]
        variants |= _draw_by_layer(page, rows_by_layer, "rows of 1,000 tokens", "layer {}")
    ports = [
        (name, regime, str(tier), digits(out), digits(into))
        for name, evaluation in zip(page.names, page.evaluations, strict=True)
        for regime, port in evaluation.busiest_port.items()
        for tier, (out, into) in enumerate(zip(port["out"], port["in"], strict=True), start=1)
    ]
    label = "two matrices of what goes from each device to each other one"
    title = "Rows at the busiest port of a tier, of a layer on average"
    staying = [evaluation.on_one_device for evaluation in page.evaluations]
    shares = {
        name: share for name, share in zip(page.names, staying, strict=True) if share is not None
    }
    cards = (draw_on_one_device(shares),) if shares else ()
    return Panel(
        (Chart("links", label, variants, height=420, stacked=draw.stack(2)), *cards),
        (Table(title, ("placement", "regime", "tier", "out", "in"), ports),),
    )


def _draw_by_layer(
    page: PageData, tables: Sequence[NDArray[Any]], unit: str, name: str
) -> dict[str, Spec]:
    """Draw the traffic of both placements between devices [L,D,D], or nodes, layer by layer.

    ``name`` is that of a variant, with the numbers of the layer and the next one to fill in.
    """
    (before, ends), (after, _) = (_sum_by_node(table, page) for table in tables)
    return {
        name.format(layer, layer + 1): draw.matrices(both, page.names, ends, unit)
        for layer, both in enumerate(zip(before, after, strict=True))
    }


def show_next(page: PageData) -> Panel | None:
    """Show the share of steps to the next layer that leave their device, or node."""
    tables = _list_traffic(page, "follow")
    is_followed = page.settings[1].serving.way.joins_layers and page.topology.devices > 1
    if not is_followed or len(tables) < 2 or not len(tables[0]):
        return None
    node, boundaries = page.topology.node_of_device, np.arange(len(tables[0]))
    lines: list[Spec] = []
    columns: dict[str, NDArray[Any]] = {}
    for name, pairs, colour, symbol in zip(page.names, tables, COLOURS, SYMBOLS, strict=True):
        total = np.maximum(pairs.sum(axis=(1, 2)), 1)
        leaving = {"device": 1 - np.trace(pairs, axis1=1, axis2=2) / total}
        if page.topology.nodes > 1:
            leaving["node"] = 1 - pairs[:, node[:, None] == node[None, :]].sum(axis=1) / total
        for tier, share in leaving.items():
            columns[f"{name}, {tier}"] = share
            lines.append(
                draw.scatter(
                    boundaries,
                    100 * share,
                    "layer %{x} to the next: %{y:.3r} %",
                    legend=f"{name}, {tier}",
                    kind="i2",
                    line={"color": colour, "dash": "solid" if tier == "device" else "dot"},
                    marker={"symbol": symbol, "color": colour},
                )
            )
    spec = draw.layout("layer", "leaves, %", count=len(boundaries))
    spec["yaxis"]["rangemode"] = "tozero"
    has_matrices = count_sides(page) <= draw.MOST_DEVICES
    selects = ("boundary",) if has_matrices else ()
    charts = [Chart("next", "share of steps that leave", draw.variant(lines, spec), 320, selects)]
    if has_matrices:
        totals = [np.maximum(pairs.sum(axis=(1, 2)), 1)[:, None, None] for pairs in tables]
        shares = [pairs / total * 100 for pairs, total in zip(tables, totals, strict=True)]
        variants = _draw_by_layer(page, shares, "% of steps", "layer {} to {}")
        label = "steps between devices at one boundary"
        charts.append(Chart("boundary", label, variants, 400, stacked=draw.stack(2)))
    rows = [
        (str(layer), *(percent(float(share[layer])) for share in columns.values()))
        for layer in boundaries
    ]
    return Panel(tuple(charts), (Table("Share that leaves", ("boundary", *columns), rows),))


def show_moves(page: PageData) -> Panel | None:
    """Show how many experts move from device to device, and which."""
    diff = page.moves
    if not diff.experts_moved:
        return None
    pairs, ends = _sum_by_node(diff.pairs, page)
    chart = {"": draw.matrices([pairs], ["experts"], ends, "experts")}
    rows = [tuple(map(str, row)) for row in diff.moves[:ROWS].tolist()]
    head = ("layer", "expert", "from", "to")
    return Panel(
        (Chart("moves", f"experts that go from {ends} to {ends}", chart, height=400),),
        (Table("Moves (all are in the JSON)", head, rows, diff.experts_moved),),
        (say(find_moves(diff, page.topology)),),
    )
