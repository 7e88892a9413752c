"""Figures of the halves of some traffic: how far they are apart tells how sure a figure is.

What is independent is dealt into folds, and folds into halves. What a half has in a window is
scaled to all tokens of the window and weighed by those of the half, and its figures are computed by
the functions that compute those of all traffic. Both placements of a comparison have the same
halves, so what they have in common does not blur it.

Halves are balanced: any two folds are on one side as often as not (McCarthy 1969), by the quadratic
residues of a prime (Paley 1933). So about as many halves as folds tell what all of them would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner.evaluation.arrival import Order, orders
from moetuner.evaluation.figures import FIGURES, CountsByOrder, Figure, Windows
from moetuner.evaluation.reading import Rows, read
from moetuner.evaluation.replay import (
    Counts,
    Setting,
    counts_of,
    without_groups,
)
from moetuner.evaluation.units import Folds, Units
from moetuner.recording import Recording
from moetuner.serving.splits import EVEN
from moetuner.trace import as_trace

Floats = NDArray[np.float64]
Integers = NDArray[np.integer[Any]]

# Settings whose halves are kept for each recording.
KEPT = 16
# Primes that are 3 modulo 4: folds that each can halve are one more.
PRIMES = (3, 7, 11, 19)
# Counts of halves of windows that are in memory at once, of parts of windows, and numbers of items.
CELLS, PARTS, ITEMS = 1 << 20, 1 << 25, 1 << 20


# Part of the time of halves that counting all of the traffic takes.
COUNTING = 0.3


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


def halve(
    traffic: Recording,
    setting: Setting,
    units: Units,
    *,
    by_group: bool = True,
    names: Collection[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> ByGroup:
    """Compute figures of all traffic (None), of every group that has some, and of their halves."""
    settings = [setting]
    [figures] = halve_each(
        traffic, settings, units, by_group=by_group, names=names, progress=progress
    )
    return figures


def halve_each(
    traffic: Recording,
    settings: Sequence[Setting],
    units: Units,
    *,
    by_group: bool = True,
    names: Collection[str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[ByGroup]:
    """Compute what ``halve`` does under settings that differ in their placements and windows alone.

    Windows are as long as the shortest of them or several times that. The tokens of a trace are
    read a few times for all settings, and not again for those whose halves are known already.
    Figures are those of some names, by default all that have halves. ``progress`` gets the share of
    the work that is done.
    """
    # Halves are of windows as they arrive, and of tokens whose homes are spread evenly.
    settings = [setting.with_options(mixed=False, home=None) for setting in settings]
    halved = {name for name, figure in FIGURES.items() if figure.windows is not None}
    names = frozenset(halved if names is None else halved & set(names))
    # The same placements are compared with several others, and in windows of several sizes.
    known: list[_Known] = traffic.known.setdefault("halves", [])
    asked = [_Asked(setting, units, by_group, names) for setting in settings]
    del known[: max(len(known) - KEPT, 0)]
    report = progress or (lambda _: None)
    unknown = [each for each in asked if _find(known, each) is None]
    for each, figures in zip(unknown, _halve_anew(traffic, unknown, report), strict=True):
        known.append(_Known(each, figures))
    found = [_find(known, each) for each in asked]
    return [figures for figures in found if figures is not None]


class _Asked(NamedTuple):
    """What halves were asked for."""

    setting: Setting
    units: Units
    by_group: bool
    names: frozenset[str]


class _Known(NamedTuple):
    """What halves were asked for, and their figures."""

    asked: _Asked
    figures: ByGroup


def _find(known: Sequence[_Known], asked: _Asked) -> ByGroup | None:
    """Return the halves that were asked for, if they are known."""
    for other, figures in known:
        is_enough = (other.by_group or not asked.by_group) and asked.names <= other.names
        if is_enough and other.units is asked.units and other.setting == asked.setting:
            return figures if asked.by_group else {None: figures[None]}
    return None


def _halve_anew(
    traffic: Recording, asked: Sequence[_Asked], report: Callable[[float], None]
) -> list[ByGroup]:
    """Compute halves that are not known, of which all but the settings are alike."""
    if not asked:
        return []
    (common, units, by_group, names), settings = asked[0], [each.setting for each in asked]
    traffic = traffic if by_group else without_groups(traffic)
    rows = traffic.group_rows()
    if not by_group:
        rows = {None: rows[None]}
    folds: dict[int | None, dict[str | None, Folds]] = {}
    # What is dealt by its label is dealt alike, whatever the windows.
    is_labelled = traffic.sequence is not None
    for window in {setting.window: None for setting in settings}:
        if not is_labelled or not folds:
            dealt = {group: units.deal(traffic, own, window) for group, own in rows.items()}
        folds[window] = dealt
    weights, orderly = [], []
    served = orders(traffic, common.serving.arrival, seed=common.options.mixed_seed)
    for number, (weight, order) in enumerate(served):

        def report_order(share: float, before: int = number) -> None:
            report((before + share) / len(served))

        weights.append(weight)
        orderly.append(_in_one_order(traffic, order, settings, folds, names, report_order))
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
    traffic: Recording,
    order: Order | None,
    settings: Sequence[Setting],
    folds: dict[int | None, dict[str | None, Folds]],
    names: frozenset[str],
    report: Callable[[float], None],
) -> list[ByGroup]:
    """Return the figures of traffic that arrives in an order, of folds as it was recorded.

    Folds are by window and group.
    """
    ordered = traffic if order is None else traffic.take(order)
    recorded, rows = traffic.group_rows(), ordered.group_rows()
    counted = list(counts_of(ordered, settings, lambda share: report(share * COUNTING)))
    halved: list[ByGroup] = [{} for _ in settings]
    # Windows of several sizes that have the same folds are made of the same parts.
    alike: dict[int, list[int]] = {}
    for number, setting in enumerate(settings):
        alike.setdefault(id(folds[setting.window]), []).append(number)
    parts = sum(len(folds[settings[numbers[0]].window]) for numbers in alike.values())
    done = 0

    def report_part(share: float) -> None:
        report(COUNTING + (1 - COUNTING) * (done + share) / parts)

    for numbers in alike.values():
        for group, dealt in folds[settings[numbers[0]].window].items():
            fold = dealt.fold
            if order is not None:
                fold = np.zeros(len(rows[None]), dtype=dealt.fold.dtype)
                fold[recorded[group]] = dealt.fold
                fold = check.at(check.at(fold, order), rows[group])
            part = _Dealt(ordered, rows[group], fold, dealt)
            halvings_of = {
                number: _Halving(part, settings[number], counted[number][group], names)
                for number in numbers
            }
            part.tell([*halvings_of.values()], report_part)
            for number, halving in halvings_of.items():
                halved[number][group] = halving.figures()
            done += 1
    return halved


class _Parts(NamedTuple):
    """What parts of the shortest windows have whose tokens are of one fold.

    Parameters
    ----------
    window, fold
        The window of every part, rising, and its fold [C].
    tables
        Load and visits of devices, and visits of nodes [C,L*D or L*N].
    crossed
        Tokens, each by the share of its pairs of neighbouring layers' experts that are on different
        devices [C]; None where not asked for.
    """

    window: Integers
    fold: Integers
    tables: Sequence[NDArray[Any]]
    crossed: Floats | None = None

    def by_fold(self, windows: range, times: int, folds: int) -> list[Floats]:
        """Add up what windows of so many of these have by fold: of each table [W,F,L*D or L*N].

        The last one, if asked for, is of what crosses [W,F,1].
        """
        ends = np.searchsorted(self.window, [windows.start * times, windows.stop * times])
        run = slice(*ends.tolist())
        cell = (self.window[run] // times - windows.start) * folds + self.fold[run]
        order = np.argsort(cell, kind="stable")
        cell = cell[order]
        begin = np.flatnonzero(np.diff(cell, prepend=-1))
        sums = []
        crossed = [] if self.crossed is None else [self.crossed[:, None]]
        for table in (*self.tables, *crossed):
            total = np.zeros((len(windows) * folds, table.shape[1]))
            if begin.size:
                parts = table[run][order].astype(np.float64)
                total[cell[begin]] = parts if times == 1 else np.add.reduceat(parts, begin, axis=0)
            sums.append(total.reshape(len(windows), folds, -1))
        return sums


@dataclass(frozen=True)
class _Dealt:
    """Some tokens of a trace, or windows of a load table, that were dealt into folds.

    Parameters
    ----------
    traffic
        The trace, or the table.
    items
        Which tokens of the trace these are, or windows of the table [n].
    fold
        The fold of each of them [n].
    folds
        The folds of the same in the order of the recording.
    """

    traffic: Recording
    items: Integers
    fold: Integers
    folds: Folds

    def length(self, setting: Setting) -> int:
        """Return the items of a window; a window of a table is one."""
        return self.traffic.rows_in(setting.window or max(len(self.items), 1))

    def by_fold(self, length: int) -> Floats:
        """Count items by window and fold [W,F], in windows of so many items."""
        folds, number = self.folds.number, len(self.items)
        counts = np.zeros((max(-(-number // length), 1), folds))
        step = max(ITEMS // length, 1) * length
        for first in range(0, number, step):
            fold = self.fold[first : first + step]
            cell = np.arange(len(fold)) // length * folds + fold
            windows = slice(first // length, -(-(first + len(fold)) // length))
            table = counts[windows]
            table += np.bincount(cell, minlength=table.size).reshape(table.shape)
        return counts

    def tell(self, halvings_of: Sequence[_Halving], report: Callable[[float], None]) -> None:
        """Tell halvings what each fold has of their windows.

        It is counted in the shortest windows, of which longer ones are made, and in those alone
        that folds share: of others all is known. Some windows are read at once for all placements,
        and forgotten before the next ones.
        """
        length = min(each.length for each in halvings_of)
        tokens = self.by_fold(length)
        settings = {id(each.setting.placement): each.setting for each in halvings_of}
        known = {
            id(each.setting.placement): each.counts for each in halvings_of if each.length == length
        }
        is_read = np.count_nonzero(tokens, axis=1) > 1
        # What crosses is known of all windows together only.
        with_crossed = any(each.is_crossing for each in halvings_of)
        if (with_crossed or len(known) < len(settings)) and self.folds.number > 1:
            is_read[:] = True
        times = max(-(-each.length // length) for each in halvings_of)
        for run in _runs(tokens[is_read], len(tokens), times, settings.values()):
            read = run.start + np.flatnonzero(is_read[run])
            others = run.start + np.flatnonzero(~is_read[run])
            counted = self._count(read, tokens, length, settings, stays=with_crossed)
            for placement in settings:
                told = [counted[placement]] if counted else []
                if others.size and times > 1 and placement in known:
                    tables = _tables(known[placement])
                    fold = tokens[others].argmax(axis=1)
                    told.append(_Parts(others, fold, [_flat(table[others]) for table in tables]))
                for halving in halvings_of:
                    if id(halving.setting.placement) == placement:
                        halving.add(run, length, told)
            report(run.stop / len(tokens))

    def _count(
        self,
        windows: Integers,
        tokens: Floats,
        length: int,
        settings: dict[int, Setting],
        *,
        stays: bool,
    ) -> dict[int, _Parts]:
        """Count what every fold has of some windows, rising, under every placement."""
        window, fold = np.nonzero(tokens[windows])
        if not window.size:
            return {}
        trace = as_trace(self.traffic)
        begin, end = int(windows[0]), int(windows[-1]) + 1
        row = np.zeros((end - begin, self.folds.number), dtype=np.uint32)
        row[windows[window] - begin, fold] = np.arange(len(window))
        is_read = np.zeros(end - begin, dtype=bool)
        is_read[windows - begin] = True
        position = np.arange(begin * length, min(end * length, len(self.items)))
        position = position[is_read[position // length - begin]]
        rows = row[position // length - begin, self.fold[position]]
        largest = int(tokens[windows].max())

        def row_of(run: slice) -> Integers:
            return rows[run]

        reader = Rows(trace, self.items[position], row_of, len(window), largest, place=position)
        replays = {
            key: _by_position(setting).begin_replay(reader, stays=stays)
            for key, setting in settings.items()
        }
        read([reader], threads=next(iter(settings.values())).options.threads)
        pairs, own = (trace.layers - 1) * trace.top_k**2, tokens[windows][window, fold]
        told = {}
        for key, replay in replays.items():
            load, visits, node_visits, _, _, stay = replay.finish()
            told[key] = _Parts(
                windows[window],
                fold,
                [_flat(table) for table in (load, visits, node_visits)],
                own - stay / pairs if stays else None,
            )
        return told


def _flat(table: NDArray[Any]) -> NDArray[Any]:
    """Return rows [n,a,b] as [n,a*b], of which there may be none."""
    return table.reshape(len(table), table.shape[1] * table.shape[2])


def _tables(counts: Counts) -> list[NDArray[Any]]:
    """Return the tables of counts that parts have."""
    return [
        table for table in (counts.load, counts.visits, counts.node_visits) if table is not None
    ]


def _runs(
    tokens: Floats, windows: int, times: int, settings: Collection[Setting]
) -> Iterator[slice]:
    """Yield runs of so many windows, some of which are read: of tokens by fold [R,F].

    Runs are as long as what is counted of them fits into ``PARTS`` numbers, and several ``times``
    windows long.
    """
    sizes = [
        setting.placement.layers * (2 * setting.topology.devices + setting.topology.nodes)
        for setting in settings
    ]
    numbers = np.count_nonzero(tokens) * sum(sizes) / max(windows, 1)
    step = max(int(PARTS / max(numbers, 1)) // times, 1) * times
    for first in range(0, windows, step):
        yield slice(first, min(first + step, windows))


class _Halving:
    """Figures of both sides of every halving, under a setting, added up over runs of windows.

    Parameters
    ----------
    dealt
        What is halved.
    setting
        How it was replayed.
    counts
        Counts of all of it, in windows of its own.
    names
        Figures that are computed.
    """

    def __init__(
        self,
        dealt: _Dealt,
        setting: Setting,
        counts: Counts,
        names: Collection[str],
    ) -> None:
        self.setting, self.length, self._folds = setting, dealt.length(setting), dealt.folds
        # Of counts, which experts tokens meet is known of all windows together only.
        self._tokens, has_tokens = dealt.by_fold(self.length), dealt.traffic.ordered
        self.is_crossing = "crossing" in names and has_tokens and dealt.traffic.layers > 1
        if self.is_crossing:
            counts = replace(counts, crossed=np.zeros(len(self._tokens)))  # not known yet
        self.counts = counts
        replay = CountsByOrder([(1.0, counts)], None, setting)
        self._figures: dict[str, Figure] = {}
        for name, figure in FIGURES.items():
            is_known = figure.per == "window" or has_tokens
            is_asked = name in names and figure.windows is not None and is_known
            if is_asked and replay.steps(cast(Windows, figure.windows)):
                self._figures[name] = figure
        self._values = {name: each.value(replay) or 0.0 for name, each in self._figures.items()}
        first = halvings(dealt.folds.number)
        self._sides = np.concatenate([first, ~first])
        self._above, self._below = (
            {name: np.zeros(len(self._sides)) for name in self._figures} for _ in ("above", "below")
        )

    def add(self, run: slice, length: int, parts: Sequence[_Parts]) -> None:
        """Add what sides have of a run of windows of so many items, of which these are made."""
        times = -(-self.length // length)
        own = slice(run.start // times, -(-run.stop // times))
        for rows in _rows_of(self._tokens, own, self._sides, self.counts.load[0].size):
            counts = self._counts_of(rows, times, parts)
            is_step = self.counts.is_step[rows.window]
            for name, figure in self._figures.items():
                assert figure.windows is not None
                table = figure.windows(counts, self.setting)
                assert table is not None
                value = table.reshape(*table.shape[:2], -1).sum(axis=2).mean(axis=1)
                weight = rows.tokens / rows.length * is_step
                if figure.per == "token":
                    value, weight = value / rows.length, rows.tokens
                self._above[name] += (weight * value)[rows.of_side].sum(axis=0)
                self._below[name] += weight[rows.of_side].sum(axis=0)

    def figures(self) -> dict[str, Halved]:
        """Return all figures that have halves."""
        with np.errstate(invalid="ignore"):
            return {
                name: Halved(
                    value, (self._above[name] / self._below[name]).reshape(2, -1), self._folds
                )
                for name, value in self._values.items()
            }

    def _counts_of(self, rows: _Rows, times: int, parts: Sequence[_Parts]) -> Counts:
        """Count what is in rows, each scaled to all tokens of its window."""
        counted, window, crossed = self.counts, rows.window, None
        tables = [table[window].astype(np.float64) for table in _tables(counted)]
        partly = np.flatnonzero((rows.tokens > 0) & (rows.tokens < rows.length))
        if partly.size or self.is_crossing:
            windows = range(int(window[0]), int(window[-1]) + 1)
            told = [each.by_fold(windows, times, self._folds.number) for each in parts]
            sums = [sum(tables_of[1:], tables_of[0]) for tables_of in zip(*told, strict=True)]
            if self.is_crossing:
                share = rows.length / np.maximum(rows.tokens, 1)
                crossed = (rows.has * sums.pop()[window - windows.start, :, 0]).sum(axis=1) * share
            # Rows are in the order of their windows: those of each, one below the other [W,R,F].
            place = window[partly] - windows.start
            number = np.arange(len(partly)) - np.searchsorted(place, place)
            has = np.zeros((len(windows), int(number.max(initial=-1)) + 1, self._folds.number))
            has[place, number] = rows.has[partly]
            scale = (rows.length[partly] / rows.tokens[partly])[:, None]
            for table, by_fold in zip(tables, sums, strict=True):
                scaled = (has @ by_fold)[place, number] * scale
                table[partly] = scaled.reshape(-1, *table.shape[1:])
        load, visits = tables[:2]
        node_visits = tables[2] if len(tables) > 2 else None
        active = None
        if counted.active is not None:
            # An expert is idle if each of its device's tokens is of another one.
            experts = (self.setting.placement.slots >= 0).sum(axis=2)
            idle = np.clip(1 - counted.active[window] / np.maximum(experts, 1), 0, 1)
            active = experts * (1 - idle ** (load / np.maximum(counted.load[window], 1)))
        # Homes are known of all windows together, and stay what they are.
        total = np.maximum(counted.visits.sum(axis=0, dtype=np.float64), 1e-300)
        dispatch = counted.dispatch * (visits.sum(axis=0) / total)[:, None, :]
        return replace(
            counted,
            load=load,
            visits=visits,
            node_visits=node_visits,
            dispatch=dispatch,
            active=active,
            is_step=counted.is_step[window],
            crossed=crossed,
        )


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


def _rows_of(tokens: Floats, run: slice, sides: NDArray[np.bool_], cells: int) -> Iterator[_Rows]:
    """Yield what sides [S,F] have of a run of windows of tokens by fold [W,F], some at a time.

    The counts of a row fill ``cells`` numbers, which limits how many windows are taken at once.
    """
    folds = sides.shape[1]
    bit = 1 << np.arange(folds)
    # Which folds of a window are on a side, as bits [W,S].
    chosen = ((tokens[run] > 0) @ bit)[:, None] & (sides @ bit)
    different = 1 + (np.diff(np.sort(chosen, axis=1), axis=1) > 0).sum(axis=1).max(initial=0)
    step = max(CELLS // int(different * cells), 1)
    for first in range(0, len(chosen) if len(sides) else 0, step):
        own = chosen[first : first + step]
        key = (np.arange(len(own))[:, None] << folds) | own
        key, of_side = np.unique(key, return_inverse=True)
        window = run.start + first + (key >> folds)
        has = ((key[:, None] & bit) > 0).astype(np.float64)
        counted, length = (has * tokens[window]).sum(axis=1), tokens[window].sum(axis=1)
        yield _Rows(window, has, counted, length, of_side.reshape(own.shape))


def _by_position(setting: Setting) -> Setting:
    """Return a setting whose copies serve by position: as evenly as those that take turns."""
    if not setting.serving.rule.in_turns:
        return setting
    return replace(setting, serving=replace(setting.serving, split=EVEN))
