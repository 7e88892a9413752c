"""Figures of the halves of some traffic: how far they are apart tells how sure a figure is.

What is independent is dealt into folds, and folds into halves. What a half has in a window is
scaled to all tokens of the window and weighed by those of the half, and its figures are computed by
the functions that compute those of all traffic. Both placements of a comparison have the same
halves, so what they have in common does not blur it.

Halves are balanced: any two folds are on one side as often as not (McCarthy 1969), by the quadratic
residues of a prime (Paley 1933). So about as many halves as folds tell what all of them would.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.arrival import find_places, list_orders
from moetuner.evaluation.cells import Cells, Dealt
from moetuner.evaluation.figures import FIGURES, CountsByOrder, Figure, Windows
from moetuner.evaluation.reading import Progress, scale_progress
from moetuner.evaluation.replay import Counts, Setting, count_each, drop_groups
from moetuner.evaluation.samples import Folds, Samples
from moetuner.recording import Recording

Floats = NDArray[np.float64]

# Settings whose halves are kept for each recording.
KEPT = 16
# Primes that are 3 modulo 4: folds that each can halve are one more.
PRIMES = (3, 7, 11, 19)
# Counts of halves of windows that are in memory at once.
CELLS = 1 << 20
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


def choose_halvings(folds: int) -> NDArray[np.bool_]:
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

    Windows are as long as the shortest of them or several times that. The tokens of a trace are
    read a few times for all settings, and not again for those whose halves are known already.
    Figures are those of some names, by default all that have halves. ``progress`` gets the share of
    the work that is done.
    """
    # Halves are of windows as they arrive, and of tokens whose homes are spread evenly.
    settings = [setting.with_options(mixed=False, home=None) for setting in settings]
    halved = {name for name, figure in FIGURES.items() if figure.windows is not None}
    request = _Request(
        samples, by_group, frozenset(halved if names is None else halved & set(names))
    )
    # The same placements are compared with several others, and in windows of several sizes.
    cached: list[tuple[Setting, _Request, ByGroup]] = traffic.known.setdefault("halves", [])
    del cached[: max(len(cached) - KEPT, 0)]

    def find(setting: Setting) -> ByGroup | None:
        for other, answered, figures in cached:
            if other == setting and answered.covers(request):
                return figures if by_group else {None: figures[None]}
        return None

    new = [setting for setting in settings if find(setting) is None]
    computed = _compute_halves(traffic, new, request, progress)
    cached += [(setting, request, each) for setting, each in zip(new, computed, strict=True)]
    return [figures for figures in map(find, settings) if figures is not None]


class _Request(NamedTuple):
    """What is independent in traffic, whether groups are halved, and which figures are computed."""

    samples: Samples
    by_group: bool
    names: frozenset[str]

    def covers(self, other: _Request) -> bool:
        """Return whether the answer to this has that to another."""
        has_groups = self.by_group or not other.by_group
        return self.samples is other.samples and has_groups and other.names <= self.names


def _compute_halves(
    traffic: Recording,
    settings: Sequence[Setting],
    request: _Request,
    progress: Progress | None,
) -> list[ByGroup]:
    """Compute halves under settings that are alike but for placements and windows."""
    if not settings:
        return []
    if traffic.sequence is None and len({setting.window for setting in settings}) > 1:
        # Without labels, folds are runs of windows of one size.
        ends = np.linspace(0, 1, len(settings) + 1).tolist()
        return [
            _compute_halves(traffic, [setting], request, scale_progress(progress, begin, end))[0]
            for setting, begin, end in zip(settings, ends[:-1], ends[1:], strict=True)
        ]
    one = settings[0]
    traffic = traffic if request.by_group else drop_groups(traffic)
    rows = traffic.group_rows()
    if not request.by_group:
        rows = {None: rows[None]}
    folds = {group: request.samples.deal(traffic, own, one.window) for group, own in rows.items()}
    served = list_orders(traffic, one.serving.arrival, seed=one.options.mixed_seed)
    halved: list[list[ByGroup]] = []
    for number, (_, order) in enumerate(served):
        own_report = scale_progress(progress, number / len(served), (number + 1) / len(served))
        counted = [*count_each(traffic, settings, scale_progress(own_report, 0, COUNTING), order)]
        halved.append([{} for _ in settings])
        for at, (group, own) in enumerate(rows.items()):
            dealt = Dealt(traffic, own, find_places(order, own), folds[group])
            halvings_of = [
                _Halving(dealt, setting, counts[group], request.names)
                for setting, counts in zip(settings, counted, strict=True)
            ]
            begin = COUNTING + (1 - COUNTING) * at / len(rows)
            end = COUNTING + (1 - COUNTING) * (at + 1) / len(rows)
            _add_counts(dealt, halvings_of, scale_progress(own_report, begin, end))
            for figures, halving in zip(halved[-1], halvings_of, strict=True):
                figures[group] = halving.compute_figures()
    weights = [weight for weight, _ in served]
    return [_average_orders(weights, by_order) for by_order in zip(*halved, strict=True)]


def _average_orders(weights: Sequence[float], by_order: Sequence[ByGroup]) -> ByGroup:
    """Return the figures of traffic that arrives in orders of such weights."""
    if len(by_order) == 1:
        return by_order[0]
    weighed: ByGroup = {}
    for group, figures in by_order[0].items():
        weighed[group] = {}
        for name, figure in figures.items():
            value = float(np.dot(weights, [each[group][name].value for each in by_order]))
            sides = np.tensordot(weights, [each[group][name].sides for each in by_order], axes=1)
            weighed[group][name] = Halved(value, sides, figure.folds)
    return weighed


def _add_counts(dealt: Dealt, halvings_of: Sequence[_Halving], progress: Progress | None) -> None:
    """Add what folds have of windows to halvings of several placements.

    It is counted in the shortest windows, of which longer ones are made, and where folds share a
    window: of others all is known.
    """
    length = min(each.length for each in halvings_of)
    number = max(-(-len(dealt.items) // length), 1)
    is_read = np.zeros(number, dtype=bool)
    for each in halvings_of if dealt.folds.number > 1 else ():
        is_read |= each.is_shared.repeat(-(-each.length // length))[:number]
    counted = dealt.count(
        is_read,
        length,
        {id(each.setting.placement): each.setting for each in halvings_of},
        times=max(-(-each.length // length) for each in halvings_of),
        stays=any(each.is_crossing for each in halvings_of),
    )
    for run, cells in counted:
        for each in halvings_of:
            each.add(run, length, cells.get(id(each.setting.placement)))
        if progress is not None:
            progress(run.stop / number)


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
        self, dealt: Dealt, setting: Setting, counts: Counts, names: Collection[str]
    ) -> None:
        has_tokens = dealt.traffic.ordered
        self.setting, self._folds, self._counts = setting, dealt.folds, counts
        self.length = dealt.traffic.rows_in(setting.window or max(len(dealt.items), 1))
        self._tokens = dealt.by_fold(self.length)
        # What crosses is known of all windows together only.
        self.is_crossing = "crossing" in names and has_tokens and dealt.traffic.layers > 1
        self.is_shared = (np.count_nonzero(self._tokens, axis=1) > 1) | self.is_crossing
        self._pairs = (dealt.traffic.layers - 1) * (dealt.traffic.top_k or 1) ** 2
        if self.is_crossing:
            self._counts = replace(counts, crossed=np.zeros(len(self._tokens)))  # not known yet
        self._visits = np.maximum(counts.visits.sum(axis=0, dtype=np.float64), 1e-300)
        replay = CountsByOrder([(1.0, self._counts)], None, setting)
        self._figures: dict[str, Figure] = {}
        for name, figure in FIGURES.items():
            # Of counts, which experts tokens meet is known of all windows together only.
            is_known = figure.per == "window" or has_tokens
            is_asked = name in names and figure.windows is not None and is_known
            if is_asked and replay.steps(cast(Windows, figure.windows)):
                self._figures[name] = figure
        self._values = {name: each.value(replay) or 0.0 for name, each in self._figures.items()}
        first = choose_halvings(dealt.folds.number)
        bits = 1 << np.arange(dealt.folds.number)
        self._sides = (np.concatenate([first, ~first]) @ bits).tolist()
        # Of every figure its sums over windows of all sides, and of their weights.
        self._sums = {name: np.zeros((2, len(self._sides))) for name in self._figures}

    def add(self, run: slice, length: int, cells: Cells | None) -> None:
        """Add what sides have of a run of windows of so many items, of which these are made."""
        times, size = -(-self.length // length), self._counts.load[0].size
        end, step = -(-run.stop // times), max(CELLS // max(len(self._sides) * size, 1), 1)
        for first in range(run.start // times, end if self._sides else 0, step):
            windows = slice(first, min(first + step, end))
            sides = _core.Sides(self._tokens[windows], self._sides)
            _, tokens, lengths, of_side = sides.rows()
            counts = self._count_sides(sides, windows, times, cells)
            for name, figure in self._figures.items():
                assert figure.windows is not None
                table = figure.windows(counts, self.setting)
                assert table is not None
                value = table.reshape(*table.shape[:2], -1).sum(axis=2).mean(axis=1)
                weight = tokens / lengths * counts.is_full_window
                if figure.per == "token":
                    value, weight = value / lengths, tokens.astype(np.float64)
                self._sums[name] += np.stack([weight * value, weight])[:, of_side].sum(axis=1)

    def compute_figures(self) -> dict[str, Halved]:
        """Return all figures that have halves."""
        halved = {}
        for name, (above, below) in self._sums.items():
            with np.errstate(invalid="ignore"):
                sides = (above / below).reshape(2, -1)
            halved[name] = Halved(self._values[name], sides, self._folds)
        return halved

    def _count_sides(
        self, sides: _core.Sides, windows: slice, times: int, cells: Cells | None
    ) -> Counts:
        """Return counts of what sides have of windows, each scaled to all tokens of its window."""
        all_of, crossed = self._counts, None
        row, _, lengths, _ = sides.rows()
        window = windows.start + row.astype(np.int64)
        tables = {
            name: table[window].astype(np.float64)
            for name in ("load", "visits", "node_visits")
            if (table := getattr(all_of, name)) is not None
        }
        if cells is not None:
            ends = np.searchsorted(cells.window, [windows.start * times, windows.stop * times])
            own = slice(*ends.tolist())
            of_window = (cells.window[own] // times - windows.start).astype(np.uint32)
            for table, part in zip(tables.values(), cells.tables, strict=False):
                sides.add_up(of_window, cells.fold[own], part[own], table)
            if self.is_crossing:
                stays = cells.stays[own]
                own_windows = windows.stop - windows.start
                of_all_folds = np.bincount(of_window, stays.ravel(), own_windows)
                stay = of_all_folds[row].astype(np.float64)[:, None, None]
                sides.add_up(of_window, cells.fold[own], stays, stay)
                crossed = lengths - stay.ravel() / self._pairs
        load, active = tables["load"], None
        if all_of.active is not None:
            # An expert is idle if each of its device's tokens is of another one.
            experts = (self.setting.placement.slots >= 0).sum(axis=2)
            idle = np.clip(1 - all_of.active[window] / np.maximum(experts, 1), 0, 1)
            active = experts * (1 - idle ** (load / np.maximum(all_of.load[window], 1)))
        # Homes are known of all windows together, and stay what they are.
        dispatch = all_of.dispatch * (tables["visits"].sum(axis=0) / self._visits)[:, None, :]
        return replace(
            all_of,
            **tables,
            dispatch=dispatch,
            active=active,
            is_full_window=all_of.is_full_window[window],
            crossed=crossed,
        )
