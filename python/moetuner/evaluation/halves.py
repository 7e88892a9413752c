"""Figures of the halves of a recording: their differences give a figure's standard error.

Independent samples are dealt into folds, and folds into two halves, in as many ways as there are
folds. Both placements of a comparison have the same halves, so what they have in common cancels.

A half has some of the tokens of a window. Its counts are those of its folds, scaled to all tokens
of the window, and the functions that compute the figures of all traffic compute its figures from
these. A window counts in a half's mean by the share of its tokens that the half has.

Halves are balanced: any two folds are on one side as often as not (McCarthy 1969), by the quadratic
residues of a prime (Paley 1933). So about as many halvings as folds give the error that all
halvings would give.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.arrival import find_places, list_orders
from moetuner.evaluation.cells import Cells, Dealt
from moetuner.evaluation.figures import FIGURES, CountsByOrder, Figure
from moetuner.evaluation.reading import Progress, scale_progress, split_progress
from moetuner.evaluation.replay import Counts, Setting, count_each, drop_groups
from moetuner.evaluation.samples import Folds, Samples
from moetuner.recording import Recording, compute_once

Floats = NDArray[np.float64]

# Settings whose halves are cached for each recording.
CACHED_SETTINGS = 16
# Primes that are 3 modulo 4. Each can halve up to one fold more.
PRIMES = (3, 7, 11, 19)
# Counts of halves of windows that are in memory at once.
SIDE_COUNTS_AT_ONCE = 1 << 20
# Share of the time that counting all of the traffic takes, before its halves.
COUNTING_SHARE = 0.3


class Halved(NamedTuple):
    """A figure of some traffic and of its halves.

    Parameters
    ----------
    value
        The figure of all of the traffic.
    sides
        The figure of both sides of every halving [2,H]; a single fold has no halving.
    folds
        The folds that were halved.
    """

    value: float
    sides: Floats
    folds: Folds


ByGroup = dict[str | None, dict[str, Halved]]


def choose_halvings(folds: int) -> NDArray[np.bool_]:
    """Return which folds are on the first side of every halving [H,F]; one fold has no halving."""
    prime = next(prime for prime in PRIMES if prime + 1 >= folds)
    squares = np.arange(1, prime) ** 2 % prime
    first = np.ones((prime, prime + 1), dtype=bool)
    first[:, :prime] = np.isin((np.arange(prime)[:, None] - np.arange(prime)) % prime, squares)
    first = first[:, :folds]
    return first[first.any(axis=1) & ~first.all(axis=1)]


def halve(
    traffic: Recording,
    setting: Setting,
    samples: Samples,
    *,
    by_group: bool = True,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> ByGroup:
    """Compute figures of all traffic (None), of every group that has some, and of their halves."""
    settings = [setting]
    [figures] = halve_each(
        traffic, settings, samples, by_group=by_group, names=names, progress=progress
    )
    return figures


def halve_each(
    traffic: Recording,
    settings: Sequence[Setting],
    samples: Samples,
    *,
    by_group: bool = True,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> list[ByGroup]:
    """Compute what ``halve`` does under settings that differ in their placements and windows alone.

    Each window is as long as the shortest one, or several times as long. The tokens of a trace are
    read a few times for all settings together; settings whose halves are cached need no reading.
    ``names`` are the figures to compute, by default all that have halves. ``progress`` gets the
    share of the work that is done.
    """
    # Halves have no windows of mixed arrival, and the homes of their tokens are spread evenly.
    settings = [setting.with_options(mixed=False, home=None) for setting in settings]
    with_halves = {name for name, figure in FIGURES.items() if figure.windows is not None}
    chosen_names = with_halves if names is None else with_halves & set(names)
    request = _Request(samples, by_group, frozenset(chosen_names))
    # The same placement is compared with several others, and in windows of several sizes. Halves
    # are searched in a list, as those of more groups or figures are an answer as well.
    cached: list[_CachedHalves] = compute_once(traffic, "halves", list)
    del cached[: max(len(cached) - CACHED_SETTINGS, 0)]

    def find_cached(setting: Setting) -> ByGroup | None:
        for cached_setting, cached_request, figures in cached:
            if cached_setting == setting and cached_request.covers(request):
                return figures if by_group else {None: figures[None]}
        return None

    new_settings = [setting for setting in settings if find_cached(setting) is None]
    computed = _compute_halves(traffic, new_settings, request, progress)
    for setting, figures in zip(new_settings, computed, strict=True):
        cached.append((setting, request, figures))
    return [figures for figures in map(find_cached, settings) if figures is not None]


class _Request(NamedTuple):
    """Independent samples of the traffic, whether its groups are halved, and names of figures."""

    samples: Samples
    by_group: bool
    names: frozenset[str]

    def covers(self, other: _Request) -> bool:
        """Return whether the answer to this request holds the answer to another."""
        has_groups = self.by_group or not other.by_group
        return self.samples is other.samples and has_groups and other.names <= self.names


_CachedHalves = tuple[Setting, _Request, ByGroup]


def _compute_halves(
    traffic: Recording,
    settings: Sequence[Setting],
    request: _Request,
    progress: Progress | None,
) -> list[ByGroup]:
    """Compute halves under settings that differ in their placements and windows alone."""
    if not settings:
        return []
    if traffic.sequence is None and len({setting.window for setting in settings}) > 1:
        # Without sequence labels, folds are runs of windows, which differ with the window's size.
        ends = np.linspace(0, 1, len(settings) + 1).tolist()
        return [
            _compute_halves(traffic, [setting], request, scale_progress(progress, begin, end))[0]
            for setting, begin, end in zip(settings, ends[:-1], ends[1:], strict=True)
        ]
    common = settings[0]
    traffic = traffic if request.by_group else drop_groups(traffic)
    rows_of_group = traffic.group_rows()
    if not request.by_group:
        rows_of_group = {None: rows_of_group[None]}
    folds = {
        group: request.samples.deal(traffic, rows, common.window)
        for group, rows in rows_of_group.items()
    }
    orders = list_orders(traffic, common.serving.arrival, seed=common.options.mixed_seed)
    figures_by_order: list[list[ByGroup]] = []
    for number, (_, order) in enumerate(orders):
        report = split_progress(progress, number, len(orders))
        counting = scale_progress(report, 0, COUNTING_SHARE)
        counts_by_setting = [*count_each(traffic, settings, counting, order)]
        figures_by_setting: list[ByGroup] = [{} for _ in settings]
        for position, (group, rows) in enumerate(rows_of_group.items()):
            dealt = Dealt(traffic, rows, find_places(order, rows), folds[group])
            sums = [
                _FigureSums(dealt, setting, counts[group], request.names)
                for setting, counts in zip(settings, counts_by_setting, strict=True)
            ]
            begin = COUNTING_SHARE + (1 - COUNTING_SHARE) * position / len(rows_of_group)
            end = COUNTING_SHARE + (1 - COUNTING_SHARE) * (position + 1) / len(rows_of_group)
            _add_windows(dealt, sums, scale_progress(report, begin, end))
            for by_group, figure_sums in zip(figures_by_setting, sums, strict=True):
                by_group[group] = figure_sums.compute_figures()
        figures_by_order.append(figures_by_setting)
    weights = [weight for weight, _ in orders]
    return [_average_orders(weights, by_order) for by_order in zip(*figures_by_order, strict=True)]


def _average_orders(weights: Sequence[float], by_order: Sequence[ByGroup]) -> ByGroup:
    """Average figures over orders of arrival, by their weights."""
    if len(by_order) == 1:
        return by_order[0]
    averages: ByGroup = {}
    for group, figures in by_order[0].items():
        averages[group] = {}
        for name, figure in figures.items():
            halved = [by_group[group][name] for by_group in by_order]
            value = float(np.dot(weights, [in_order.value for in_order in halved]))
            sides = np.tensordot(weights, [in_order.sides for in_order in halved], axes=1)
            averages[group][name] = Halved(value, sides, figure.folds)
    return averages


def _choose_figures(
    names: Collection[str], replay: CountsByOrder, *, has_tokens: bool
) -> dict[str, Figure]:
    """Return the named figures that can be computed of halves, in the order of ``FIGURES``."""
    chosen = {}
    for name, figure in FIGURES.items():
        # Load tables give the experts that tokens combine for all windows together only.
        has_halves = figure.per == "window" or has_tokens
        is_named = name in names and has_halves
        if is_named and figure.windows is not None and replay.steps(figure.windows):
            chosen[name] = figure
    return chosen


def _add_windows(
    dealt: Dealt, sums_by_setting: Sequence[_FigureSums], progress: Progress | None
) -> None:
    """Add all windows to the sums of several settings.

    Folds are counted in the shortest windows, of which longer ones are made, and only where several
    folds share a window: a window of one fold alone has the counts of all traffic.
    """
    size = min(sums.window_size for sums in sums_by_setting)
    number = max(-(-len(dealt.items) // size), 1)
    is_counted = np.zeros(number, dtype=bool)
    if dealt.folds.number > 1:
        for sums in sums_by_setting:
            is_counted |= sums.needs_cells.repeat(-(-sums.window_size // size))[:number]
    runs = dealt.count_cells(
        is_counted,
        size,
        {id(sums.setting.placement): sums.setting for sums in sums_by_setting},
        multiple=max(-(-sums.window_size // size) for sums in sums_by_setting),
        stays=any(sums.has_crossing for sums in sums_by_setting),
    )
    for run, cells in runs:
        for sums in sums_by_setting:
            sums.add(run, size, cells.get(id(sums.setting.placement)))
        if progress is not None:
            progress(run.stop / number)


class _FigureSums:
    """Weighted sums of figures over windows, for both sides of every halving, under one setting.

    Windows are added in runs, with the counts of their cells; then ``compute_figures`` has the
    means.

    Parameters
    ----------
    dealt
        The tokens or windows that were dealt into folds.
    setting
        Settings of the replay.
    counts
        Counts of all of them, in the windows of the setting.
    names
        Names of the figures to compute.
    """

    def __init__(
        self, dealt: Dealt, setting: Setting, counts: Counts, names: Collection[str]
    ) -> None:
        has_tokens = dealt.traffic.ordered
        self.setting, self._folds, self._counts = setting, dealt.folds, counts
        self.window_size = dealt.traffic.rows_in(setting.window or max(len(dealt.items), 1))
        self._items_by_fold = dealt.count_items(self.window_size)
        # A replay gives crossings of all windows together, so folds are counted in each window.
        self.has_crossing = "crossing" in names and has_tokens and dealt.traffic.layers > 1
        self.needs_cells = (np.count_nonzero(self._items_by_fold, axis=1) > 1) | self.has_crossing
        self._pairs = (dealt.traffic.layers - 1) * (dealt.traffic.top_k or 1) ** 2
        if self.has_crossing:
            # Crossings by window are counted later; zeros keep their place until then.
            self._counts = replace(counts, crossed=np.zeros(len(self._items_by_fold)))
        self._visits = np.maximum(counts.visits.sum(axis=0, dtype=np.float64), 1e-300)
        replay = CountsByOrder([(1.0, self._counts)], None, setting)
        self._figures = _choose_figures(names, replay, has_tokens=has_tokens)
        self._values = {name: figure.value(replay) or 0.0 for name, figure in self._figures.items()}
        is_first = choose_halvings(dealt.folds.number)
        # A side is the set of its folds, one bit each; all first sides, then all second ones [2*H].
        bits = 1 << np.arange(dealt.folds.number)
        self._side_bits: list[int] = (np.concatenate([is_first, ~is_first]) @ bits).tolist()
        # For each figure the sums of weight * value over windows, and of weights, by side [2,2*H].
        self._sums = {name: np.zeros((2, len(self._side_bits))) for name in self._figures}

    def add(self, run: slice, size: int, cells: Cells | None) -> None:
        """Add a run of short windows, of ``size`` items each, with the counts of their cells.

        Short windows are as long as those of the setting with the shortest ones. One or several of
        them make a window of this setting. Without ``cells`` no folds share a window of the run.
        """
        if not self._side_bits:
            return
        # Short windows in a window of this setting, and the run in windows of this setting.
        multiple = -(-self.window_size // size)
        begin, end = run.start // multiple, -(-run.stop // multiple)
        counts_of_window = len(self._side_bits) * self._counts.load[0].size
        step = max(SIDE_COUNTS_AT_ONCE // max(counts_of_window, 1), 1)
        for first in range(begin, end, step):
            windows = slice(first, min(first + step, end))
            # Sides that have the same folds in a window share a row of counts.
            sides = _core.Sides(self._items_by_fold[windows], self._side_bits)
            _, side_items, window_items, row_of_side = sides.rows()
            counts = self._count_sides(sides, windows, multiple, cells)
            for name, figure in self._figures.items():
                assert figure.windows is not None
                table = figure.windows(counts, self.setting)
                assert table is not None
                # The sum over devices, where a table has them, and the mean over layers.
                value = table.reshape(*table.shape[:2], -1).sum(axis=2).mean(axis=1)
                weight = side_items / window_items * counts.is_full_window
                if figure.per == "token":
                    value, weight = value / window_items, side_items.astype(np.float64)
                sums_of_rows = np.stack([weight * value, weight])
                self._sums[name] += sums_of_rows[:, row_of_side].sum(axis=1)

    def compute_figures(self) -> dict[str, Halved]:
        """Compute the weighted means of all figures, from the windows that were added."""
        halved = {}
        for name, (weighted_values, weights) in self._sums.items():
            with np.errstate(invalid="ignore"):
                sides = (weighted_values / weights).reshape(2, -1)
            halved[name] = Halved(self._values[name], sides, self._folds)
        return halved

    def _count_sides(
        self, sides: _core.Sides, windows: slice, multiple: int, cells: Cells | None
    ) -> Counts:
        """Compute the counts of sides in a run of windows, scaled to all tokens of each window.

        Each row of the counts stands for a window and a set of its folds, those that one or more
        sides have there. A row begins as the counts of all traffic in the window. Where other folds
        have tokens in the window too, the sums over the cells of the set replace it.
        """
        replayed, crossed = self._counts, None
        row_window, _, window_items, _ = sides.rows()
        window = windows.start + row_window.astype(np.int64)
        tables = {
            name: table[window].astype(np.float64)
            for name in ("load", "visits", "node_visits")
            if (table := getattr(replayed, name)) is not None
        }
        if cells is not None:
            ends = np.searchsorted(
                cells.window, [windows.start * multiple, windows.stop * multiple]
            )
            chosen = slice(*ends.tolist())
            cell_window = (cells.window[chosen] // multiple - windows.start).astype(np.uint32)
            cell_fold = cells.fold[chosen]
            for table, cell_counts in zip(tables.values(), cells.tables, strict=False):
                sides.add_up(cell_window, cell_fold, cell_counts[chosen], table)
            if self.has_crossing:
                stays = cells.stays[chosen]
                number = windows.stop - windows.start
                window_stays = np.bincount(cell_window, stays.ravel(), number)
                row_stays = window_stays[row_window].astype(np.float64)[:, None, None]
                sides.add_up(cell_window, cell_fold, stays, row_stays)
                crossed = window_items - row_stays.ravel() / self._pairs
        load, active = tables["load"], None
        if replayed.active is not None:
            # An expert is idle if every token of its device goes to others, independently.
            experts = (self.setting.placement.slots >= 0).sum(axis=2)
            idle = np.clip(1 - replayed.active[window] / np.maximum(experts, 1), 0, 1)
            active = experts * (1 - idle ** (load / np.maximum(replayed.load[window], 1)))
        # Homes are counted over all windows together: every row has their shares.
        dispatch = replayed.dispatch * (tables["visits"].sum(axis=0) / self._visits)[:, None, :]
        return replace(
            replayed,
            **tables,
            dispatch=dispatch,
            active=active,
            is_full_window=replayed.is_full_window[window],
            crossed=crossed,
        )
