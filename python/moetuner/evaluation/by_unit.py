"""Figures of a placement as sums over the units that are resampled: sequences, or windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.cost import CostModel
from moetuner.evaluation import figures, replay
from moetuner.evaluation.arrival import in_order, orders
from moetuner.evaluation.intervals import Cuts, Sums
from moetuner.evaluation.replay import Counts, Setting
from moetuner.evaluation.units import INDEPENDENT, Blocks, Units, with_runs
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Regime, Topology
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

# Tokens that are counted at once.
AT_ONCE = 1 << 14
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
            for name, counts in _parts(whole, {} if only_whole else groups)
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
    by_name: dict[str | None, dict[str, Sums]] = {}
    for name, counts in _parts(whole, {} if only_whole else groups):
        tokens = np.arange(traffic.tokens)
        if name is not None:
            tokens = np.flatnonzero(traffic.group == traffic.group_names.index(name))
        crossed = None if crossing is None else crossing[tokens]
        part = _Part(traffic, tokens, counts, crossed, setting, model, regime)
        is_labelled = traffic.sequence is not None
        by_name[name] = part.by_sequence(units) if is_labelled else part.by_window(units)
    return by_name


def _weighed(parts: list[tuple[float, Sums]]) -> Sums:
    """Return a figure of several orders of arrival by weight; their units are the same."""
    if len(parts) == 1:
        return parts[0][1]
    columns = [[weight * np.asarray(column) for column in of[:3]] for weight, of in parts]
    value, above, below = (np.sum(column, axis=0) for column in zip(*columns, strict=True))
    return Sums(float(value), above, below, parts[0][1].blocks)


def _parts(whole: Counts, groups: dict[str, Counts]) -> list[tuple[str | None, Counts]]:
    return [(None, whole), *groups.items()]


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
        measures = self._of_slowest(self._counts)
        measures |= of_tokens(self._counts, self._lengths, self._setting.topology)
        if self._crossing is not None:
            tokens = self._lengths.astype(np.float64)
            measures["crossing"] = (_sums(self._window, self._crossing), tokens)
        return measures

    def _of_slowest(self, counts: Counts) -> Measures:
        return of_windows(counts, self._setting.topology, self._model, self._regime)

    def by_sequence(self, units_of_all: Units) -> dict[str, Sums]:
        """Take sequences, or kinds of them, as the units."""
        assert self._trace.sequence is not None
        label = units_of_all.of_tokens(self._trace.sequence[self._tokens])
        _, unit = np.unique(label, return_inverse=True)
        units = int(unit.max(initial=0)) + 1
        # A cut is what a window has of a sequence.
        cut, cut_of_token, size = np.unique(
            self._window * units + unit, return_inverse=True, return_counts=True
        )
        window, unit_of_cut = np.divmod(cut, units)
        share = size / self._lengths[window]
        by_window = self._by_window()
        by_cut = {
            name: (above[window] * share, below[window] * share)
            for name, (above, below) in by_window.items()
        }
        for some, counts in self._counts_of(np.flatnonzero(share < 1), cut_of_token, size):
            # Both ways: where two devices are equally slow, the mean of both counts.
            forth, back = (
                self._of_slowest(self._nudged(counts, window[some], share[some], step))
                for step in (NUDGE, -NUDGE)
            )
            for name, (above, _) in forth.items():
                slope = (above - back[name][0]) / (2 * NUDGE)
                before = by_window[name][0][window[some]]
                by_cut[name][0][some] = share[some] * (before + slope)
            for name, (above, _) in of_tokens(counts, size[some], self._setting.topology).items():
                by_cut[name][0][some] = above
        if self._crossing is not None:
            by_cut["crossing"] = (_sums(cut_of_token, self._crossing), by_cut["crossing"][1])
        # Sequences that stand for runs of alike tokens cut some of these.
        blocks = Blocks(inflation=CUT) if units_of_all.name == "window" else INDEPENDENT
        return {
            name: Sums(
                float(by_window[name][0].sum() / by_window[name][1].sum()),
                _sums(unit_of_cut, above, units),
                _sums(unit_of_cut, below, units),
                blocks=blocks,
                cuts=Cuts(above, below, unit_of_cut, window),
            )
            for name, (above, below) in by_cut.items()
        }

    def _counts_of(
        self, cuts: Whole, cut_of_token: Whole, size: Whole
    ) -> Iterator[tuple[Whole, Counts]]:
        """Yield some of these cuts at a time, and the counts of their tokens, a row for each."""
        tokens, end = np.argsort(cut_of_token, kind="stable"), np.cumsum(size)
        setting, ids = by_position(self._setting), self._trace.expert_ids
        at_once = max(CELLS // self._counts.load[0].size, 1)
        for first in range(0, len(cuts), at_once):
            some = cuts[first : first + at_once]
            row = np.repeat(np.arange(len(some), dtype=np.uint32), size[some])
            within = np.arange(len(row)) - (np.cumsum(size[some]) - size[some])[row]
            mine = self._tokens[tokens[(end - size)[some][row] + within]]
            rows = setting.labelled(self._trace, len(some), int(size[some].max()))
            for at in range(0, len(row), AT_ONCE):
                part = mine[at : at + AT_ONCE]
                rows.push(
                    np.ascontiguousarray(ids[part]),
                    row[at : at + AT_ONCE],
                    setting.threads,
                    positions=part.astype(np.uint64),
                )
            load, visits, nodes = (table.transpose(1, 0, 2) for table in rows.finish())
            yield some, replace(self._counts, load=load, visits=visits, node_visits=nodes)

    def _nudged(self, counts: Counts, window: Whole, share: Floats, step: float) -> Counts:
        """Move windows [n] a step towards what a sequence does, as if it had all their tokens."""
        whole = self._counts

        def moved(part: NDArray[Any], of: NDArray[Any]) -> Floats:
            before = of[window].astype(np.float64)
            # Copies in turns are counted by position, so a part may be where the whole is not.
            nudged: Floats = np.maximum(before + step * (part / share[:, None, None] - before), 0)
            return nudged

        load = moved(counts.load, whole.load)
        active = None
        if whole.active is not None:
            # The more of a device's experts are active, the less more tokens change that.
            experts = (self._setting.placement.slots >= 0).sum(axis=2)
            active = whole.active[window]
            before = np.maximum(whole.load[window], 1e-300)
            idle = 1 - active / np.maximum(experts, 1)
            active = active * (1 + (load / before - 1) * np.maximum(idle, 0) * (before >= 1))
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


def of_windows(
    counts: Counts, topology: Topology, model: CostModel | None, regime: Regime
) -> Measures:
    """Return what waits for the slowest; it counts every window alike, as ``evaluate`` does."""
    ones = np.ones(len(counts.load))
    ratios = figures.ratios(counts.load, topology.speed_of_device)
    measures = {"imbalance": (ratios.mean(axis=1), ones)}
    if model is not None:
        times = figures.layer_us(counts, topology, model, regime)
        measures["predicted_layer_us"] = (times.mean(axis=1), ones)
    return measures


def of_tokens(counts: Counts, lengths: Whole, topology: Topology) -> Measures:
    """Return what counts every token; ``lengths`` are tokens per window [W]."""
    tokens, layers = lengths.astype(np.float64), counts.load.shape[1]
    measures = {"fanout": (counts.visits.sum(axis=(1, 2)) / layers, tokens)}
    if counts.node_visits is not None and topology.nodes > 1:
        measures["node_fanout"] = (counts.node_visits.sum(axis=(1, 2)) / layers, tokens)
    return measures


def by_position(setting: Setting) -> Setting:
    """Return a setting whose copies serve by position: as evenly as those that take turns."""
    return replace(setting, split="even") if setting.split == "round_robin" else setting


def crossings(setting: Setting, trace: RoutingTrace) -> Floats | None:
    """Compute the share of every token's pairs of neighbouring layers that cross [T].

    None for a model of one layer.
    """
    if trace.layers < 2:
        return None
    replay, pairs, first = by_position(setting).labelled(trace, 1, 1), np.empty(trace.tokens), 0
    for shard in trace.shards():
        pairs[first : first + len(shard)] = replay.apart(shard, first, setting.threads)
        first += len(shard)
    share: Floats = pairs / ((trace.layers - 1) * trace.top_k**2)
    return share
