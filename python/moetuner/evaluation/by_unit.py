"""Figures of a placement as sums over the units that are resampled: sequences, or windows.

A window that several sequences share is shared out in first order: each sequence gets what one more
like it would add (of imbalance: its part of the slowest device's load). So the units are
independent, as the sequences are, and their sum is the figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation import figures
from moetuner.evaluation.arrival import in_order, orders
from moetuner.evaluation.intervals import Sums
from moetuner.evaluation.kinds import kinds_of_windows
from moetuner.evaluation.replay import Counts, Setting, Traffic, counts_of, members
from moetuner.evaluation.units import INDEPENDENT, Blocks, Units, with_runs
from moetuner.statistics import RoutingStatistics
from moetuner.topology import Topology
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]

# Counts of parts of windows that are in memory at once.
CELLS = 1 << 20
# By how much runs deviate too little that are as long as tokens are alike, and begin anywhere: the
# root of 3 / 2, for a correlation that falls in a straight line.
CUT = 1.22
# Step by which a window is moved towards what one of its sequences does.
NUDGE = 1e-4

# Numerators and denominators [W] by name: their sums, divided, are the figure.
Measures = dict[str, tuple[Floats, Floats]]
BySums = dict[str | None, dict[str, Sums]]


def of_traffic(
    traffic: Traffic, setting: Setting, units: Units, *, only_whole: bool = False
) -> BySums:
    """Return figures of all traffic (None) and of every group that has some.

    Their units are whole sequences, or kinds of them, where sequences are known, else windows.
    """
    setting = replace(setting, mixed=False)
    served = orders(traffic, setting.arrival, seed=setting.mixed_seed)
    if any(order is not None for _, order in served) and isinstance(traffic, RoutingTrace):
        # In mixed order every window has tokens of all times: units are runs as recorded.
        traffic = with_runs(traffic)
    parts = [_in_one_order(in_order(traffic, of), setting, units, only_whole) for _, of in served]
    if len(parts) == 1:
        return parts[0]
    weights = np.array([weight for weight, _ in served])
    weighed: BySums = {}
    for group, figures_of in parts[0].items():
        weighed[group] = {}
        for name in figures_of:
            of = [part[group][name] for part in parts]
            above, below = (
                weights @ np.stack(each)
                for each in zip(*(one.by_unit() for one in of), strict=True)
            )
            value = float(weights @ [one.value for one in of])
            weighed[group][name] = Sums(value, above, below, of[0].blocks)
    return weighed


def _in_one_order(traffic: Traffic, setting: Setting, units: Units, only_whole: bool) -> BySums:
    """Return the figures of traffic in the order in which it stands."""
    [counted] = counts_of(traffic, [setting])
    groups = {name: of for name, of in counted.items() if name is None or not only_whole}
    tokens = members(traffic)
    if isinstance(traffic, RoutingStatistics):
        # A part of a recording has windows of fewer kinds.
        kinds = None if units.kinds is None else kinds_of_windows(traffic)[0]
        return {
            group: {
                name: Sums(
                    float(above.sum() / below.sum()),
                    *(above, below, units.blocks),
                    None
                    if kinds is None
                    else np.unique(kinds[tokens[group]], return_inverse=True)[1],
                )
                for name, (above, below) in of_windows(counts, setting).items()
            }
            for group, counts in groups.items()
        }
    crossing = crossings(setting, traffic)
    return {
        name: _Part(traffic, tokens[name], counts, setting).sums(units, crossing)
        for name, counts in groups.items()
    }


@dataclass(frozen=True)
class _Part:
    """Some tokens [t] of a trace in windows of their own, and what was counted of them."""

    trace: RoutingTrace
    tokens: Whole
    counts: Counts
    setting: Setting

    def sums(self, units: Units, crossing: Floats | None) -> dict[str, Sums]:
        """Compute what every unit adds, also of crossings of tokens [T]; a cut is in one window."""
        topology = self.setting.topology
        window = np.arange(len(self.tokens)) // (self.setting.window or max(len(self.tokens), 1))
        sequence = self.trace.sequence
        label = window if sequence is None else units.of_tokens(sequence[self.tokens])
        _, unit = np.unique(label, return_inverse=True)
        number, lengths = int(unit.max(initial=0)) + 1, np.bincount(window)
        cut, cut_of_token, size = np.unique(
            window * number + unit, return_inverse=True, return_counts=True
        )
        window_of_cut, unit_of_cut = np.divmod(cut, number)
        share = size / lengths[window_of_cut]
        whole = of_windows(self.counts, self.setting) | of_tokens(self.counts, lengths, topology)
        cuts = {
            name: (above[window_of_cut] * share, below[window_of_cut] * share)
            for name, (above, below) in whole.items()
        }
        for some, counts in self._counts_of(np.flatnonzero(share < 1), cut_of_token, size):
            # Both ways: where two devices are equally slow, the mean of both counts.
            at, part = window_of_cut[some], share[some]
            forth, back = (
                of_windows(self._nudged(counts, at, part, step), self.setting)
                for step in (NUDGE, -NUDGE)
            )
            for name, (above, _) in forth.items():
                slope = (above - back[name][0]) / (2 * NUDGE)
                cuts[name][0][some] = part * (whole[name][0][at] + slope)
            for name, (above, _) in of_tokens(counts, size[some], topology).items():
                cuts[name][0][some] = above
        if crossing is not None:
            for measures, place, tokens in ((whole, window, lengths), (cuts, cut_of_token, size)):
                crossed = np.bincount(place, crossing[self.tokens]).astype(np.float64)
                measures["crossing"] = crossed, tokens.astype(np.float64)
        blocks = units.blocks
        if sequence is not None:
            # Sequences that stand for runs of alike tokens cut some of these.
            blocks = Blocks(inflation=CUT) if units.name == "window" else INDEPENDENT
        return {
            name: Sums(
                # Of no tokens there is no figure, and no interval either.
                float(whole[name][0].sum() / (whole[name][1].sum() or 1.0)),
                *(above, below, blocks, unit_of_cut),
                None if sequence is None else window_of_cut,
            )
            for name, (above, below) in cuts.items()
        }

    def _counts_of(
        self, cuts: Whole, cut_of_token: Whole, size: Whole
    ) -> Iterator[tuple[Whole, Counts]]:
        """Yield some of these cuts at a time, and the counts of their tokens, a row for each."""
        tokens, end = np.argsort(cut_of_token, kind="stable"), np.cumsum(size)
        setting, ids = by_position(self.setting), self.trace.expert_ids
        at_once = max(CELLS // self.counts.load[0].size, 1)
        for first in range(0, len(cuts), at_once):
            some = cuts[first : first + at_once]
            row = np.repeat(np.arange(len(some), dtype=np.uint32), size[some])
            within = np.arange(len(row)) - (np.cumsum(size[some]) - size[some])[row]
            mine = self.tokens[tokens[(end - size)[some][row] + within]]
            rows = setting.labelled(self.trace, len(some), int(size[some].max()))
            part, place = np.ascontiguousarray(ids[mine]), mine.astype(np.uint64)
            rows.push(part, row, setting.threads, positions=place)
            load, visits, nodes = (table.transpose(1, 0, 2) for table in rows.finish())
            yield some, replace(self.counts, load=load, visits=visits, node_visits=nodes)

    def _nudged(self, counts: Counts, window: Whole, share: Floats, step: float) -> Counts:
        """Move windows [n] a step towards what a sequence does, as if it had all their tokens."""
        whole = self.counts

        def moved(part: NDArray[Any], of: NDArray[Any]) -> Floats:
            before = of[window].astype(np.float64)
            # Copies in turns are counted by position, so a part may be where the whole is not.
            nudged: Floats = np.maximum(before + step * (part / share[:, None, None] - before), 0)
            return nudged

        tables: dict[str, Any] = {
            name: moved(getattr(counts, name), getattr(whole, name))
            for name in ("load", "visits", "node_visits")
        }
        if whole.active is not None:
            # The more of a device's experts are active, the less more tokens change that.
            experts = (self.setting.placement.slots >= 0).sum(axis=2)
            active, before = whole.active[window], np.maximum(whole.load[window], 1e-300)
            idle = np.maximum(1 - active / np.maximum(experts, 1), 0)
            grown = (tables["load"] / before - 1) * idle * (before >= 1)
            tables["active"] = active * (1 + grown)
        # Homes are known of all windows together, and stay what they are.
        of_all = np.maximum(whole.visits.sum(axis=0, dtype=np.float64), 1e-300)
        rows = whole.dispatch * (tables["visits"].sum(axis=0) / of_all)[:, None, :]
        return replace(counts, dispatch=rows, is_step=whole.is_step[window], **tables)


def of_windows(counts: Counts, setting: Setting) -> Measures:
    """Return what waits for the slowest; it counts every step alike, as ``evaluate`` does."""
    step = counts.is_step.astype(np.float64)
    ratios = figures.ratios(counts.load, setting.topology.speed_of_device)
    measures = {"imbalance": (ratios.mean(axis=1) * step, step)}
    if setting.cost_model is not None:
        us = figures.layer_us(counts, setting).mean(axis=1)
        measures["predicted_layer_us"] = (us * step, step)
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
    """Compute the share of every token's pairs of neighbouring layers that cross [T], if any."""
    if trace.layers < 2:
        return None
    replay, pairs, first = by_position(setting).labelled(trace, 1, 1), np.empty(trace.tokens), 0
    for shard in trace.shards():
        pairs[first : first + len(shard)] = replay.apart(shard, first, setting.threads)
        first += len(shard)
    share: Floats = pairs / ((trace.layers - 1) * trace.top_k**2)
    return share
