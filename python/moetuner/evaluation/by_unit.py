"""Figures of a placement as sums over the units that are resampled: sequences, or windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner.cost import CostModel
from moetuner.evaluation import figures, replay
from moetuner.evaluation.arrival import in_order, orders
from moetuner.evaluation.intervals import Cuts, Sums
from moetuner.evaluation.replay import Counts, Setting
from moetuner.evaluation.rows import copies, mixed
from moetuner.evaluation.units import INDEPENDENT, Blocks, Units, with_runs
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

# Tokens whose experts are looked up at once.
AT_ONCE = 1 << 11
# Counts of parts of windows that are held at once.
CELLS = 1 << 20
# By how much runs deviate too little that are as long as tokens are alike, and begin anywhere: the
# root of 3 / 2, for a correlation that falls in a straight line.
CUT = 1.22
# Step by which a window is moved towards what one of its sequences does.
NUDGE = 1e-4

# Numerators and denominators [W] by name: their sums, divided, are the figure.
Measures = dict[str, tuple[Floats, Floats]]


def of_traffic(
    traffic: RoutingTrace | RoutingStatistics,
    setting: Setting,
    model: CostModel | None,
    regime: Regime,
    units: Units,
    *,
    only_whole: bool = False,
) -> dict[str | None, dict[str, Sums]]:
    """Return figures of all traffic (None: a group may have any name) and of every group.

    Their units are whole sequences, or kinds of them, where sequences are known, else windows. A
    window that several sequences share is shared out in first order: each sequence gets what one
    more like it would add (of imbalance: its part of the slowest device's load). So the units are
    independent, as the sequences are, and their sum is the figure.
    """
    if isinstance(traffic, RoutingStatistics):
        whole, groups = replay.of_statistics(traffic, setting)
        return {
            name: _summed(of_windows(counts, setting.topology, model, regime), units.blocks)
            for name, counts in _parts(whole, groups)
            if name is None or not only_whole
        }
    served = orders(traffic, setting.arrival, seed=setting.mixed_seed)
    if any(order is not None for _, order in served):
        # In mixed order every window has tokens of all times: units are runs as recorded.
        traffic = with_runs(traffic)
    parts = [
        (weight, _of_trace(in_order(traffic, order), setting, model, regime, units, only_whole))
        for weight, order in served
    ]
    return {
        name: {
            measure: _weighed([(weight, of[name][measure]) for weight, of in parts])
            for measure in measures
        }
        for name, measures in parts[0][1].items()
    }


def _of_trace(
    traffic: RoutingTrace,
    setting: Setting,
    model: CostModel | None,
    regime: Regime,
    units: Units,
    only_whole: bool,
) -> dict[str | None, dict[str, Sums]]:
    """Return the figures of a trace in its own order."""
    [(whole, groups)] = replay.of_trace(traffic, [setting])
    crossing = crossings(setting, traffic)
    tokens = _tokens(traffic)
    found: dict[str | None, dict[str, Sums]] = {}
    for name, counts in _parts(whole, groups):
        if name is None or not only_whole:
            crossed = None if crossing is None else crossing[tokens[name]]
            part = _Part(traffic, tokens[name], counts, crossed, setting, model, regime)
            is_labelled = traffic.sequence is not None
            found[name] = part.by_sequence(units) if is_labelled else part.by_window(units)
    return found


def _weighed(parts: list[tuple[float, Sums]]) -> Sums:
    """Return a figure of several orders of arrival by weight; their units are the same."""
    if len(parts) == 1:
        return parts[0][1]
    columns = [[weight * np.asarray(column) for column in of[:3]] for weight, of in parts]
    value, above, below = (np.sum(column, axis=0) for column in zip(*columns, strict=True))
    return Sums(float(value), above, below, parts[0][1].blocks)


def _parts(whole: Counts, groups: dict[str, Counts]) -> list[tuple[str | None, Counts]]:
    return [(None, whole), *groups.items()]


def _tokens(trace: RoutingTrace) -> dict[str | None, Whole]:
    """Find the tokens of all traffic (None) and of every group that has some."""
    found: dict[str | None, Whole] = {None: np.arange(trace.tokens)}
    if trace.group is not None:
        for number, name in enumerate(trace.group_names):
            found[name] = np.flatnonzero(trace.group == number)
    return {name: tokens for name, tokens in found.items() if name is None or tokens.size}


def _summed(by_unit: Measures, blocks: Blocks) -> dict[str, Sums]:
    return {
        name: Sums(float(above.sum() / below.sum()), above, below, blocks)
        for name, (above, below) in by_unit.items()
    }


class _Part:
    """Some tokens [t] of a trace in windows of their own, and what was counted of them."""

    def __init__(
        self,
        trace: RoutingTrace,
        tokens: Whole,
        counts: Counts,
        crossing: Floats | None,
        setting: Setting,
        model: CostModel | None,
        regime: Regime,
    ) -> None:
        self._trace, self._tokens, self._counts = trace, tokens, counts
        self._crossing, self._setting = crossing, setting
        self._model, self._regime = model, regime
        window = len(tokens) if setting.window is None else setting.window
        self._window = np.arange(len(tokens)) // max(window, 1)
        self._lengths = np.bincount(self._window)

    def by_window(self, units: Units) -> dict[str, Sums]:
        """Take windows as the units."""
        return _summed(self._by_window(), units.blocks)

    def _by_window(self) -> Measures:
        found = self._waited_for(self._counts)
        found |= of_tokens(self._counts, self._lengths, self._setting.topology)
        if self._crossing is not None:
            tokens = self._lengths.astype(np.float64)
            found["crossing"] = (_sums(self._window, self._crossing), tokens)
        return found

    def _waited_for(self, counts: Counts) -> Measures:
        return of_windows(counts, self._setting.topology, self._model, self._regime)

    def by_sequence(self, units_of_all: Units) -> dict[str, Sums]:
        """Take sequences, or kinds of them, as the units."""
        assert self._trace.sequence is not None
        label = units_of_all.of_tokens(self._trace.sequence[self._tokens])
        _, unit = np.unique(label, return_inverse=True)
        units = int(unit.max(initial=0)) + 1
        # A cut is what a window has of a sequence.
        cut, which, size = np.unique(
            self._window * units + unit, return_inverse=True, return_counts=True
        )
        window, unit_of_cut = np.divmod(cut, units)
        share = size / self._lengths[window]
        by_window = self._by_window()
        by_cut = {
            name: (above[window] * share, below[window] * share)
            for name, (above, below) in by_window.items()
        }
        shared = np.flatnonzero(share < 1)
        tokens = np.argsort(which, kind="stable")
        end = np.cumsum(size)
        lists = _Lists(self._setting)
        layers, devices = self._counts.load.shape[1:]
        at_once = max(CELLS // (layers * devices), 1)
        for first in range(0, len(shared), at_once):
            some = shared[first : first + at_once]
            row = np.repeat(np.arange(len(some)), size[some])
            within = np.arange(len(row)) - (np.cumsum(size[some]) - size[some])[row]
            counts = self._counted(row, tokens[(end - size)[some][row] + within], lists)
            # Both ways: where two devices are equally slow, the mean of both counts.
            forth, back = (
                self._waited_for(self._nudged(counts, window[some], share[some], step))
                for step in (NUDGE, -NUDGE)
            )
            for name, (above, _) in forth.items():
                slope = (above - back[name][0]) / (2 * NUDGE)
                before = by_window[name][0][window[some]]
                by_cut[name][0][some] = share[some] * (before + slope)
            for name, (above, _) in of_tokens(counts, size[some], self._setting.topology).items():
                by_cut[name][0][some] = above
        # Sequences that stand for runs of alike tokens cut some of these.
        blocks = Blocks(inflation=CUT) if units_of_all.name == "window" else INDEPENDENT
        found = {}
        for name, (above, below) in by_cut.items():
            total, count = by_window[name]
            if name == "crossing" and self._crossing is not None:
                above = _sums(which, self._crossing)
            found[name] = Sums(
                float(total.sum() / count.sum()),
                _sums(unit_of_cut, above, units),
                _sums(unit_of_cut, below, units),
                blocks=blocks,
                cuts=Cuts(above, below, unit_of_cut, window),
            )
        return found

    def _counted(self, row: Whole, tokens: Whole, lists: _Lists) -> Counts:
        """Count some of the tokens [n] in rows [n]."""
        topology, ids = self._setting.topology, self._trace.expert_ids
        layers, devices = self._counts.load.shape[1:]
        shape = (int(row.max()) + 1, layers, devices)
        load, visits = np.zeros((2, *shape))
        nodes = self._counts.node_visits
        node_visits = None if nodes is None else np.zeros((*shape[:2], nodes.shape[2]))
        node = topology.node_of_device
        for first in range(0, len(row), AT_ONCE):
            part = self._tokens[tokens[first : first + AT_ONCE]]
            on = lists.devices(np.asarray(ids[part]).astype(np.int64), part)
            at = row[first : first + AT_ONCE, None] * layers + np.arange(layers)
            _add(load, at, on, distinct=False)
            _add(visits, at, on, distinct=True)
            if node_visits is not None:
                _add(node_visits, at, node[on], distinct=True)
        return replace(self._counts, load=load, visits=visits, node_visits=node_visits)

    def _nudged(self, counts: Counts, window: Whole, share: Floats, step: float) -> Counts:
        """Move windows [n] a step towards what a sequence does, as if it had all their tokens."""
        whole = self._counts

        def moved(part: NDArray[np.float64], of: NDArray[np.float64]) -> Floats:
            before = of[window].astype(np.float64)
            # Copies in turns are counted by position, so a part may be where the whole is not.
            nudged: Floats = np.maximum(before + step * (part / share[:, None, None] - before), 0)
            return nudged

        load = moved(counts.load, whole.load)
        active = None
        if whole.active is not None:
            # The more of a device's experts are active, the less more tokens change that.
            held = (self._setting.placement.slots >= 0).sum(axis=2)
            active = whole.active[window]
            before = np.maximum(whole.load[window], 1e-300)
            room = 1 - active / np.maximum(held, 1)
            active = active * (1 + (load / before - 1) * np.maximum(room, 0) * (before >= 1))
        nodes = None
        if counts.node_visits is not None and whole.node_visits is not None:
            nodes = moved(counts.node_visits, whole.node_visits)
        visits = moved(counts.visits, whole.visits)
        # Homes are known of all windows together, and stay what they are.
        of_all = np.maximum(whole.visits.sum(axis=0, dtype=np.float64), 1e-300)
        dispatch = whole.dispatch * (visits.sum(axis=0) / of_all)[:, None, :]
        return replace(
            counts, load=load, visits=visits, node_visits=nodes, dispatch=dispatch, active=active
        )


def _sums(place: Whole, values: Floats, places: int = 0) -> Floats:
    return np.bincount(place, values, places).astype(np.float64)


def _add(table: Floats, row: Whole, place: Whole, *, distinct: bool) -> None:
    """Count places [t,L,K] in rows [t,L] of a table [n,L,P]; of equal ones one if ``distinct``."""
    cell = row[:, :, None] * table.shape[2] + place
    if distinct:
        cell.sort(axis=2)
        fresh = np.ones(cell.shape, dtype=bool)
        fresh[:, :, 1:] = cell[:, :, 1:] != cell[:, :, :-1]
        cell = cell[fresh]
    low = int(cell.min())
    found = np.bincount(cell.ravel() - low)
    table.reshape(-1)[low : low + len(found)] += found


def of_windows(
    counts: Counts, topology: Topology, model: CostModel | None, regime: Regime
) -> Measures:
    """Return what waits for the slowest; it counts every window alike, as ``evaluate`` does."""
    ones = np.ones(len(counts.load))
    ratios = figures.ratios(counts.load, topology.speed_of_device)
    found = {"imbalance": (ratios.mean(axis=1), ones)}
    if model is not None:
        times = figures.layer_us(counts, topology, model, regime)
        found["predicted_layer_us"] = (times.mean(axis=1), ones)
    return found


def of_tokens(counts: Counts, lengths: Whole, topology: Topology) -> Measures:
    """Return what counts every token; ``lengths`` are tokens per window [W]."""
    tokens, layers = lengths.astype(np.float64), counts.load.shape[1]
    found = {"fanout": (counts.visits.sum(axis=(1, 2)) / layers, tokens)}
    if counts.node_visits is not None and topology.nodes > 1:
        found["node_fanout"] = (counts.node_visits.sum(axis=(1, 2)) / layers, tokens)
    return found


class _Lists:
    """Devices of every expert's copies, and which one serves a token."""

    def __init__(self, setting: Setting) -> None:
        placement, topology = setting.placement, setting.topology
        lists = [copies(slots, placement.num_experts) for slots in placement.slots]
        most = max(table.shape[1] for table, _ in lists)
        self._device = np.stack(
            [np.pad(table, ((0, 0), (0, most - table.shape[1])), "edge") for table, _ in lists]
        )
        self._device //= placement.slots_per_device
        self._number = np.stack([count for _, count in lists])
        self._layer = np.arange(placement.layers)[None, :, None]
        self._node = topology.node_of_device
        self._is_nearest = setting.split == "nearest"

    def devices(self, ids: Whole, position: Whole) -> Whole:
        """Return devices that serve tokens of positions [t] and experts [t,L,K].

        Copies that serve in turns are taken to serve by position, which is as even.
        """
        if self._device.shape[2] == 1:
            alone: Whole = self._device[self._layer, ids, 0]
            return alone
        hashed = mixed(position)[:, None, None]
        number = self._number[self._layer, ids]
        on: Whole = self._device[self._layer, ids, hashed % number]
        return self._near(ids, hashed, number, on) if self._is_nearest else on

    def _near(self, ids: Whole, hashed: Whole, number: Whole, other: Whole) -> Whole:
        """Return the token's home where it has a copy; else a copy of the home's node, if any."""
        home = hashed * len(self._node) >> 32
        held = self._device[self._layer, ids]
        is_copy = np.arange(held.shape[3]) < number[..., None]
        is_near = is_copy & (self._node[held] == self._node[home][..., None])
        rank = is_near.cumsum(axis=3)
        near = rank[..., -1]
        which = (is_near & (rank == 1 + (hashed % np.maximum(near, 1))[..., None])).argmax(axis=3)
        on = np.where(near > 0, np.take_along_axis(held, which[..., None], axis=3)[..., 0], other)
        found: Whole = np.where((is_copy & (held == home[..., None])).any(axis=3), home, on)
        return found


def crossings(setting: Setting, trace: RoutingTrace) -> Floats | None:
    """Compute the share of every token's pairs of neighbouring layers that cross [T].

    None for a model of one layer.
    """
    if trace.layers < 2:
        return None
    lists = _Lists(setting)
    found = np.empty(trace.tokens)
    first = 0
    for shard in trace.shards():
        for begin in range(0, len(shard), AT_ONCE):
            ids = shard[begin : begin + AT_ONCE].astype(np.int64)
            on = lists.devices(ids, np.arange(first, first + len(ids)))
            apart = on[:, :-1, :, None] != on[:, 1:, None, :]
            found[first : first + len(ids)] = apart.mean(axis=(1, 2, 3))
            first += len(ids)
    return found
