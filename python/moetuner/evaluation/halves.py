"""Figures of the halves of some traffic: how far they are apart tells how sure a figure is.

What is independent is dealt into folds, and folds into halves. What a half has in a window is
scaled to all tokens of the window and weighed by those of the half, and its figures are computed by
the functions that compute those of all traffic. Both placements of a comparison have the same
halves, so what they have in common does not blur it.

Halves are balanced: any two folds are on one side as often as not (McCarthy 1969), by the quadratic
residues of a prime (Paley 1933). So about as many halves as folds tell what all of them would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.arrival import Order, orders, put_in_order
from moetuner.evaluation.figures import FIGURES, CountsByOrder, Figure
from moetuner.evaluation.replay import (
    SHARD_BYTES,
    Counts,
    Setting,
    Traffic,
    counts_of,
    members,
)
from moetuner.evaluation.units import Folds, Units
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]

# Settings whose halves are kept for each trace.
KEPT = 16
# Primes that are 3 modulo 4: folds that each can halve are one more.
PRIMES = (3, 7, 11, 19)
# Counts of halves of windows that are in memory at once.
CELLS = 1 << 20


class Halved(NamedTuple):
    """A figure of some traffic and of its halves.

    Parameters
    ----------
    value
        The figure.
    sides
        The same of both sides of every halving [2,H]; none of a single fold.
    folds
        What was halved.
    """

    value: float
    sides: Floats
    folds: Folds


ByGroup = dict[str | None, dict[str, Halved]]


def halvings(folds: int) -> NDArray[np.bool_]:
    """Return which folds are on the first side of every halving [H,F]; none of a single fold."""
    prime = next(prime for prime in PRIMES if prime + 1 >= folds)
    squares = np.arange(1, prime) ** 2 % prime
    first = np.ones((prime, prime + 1), dtype=bool)
    first[:, :prime] = np.isin((np.arange(prime)[:, None] - np.arange(prime)) % prime, squares)
    first = first[:, :folds]
    return first[first.any(axis=1) & ~first.all(axis=1)]


def halve(traffic: Traffic, setting: Setting, units: Units, *, by_group: bool = True) -> ByGroup:
    """Compute figures of all traffic (None), of every group that has some, and of their halves."""
    return halve_each(traffic, [setting], units, by_group=by_group)[0]


def halve_each(
    traffic: Traffic, settings: Sequence[Setting], units: Units, *, by_group: bool = True
) -> list[ByGroup]:
    """Compute what ``halve`` does under settings that differ in their placements and windows alone.

    Windows are as long as the shortest of them or several times that. The tokens of a trace are
    read once for all settings, and not again for those whose halves are known already.
    """
    settings = [replace(setting, mixed=False) for setting in settings]
    known: list[_Known] = []
    if isinstance(traffic, RoutingTrace):
        known = _KNOWN.setdefault(traffic, [])
    asked = [_Asked(setting, units, by_group) for setting in settings]
    del known[: max(len(known) - KEPT, 0)]
    unknown = [each for each in asked if _find(known, each) is None]
    for each, figures in zip(unknown, _halve_anew(traffic, unknown), strict=True):
        known.append(_Known(each, figures))
    found = [_find(known, each) for each in asked]
    return [figures for figures in found if figures is not None]


class _Asked(NamedTuple):
    """What halves were asked for."""

    setting: Setting
    units: Units
    by_group: bool


class _Known(NamedTuple):
    """What halves were asked for, and their figures."""

    asked: _Asked
    figures: ByGroup


# The same placements are compared with several others, and in windows of several sizes.
_KNOWN: WeakKeyDictionary[RoutingTrace, list[_Known]] = WeakKeyDictionary()


def _find(known: Sequence[_Known], asked: _Asked) -> ByGroup | None:
    """Return the halves that were asked for, if they are known."""
    for other, figures in known:
        is_enough = other.by_group or not asked.by_group
        if is_enough and other.units is asked.units and other.setting == asked.setting:
            return figures if asked.by_group else {None: figures[None]}
    return None


def _halve_anew(traffic: Traffic, asked: Sequence[_Asked]) -> list[ByGroup]:
    """Compute halves that are not known, of which all but the settings are alike."""
    if not asked:
        return []
    (common, units, by_group), settings = asked[0], [each.setting for each in asked]
    if not by_group and isinstance(traffic, RoutingTrace):
        traffic = replace(traffic, group=None)
    rows = members(traffic)
    if not by_group:
        rows = {None: rows[None]}
    folds = {
        window: {group: units.deal(traffic, own, window) for group, own in rows.items()}
        for window in {setting.window: None for setting in settings}
    }
    weights, orderly = [], []
    for weight, order in orders(traffic, common.arrival, seed=common.mixed_seed):
        weights.append(weight)
        orderly.append(_in_one_order(traffic, order, settings, folds))
    return [_weigh(weights, parts) for parts in zip(*orderly, strict=True)]


def _weigh(weights: Sequence[float], parts: Sequence[ByGroup]) -> ByGroup:
    """Return the figures of traffic that arrives in orders of such weights."""
    if len(parts) == 1:
        return parts[0]
    weighed: ByGroup = {}
    for group, figures in parts[0].items():
        weighed[group] = {}
        for name, figure in figures.items():
            value = float(np.dot(weights, [part[group][name].value for part in parts]))
            sides = np.tensordot(weights, [part[group][name].sides for part in parts], axes=1)
            weighed[group][name] = Halved(value, sides, figure.folds)
    return weighed


def _in_one_order(
    traffic: Traffic,
    order: Order | None,
    settings: Sequence[Setting],
    folds: dict[int | None, dict[str | None, Folds]],
) -> list[ByGroup]:
    """Return the figures of traffic that arrives in an order, of folds as it was recorded.

    Folds are by window and group.
    """
    ordered = put_in_order(traffic, order)
    recorded, rows = members(traffic), members(ordered)
    fold_of: dict[tuple[int | None, str | None], Integers] = {}
    for window, by_group in folds.items():
        for group, dealt in by_group.items():
            fold = np.zeros(len(rows[None]), dtype=dealt.fold.dtype)
            fold[recorded[group]] = dealt.fold
            fold_of[window, group] = (fold if order is None else fold[order])[rows[group]]
    # Where experts are, and so what crosses, is the same in windows of all sizes.
    placements = {id(setting.placement): setting for setting in settings}
    measured = count_crossings([*placements.values()], ordered)
    crossings = dict(zip(placements, measured, strict=True))
    halved = []
    for setting, counted in zip(settings, counts_of(ordered, settings), strict=True):
        figures: ByGroup = {}
        crossed = crossings[id(setting.placement)]
        for group, dealt in folds[setting.window].items():
            own = None if crossed is None else crossed[rows[group]] / _count_pairs(ordered)
            fold = fold_of[setting.window, group]
            part = _Halving(ordered, rows[group], fold, own, counted[group], setting)
            figures[group] = part.figures(dealt)
        halved.append(figures)
    return halved


@dataclass(frozen=True)
class _Halving:
    """Some tokens of a trace, or windows of a load table, and what was counted of them.

    Parameters
    ----------
    traffic
        The trace, or the table.
    items
        Which tokens of the trace these are, or windows of the table [n].
    fold
        The fold of each of them [n].
    crossed
        The share of the pairs of each token that cross [n]; None where that is not known.
    counts
        Counts of all of them, in windows of their own.
    setting
        How they were replayed.
    """

    traffic: Traffic
    items: Integers
    fold: Integers
    crossed: Floats | None
    counts: Counts
    setting: Setting

    @cached_property
    def window(self) -> Integers:
        """The window of every item [n]; a window of a table is an item."""
        is_table = isinstance(self.traffic, RoutingStatistics)
        length = 1 if is_table else self.setting.window or max(len(self.items), 1)
        return np.arange(len(self.items), dtype=self.items.dtype) // length

    def figures(self, folds: Folds) -> dict[str, Halved]:
        """Compute all figures that have halves."""
        counts = self.counts
        if self.crossed is not None:
            counts = replace(counts, crossed=self._by_fold(folds.number, self.crossed).sum(axis=1))
        replay, known = CountsByOrder([(1.0, counts)], None, self.setting), {}
        for name, figure in FIGURES.items():
            # Of a table, which experts tokens meet is known of all windows together only.
            is_known = figure.per == "window" or isinstance(self.traffic, RoutingTrace)
            if figure.windows is not None and is_known and replay.steps(figure.windows):
                known[name] = figure
        first = halvings(folds.number)
        sides = self._sides(np.concatenate([first, ~first]), known)
        values = {name: figure.value(replay) or 0.0 for name, figure in known.items()}
        return {name: Halved(values[name], sides[name].reshape(2, -1), folds) for name in known}

    def _sides(self, sides: NDArray[np.bool_], figures: dict[str, Figure]) -> dict[str, Floats]:
        """Compute figures of every side [S,F] of halves [S]."""
        tokens = self._by_fold(sides.shape[1])
        crossed = None if self.crossed is None else self._by_fold(sides.shape[1], self.crossed)
        above, below = (
            {name: np.zeros(len(sides)) for name in figures} for _ in ("above", "below")
        )
        for rows in _rows_of(tokens, sides, self.counts.load[0].size):
            counts, scale = self._counts_of(rows), rows.length / np.maximum(rows.tokens, 1)
            if crossed is not None:
                of_rows = (rows.has * crossed[rows.window]).sum(axis=1) * scale
                counts = replace(counts, crossed=of_rows)
            is_step = self.counts.is_step[rows.window]
            for name, figure in figures.items():
                assert figure.windows is not None
                table = figure.windows(counts, self.setting)
                assert table is not None
                value = table.reshape(*table.shape[:2], -1).sum(axis=2).mean(axis=1)
                weight = rows.tokens / rows.length * is_step
                if figure.per == "token":
                    value, weight = value / rows.length, rows.tokens
                above[name] += (weight * value)[rows.of_side].sum(axis=0)
                below[name] += weight[rows.of_side].sum(axis=0)
        with np.errstate(invalid="ignore"):
            return {name: above[name] / below[name] for name in figures}

    def _by_fold(self, folds: int, weights: Floats | None = None) -> Floats:
        """Add up items, or their weights, by window and fold [W,F]."""
        windows = len(self.counts.load)
        cell = np.multiply(self.window, folds, dtype=np.int64) + self.fold
        sums = np.bincount(cell, weights, windows * folds)
        return sums.reshape(windows, folds).astype(np.float64)

    def _counts_of(self, rows: _Rows) -> Counts:
        """Count what is in rows, each scaled to all tokens of its window."""
        counted, window = self.counts, rows.window
        tables: dict[str, Floats] = {
            name: table[window].astype(np.float64)
            for name in ("load", "visits", "node_visits")
            if (table := getattr(counted, name)) is not None
        }
        partly = np.flatnonzero((rows.tokens > 0) & (rows.tokens < rows.length))
        if partly.size:
            # Rows are in the order of their windows.
            own = np.split(partly, np.flatnonzero(np.diff(window[partly])) + 1)
            shared = self._shared(np.unique(window[partly]), rows.has.shape[1])
            for name, of_folds in zip(("load", "visits", "node_visits"), shared, strict=True):
                for one, each in zip(own, of_folds, strict=True):
                    scale = (rows.length[one] / rows.tokens[one])[:, None]
                    scaled = rows.has[one] @ each.reshape(len(each), -1).astype(np.float64)
                    tables[name][one] = (scaled * scale).reshape(-1, *each.shape[1:])
        if counted.active is not None:
            # An expert is idle if each of its device's tokens is of another one.
            experts = (self.setting.placement.slots >= 0).sum(axis=2)
            idle = np.clip(1 - counted.active[window] / np.maximum(experts, 1), 0, 1)
            grown = tables["load"] / np.maximum(counted.load[window], 1)
            tables["active"] = experts * (1 - idle**grown)
        # Homes are known of all windows together, and stay what they are.
        visits = np.maximum(counted.visits.sum(axis=0, dtype=np.float64), 1e-300)
        dispatch = counted.dispatch * (tables["visits"].sum(axis=0) / visits)[:, None, :]
        return replace(
            counted,
            load=tables["load"],
            visits=tables["visits"],
            node_visits=tables.get("node_visits"),
            dispatch=dispatch,
            active=tables.get("active"),
            is_step=counted.is_step[window],
        )

    def _shared(self, windows: Integers, folds: int) -> Iterator[NDArray[Any]]:
        """Yield load, visits and node visits of so many windows by fold [w,F,L,D]."""
        assert isinstance(self.traffic, RoutingTrace)
        first, last = np.searchsorted(self.window, [windows[0], windows[-1] + 1])
        window = self.window[first:last]
        place = np.searchsorted(windows, window)
        is_in = windows[place] == window
        items = self.items[first:last][is_in]
        rows = (place[is_in] * folds + self.fold[first:last][is_in]).astype(np.uint32)
        setting, trace = by_position(self.setting), self.traffic
        replay = setting.begin_replay(trace, len(windows) * folds, int(np.bincount(rows).max()))
        begin, checked = 0, trace.ids.fresh
        for ids in trace.ids.chosen(items, SHARD_BYTES, setting.threads):
            run = slice(begin, begin + len(ids))
            positions = items[run].astype(np.uint64)
            replay.push(ids, rows[run], setting.threads, positions=positions, checked=checked)
            begin += len(ids)
            del ids  # else the next piece is read while this one is still there
        for table in replay.finish():
            yield table.transpose(1, 0, 2).reshape(len(windows), folds, len(table), -1)


class _Rows(NamedTuple):
    """What sides have of some windows: where several have the same of one, it is one row.

    Parameters
    ----------
    window
        The window of every row [R].
    has
        Whether a fold is in it [R,F].
    tokens, length
        How many tokens are in it, and in all of its window [R].
    of_side
        The row of every window and side [w,S].
    """

    window: Integers
    has: Floats
    tokens: Floats
    length: Floats
    of_side: Integers


def _rows_of(tokens: Floats, sides: NDArray[np.bool_], cells: int) -> Iterator[_Rows]:
    """Yield what sides [S,F] have of windows of tokens by fold [W,F], some windows at a time.

    The counts of a row fill ``cells`` numbers, which limits how many windows are taken at once.
    """
    folds = sides.shape[1]
    bit = 1 << np.arange(folds)
    # Which folds of a window are on a side, as bits [W,S].
    chosen = ((tokens > 0) @ bit)[:, None] & (sides @ bit)
    different = 1 + (np.diff(np.sort(chosen, axis=1), axis=1) > 0).sum(axis=1).max(initial=0)
    step = max(CELLS // int(different * cells), 1)
    for first in range(0, len(tokens) if len(sides) else 0, step):
        own = chosen[first : first + step]
        key = (np.arange(len(own))[:, None] << folds) | own
        key, of_side = np.unique(key, return_inverse=True)
        window = first + (key >> folds)
        has = ((key[:, None] & bit) > 0).astype(np.float64)
        counted, length = (has * tokens[window]).sum(axis=1), tokens[window].sum(axis=1)
        yield _Rows(window, has, counted, length, of_side.reshape(own.shape))


def by_position(setting: Setting) -> Setting:
    """Return a setting whose copies serve by position: as evenly as those that take turns."""
    return replace(setting, split="even") if setting.split == "round_robin" else setting


def count_crossings(
    settings: Sequence[Setting], traffic: Traffic
) -> list[NDArray[np.unsignedinteger[Any]] | None]:
    """Count every token's pairs of neighbouring layers' experts that cross [T], by setting."""
    if isinstance(traffic, RoutingStatistics) or traffic.layers < 2:
        return [None] * len(settings)
    replays = [by_position(setting).begin_replay(traffic, 1, 1) for setting in settings]
    kind, first = np.min_scalar_type(_count_pairs(traffic)), 0
    pairs = np.empty((len(settings), traffic.tokens), kind)
    for shard in traffic.shards(SHARD_BYTES, threads=settings[0].threads):
        for own, replay in zip(pairs, replays, strict=True):
            own[first : first + len(shard)] = replay.apart(shard, first, settings[0].threads)
        first += len(shard)
        del shard  # else the next one is read while this one is still there
    return [*pairs]


def _count_pairs(traffic: Traffic) -> int:
    """Count the pairs of neighbouring layers' experts that a token of a trace has."""
    assert isinstance(traffic, RoutingTrace)
    return (traffic.layers - 1) * traffic.top_k**2
