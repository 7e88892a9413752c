"""Declare every figure of an evaluation once, and compute it from counts by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.cost import CostModel, busiest_ports
from moetuner.evaluation.chunks import by_chunk, chunks
from moetuner.evaluation.replay import Counts, Setting
from moetuner.topology import Regime, Topology, sum_by_node

Floats = NDArray[np.float64]
US = " us"
# Values of full windows and layers [W,L] in every order of arrival, with the weight of the order.
Weighed = list[tuple[float, Floats]]
# Computes a figure by window from counts: a value of every window and layer [W,L], or a table
# [W,L,...] that is summed over its last axes; None where the counts do not have the figure.
Windows = Callable[[Counts, Setting], NDArray[Any] | None]


@dataclass(frozen=True)
class CountsByOrder:
    """Counts of a placement in one order of arrival, or in several.

    Parameters
    ----------
    parts
        Counts in every order of arrival, with the weight of the order. Counts that have no windows
        are the same in any order.
    mixed
        Loads in windows of mixed arrival [W,L,D]; None where these are not counted.
    setting
        The setting of the replay, which has the cost model.
    """

    parts: list[tuple[float, Counts]]
    mixed: NDArray[Any] | None
    setting: Setting
    # Several figures need the same values. These counts are dropped after one evaluation, and a
    # recording is not, so the values are not among its results.
    _computed: dict[Windows, Weighed] = field(default_factory=dict, repr=False)

    @property
    def counts(self) -> Counts:
        """Counts in the first order."""
        return self.parts[0][1]

    def steps(self, windows: Windows) -> Weighed:
        """Compute a figure of full windows; an empty list where counts do not have it."""
        if windows not in self._computed:
            tables = [
                (weight, counts, windows(counts, self.setting)) for weight, counts in self.parts
            ]
            self._computed[windows] = [
                (weight, table[counts.is_full_window])
                for weight, counts, table in tables
                if table is not None
            ]
        return self._computed[windows]

    @property
    def imbalances(self) -> Weighed:
        """Imbalance of every window and layer."""
        return self.steps(compute_window_imbalances)

    @property
    def times(self) -> Weighed:
        """Predicted microseconds of every window and layer; none without a cost model."""
        return self.steps(compute_window_us)

    def imbalance(self, load: NDArray[Any]) -> Floats:
        """Compute the imbalance [...] of device loads [...,D] on this machine."""
        return compute_imbalance(load, self.setting.topology.speed_of_device)

    def per_token(self, visits: NDArray[Any] | None) -> float | None:
        """Compute the mean visits of a token in a layer; None where these are unknown."""
        tokens = self.counts.tokens
        if tokens is None or visits is None:
            return None
        return float(int(visits.sum()) / (max(tokens, 1) * visits.shape[1]))

    @property
    def crossing(self) -> float | None:
        """Share of the pairs that are on different devices; None where pairs are unknown."""
        pairs = self.counts.follow
        if pairs is None:
            return None
        total, stays = pairs.sum(dtype=np.float64), np.einsum("ldd->", pairs, dtype=np.float64)
        return float((total - stays) / total) if total else 0.0

    def rows(self) -> dict[str, NDArray[Any]]:
        """Return rows from device to device, by regime."""
        rows = {} if self.counts.follow is None else {"follow": self.counts.follow}
        return rows if self.counts.tokens is None else {**rows, "dispatch": self.counts.dispatch}


@dataclass(frozen=True)
class Figure:
    """A measure of a placement on traffic; lower is better.

    Parameters
    ----------
    column, decimals, unit
        Its column in tables, the decimals of its values, and their unit.
    meaning
        Its definition, for help.
    compute
        Computes it from counts; returns None where the counts do not have it. Without this function
        the figure is the mean of ``windows``.
    windows
        Computes it by window. A figure that has this function has intervals too, from halves of the
        traffic.
    per
        Unit of the mean: full windows, which have equal weights, or tokens.
    argument
        Setting of serving or of the replay that is its argument. Without that setting the figure is
        None; with it tables show the figure.
    label
        Its name in a sentence ("less ..."). Figures that have one are compared.
    title, regime, aspect
        Its name in a conclusion, the regime in which it matters (None for all), and the aspect in
        which little can be gained if no placement reduces it.
    """

    column: str
    decimals: int
    meaning: str
    compute: Callable[[CountsByOrder], float | None] | None = None
    windows: Windows | None = None
    per: Literal["window", "token"] = "window"
    argument: str = ""
    label: str = ""
    unit: str = ""
    title: str = ""
    regime: Regime | None = None
    aspect: str = "in traffic between devices"

    def value(self, replay: CountsByOrder) -> float | None:
        """Compute the figure from counts; None where the counts do not have it."""
        if self.compute is not None:
            return self.compute(replay)
        assert self.windows is not None
        if self.per == "window":
            return average(replay.steps(self.windows))
        return replay.per_token(self.windows(replay.counts, replay.setting))

    def matters_in(self, regime: str) -> bool:
        """Return whether the figure says something of traffic in this regime."""
        return self.regime in (None, regime)

    def text(self, value: float | None) -> str:
        """Format a value for a table; a dash where it is None."""
        return "-" if value is None else f"{value:,.{self.decimals}f}"


def average(parts: Weighed) -> float | None:
    """Average over windows and layers, by the weight of the order; None of an empty list."""
    return sum(weight * float(values.mean()) for weight, values in parts) if parts else None


def compute_imbalance(load: NDArray[Any], speed: Floats) -> Floats:
    """Compute the imbalance [...] of device loads [...,D] on devices of these speeds [D].

    It is the slowest device's time over the time with loads in proportion to speeds. Layers and
    windows without load count as balanced.
    """

    def compute(loads: NDArray[Any]) -> Floats:
        # Devices first: numpy is slow on a short last axis. Counts add up the same in any order.
        by_device = np.ascontiguousarray(np.moveaxis(loads, -1, 0))
        is_count = loads.dtype.kind in "ui"
        total = by_device.sum(axis=0) if is_count else loads.sum(axis=-1, dtype=np.float64)
        total = np.asarray(total, dtype=np.float64)
        slowest = (by_device.T / speed).T.max(axis=0) * speed.sum()
        imbalance: Floats = np.ones_like(total)
        np.divide(slowest, total, out=imbalance, where=total > 0)
        return imbalance

    return by_chunk(load, compute)


def compute_percentile(parts: Weighed, percent: float) -> float:
    """Compute the percentile of the values of all orders, by their weights."""
    if len(parts) == 1:
        return float(np.percentile(parts[0][1], percent))
    values = np.concatenate([table.ravel() for _, table in parts])
    weights = np.concatenate([np.full(table.size, weight / table.size) for weight, table in parts])
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    place = int(np.searchsorted(total, percent / 100 * total[-1]))
    return float(values[order][min(place, len(values) - 1)])


def count_busiest_ports(rows: NDArray[Any], topology: Topology) -> dict[str, list[float]]:
    """Count rows [L,D,D] out of and into the busiest port of every tier, averaged over layers."""
    busiest: dict[str, list[float]] = {"out": [], "in": []}
    for tier in range(1, len(topology.levels) + 1):
        tier_rows = rows * (topology.tier == tier)
        for way, axis in (("out", 2), ("in", 1)):
            port_rows = tier_rows.sum(axis=axis).max(axis=1)
            busiest[way].append(float(port_rows.mean()) if port_rows.size else 0.0)
    return busiest


def compute_layer_us(counts: Counts, setting: Setting) -> Floats:
    """Compute the predicted microseconds of every window and layer [W,L]."""
    model, topology = setting.serving.cost_model, setting.topology
    assert model is not None
    # Homes are counted over all windows together: every window has their shares.
    from_home = np.ascontiguousarray(counts.dispatch / counts.total_visits[:, None, :])
    tier, tiers = topology.tier.astype(np.uint16), len(topology.levels)
    times = []
    for chunk in chunks(len(counts.load), counts.load[0].size):
        chunk_counts = counts.select(chunk)
        compute = model.compute_us(chunk_counts.load, chunk_counts.active, topology.speed_of_device)
        if setting.serving.way.joins_layers:
            moved = _compute_follow_us(chunk_counts, topology, model)
        else:
            if model.once_per == "node" and chunk_counts.node_visits is not None and tiers == 2:
                busiest = _count_rows_by_node(chunk_counts, chunk_counts.node_visits, topology)
            else:
                visits = np.ascontiguousarray(chunk_counts.visits, dtype=np.float64)
                busiest = _core.busiest_rows(visits, from_home, tier, tiers)
            moved = model.ports_us(busiest, topology)
            moved = moved + model.ports_us(busiest, topology, bytes_each=model.bytes_back)
        times.append(model.layer_us(compute, moved))
    return times[0] if len(times) == 1 else np.concatenate(times)


def _count_rows_by_node(counts: Counts, node_visits: NDArray[Any], topology: Topology) -> Floats:
    """Count rows at the busiest port [W,L,2] if a row crosses to a node once, for even homes.

    It arrives at the device with its home's number in the node, which forwards it. So every device
    of a node receives and forwards an equal share of the node's rows.
    """
    devices, size_of_node = topology.devices, np.array(topology.node_sizes)
    elsewhere = node_visits * ((devices - size_of_node) / devices)
    into_node = (elsewhere / size_of_node).max(axis=-1)
    out_of_node = (node_visits.sum(axis=-1, keepdims=True) - node_visits).max(axis=-1) / devices
    visits, node = counts.visits.astype(np.float64), topology.node_of_device
    size = size_of_node[node]
    into = (visits * (1 - 1 / size)).max(axis=-1)
    # A device forwards its share of the rows of its node, less those for itself.
    out = ((sum_by_node(visits, topology)[..., node] - visits) / size).max(axis=-1)
    return np.stack([np.maximum(into, out), np.maximum(into_node, out_of_node)], axis=-1)


def _compute_follow_us(counts: Counts, topology: Topology, model: CostModel) -> Floats:
    """Compute microseconds of rows that go on to the next layer; every window has the same shares.

    A token with K experts in both layers makes K * K pairs, and its state goes to K experts.
    """
    load = counts.load.sum(axis=-1, dtype=np.float64)
    time: Floats = np.zeros_like(load)
    if counts.follow is None or not len(counts.follow):
        return time
    pairs = counts.follow.sum(axis=(1, 2), dtype=np.float64)
    # A window's share of every pair: load of the next layer over all pairs.
    share = load[:, 1:] / np.maximum(pairs, 1)
    busiest = busiest_ports(counts.follow, topology)
    time[:, :-1] = model.ports_us(share[:, :, None] * busiest, topology)
    return time


def compute_window_imbalances(counts: Counts, setting: Setting) -> Floats:
    """Compute the imbalance of every window and layer [W,L]."""
    return compute_imbalance(counts.load, setting.topology.speed_of_device)


def compute_window_imbalances_with_waterfill(counts: Counts, setting: Setting) -> Floats | None:
    """Compute the imbalance [W,L] where a shared expert's tokens are sent to devices that wait.

    The slowest device has its routed tokens, or an even share of all work if that is more: docs/
    mathematics.md. None without waterfill.
    """
    ratio = setting.serving.shared_expert_ratio
    if ratio is None:
        return None
    return np.maximum(compute_window_imbalances(counts, setting) / (1 + ratio), 1.0)


def compute_window_us(counts: Counts, setting: Setting) -> Floats | None:
    """Compute the predicted microseconds of every window and layer [W,L]; None without a model."""
    return None if setting.serving.cost_model is None else compute_layer_us(counts, setting)


def get_window_visits(counts: Counts, setting: Setting) -> NDArray[Any] | None:
    """Return tokens by the device that they visit [W,L,D]; None where tokens are unknown."""
    return None if counts.tokens is None else counts.visits


def get_window_node_visits(counts: Counts, setting: Setting) -> NDArray[Any] | None:
    """Return tokens by the node that they visit [W,L,N]; None of one node, or where unknown."""
    return None if counts.tokens is None or setting.topology.nodes < 2 else counts.node_visits


def get_window_crossings(counts: Counts, setting: Setting) -> Floats | None:
    """Return the crossing share of every token, summed by window [W,1]; None where not counted."""
    return None if counts.crossed is None else counts.crossed[:, None]


def _make_percentile(percent: int) -> Figure:
    """Make the figure of the time that so many percent of layers and windows do not exceed."""

    def compute(replay: CountsByOrder) -> float | None:
        return compute_percentile(replay.times, percent) if replay.times else None

    meaning = f"time that {percent} percent of layers and windows do not exceed"
    return Figure(f"p{percent}", 1, meaning, compute, unit=US)


# Every figure by its field of an evaluation, which is its key in JSON; in the order of tables.
FIGURES = {
    "tokens": Figure("tokens", 0, "tokens replayed", lambda replay: replay.counts.tokens),
    "imbalance": Figure(
        "imbalance",
        3,
        "max / mean device load, averaged over layers and whole windows as they arrive (--arrival)",
        windows=compute_window_imbalances,
        label="imbalance",
        unit=" x the mean",
        title="Busiest device",
        aspect="in balance",
    ),
    "imbalance_mixed": Figure(
        "mixed",
        3,
        "in windows that mix many sequences; it grows with INPUT, so inputs of different size "
        "cannot be compared",
        lambda replay: (
            None if replay.mixed is None else float(replay.imbalance(replay.mixed).mean())
        ),
    ),
    "imbalance_total": Figure(
        "total",
        3,
        "of the sum of all windows",
        lambda replay: float(replay.imbalance(replay.counts.total_load).mean()),
    ),
    "imbalance_worst": Figure(
        "worst",
        2,
        "of any layer and window",
        lambda replay: max(float(values.max()) for _, values in replay.imbalances),
    ),
    "imbalance_filled": Figure(
        "filled",
        3,
        "imbalance of routed and shared experts' work together, if the dispatcher gives the shared "
        "expert's to devices that wait",
        windows=compute_window_imbalances_with_waterfill,
        argument="waterfill",
        label="imbalance with waterfill",
        unit=" x the mean",
    ),
    "crossing": Figure(
        "crossing",
        4,
        "share of transitions between devices",
        lambda replay: replay.crossing,
        windows=get_window_crossings,
        per="token",
        label="crossing",
        title="Steps that leave the device",
        regime="follow",
    ),
    "fanout": Figure(
        "fanout",
        3,
        "devices that a token visits in a layer",
        windows=get_window_visits,
        per="token",
        label="fanout",
        title="Devices that a token visits",
        regime="dispatch",
    ),
    "node_fanout": Figure(
        "nodes",
        3,
        "nodes that a token visits in a layer",
        lambda replay: replay.per_token(replay.counts.node_visits),
        windows=get_window_node_visits,
        per="token",
        label="node fanout",
        title="Nodes that a token visits",
        regime="dispatch",
        aspect="in traffic between nodes",
    ),
    "slots_used": Figure(
        "slots",
        2,
        "slots of a device that hold an expert, on average over layers and devices",
        lambda replay: float((replay.setting.placement.slots >= 0).sum(axis=2).mean()),
    ),
    "predicted_layer_us": Figure(
        "layer us",
        1,
        "predicted layer time",
        windows=compute_window_us,
        label="predicted MoE layer time",
        unit=US,
    ),
    "predicted_layer_us_p50": _make_percentile(50),
    "predicted_layer_us_p95": _make_percentile(95),
    "predicted_layer_us_p99": _make_percentile(99),
}


# Figures that are None unless their argument is given.
WITH_ARGUMENT = tuple(name for name, figure in FIGURES.items() if figure.argument)


def explain(*names: str) -> str:
    """Write the definitions of columns, for help, with the options that give their arguments."""
    texts = []
    for figure in (FIGURES[name] for name in names):
        option = f" (--{figure.argument.replace('_', '-')})" if figure.argument else ""
        texts.append(f"{figure.column}: {figure.meaning}{option}")
    return "; ".join(texts)
