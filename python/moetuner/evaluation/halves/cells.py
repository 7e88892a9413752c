"""Count cells: a cell is the tokens of a window that are of one fold.

The counts of a half in a window are the sums of its cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner.evaluation.reading import Integers, RowReader, find_windows, read
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.samples import Folds
from moetuner.recording import Recording, labelling
from moetuner.serving.splits import EVEN
from moetuner.trace import as_trace

# Counts of cells that are in memory at once.
CELL_COUNTS_AT_ONCE = 1 << 25

# Items by window and fold [W,F], by the size of the windows.
ItemsBySize = Mapping[int, NDArray[np.uint64]]


class Cells(NamedTuple):
    """Counts of the cells of some windows under a placement.

    Parameters
    ----------
    size
        Items of a window.
    window, fold
        The window of every cell, rising, and its fold [C].
    load, visits, node_visits
        Load and visits of devices [C,L,D], and visits of nodes [C,L,N].
    stays
        Pairs of neighbouring layers' experts that are on one device [C,1,1]; none where these are
        not counted.
    """

    size: int
    window: NDArray[np.uint32]
    fold: NDArray[np.uint8]
    load: NDArray[Any]
    visits: NDArray[Any]
    node_visits: NDArray[Any]
    stays: NDArray[np.uint64]

    def select(self, windows: slice, size: int) -> Cells:
        """Return the cells of a run of windows of ``size`` items, counted from its first window.

        Each of these windows is one or several of those in which cells were counted.
        """
        multiple = -(-size // self.size)
        ends = np.searchsorted(self.window, [windows.start * multiple, windows.stop * multiple])
        chosen = slice(*ends.tolist())
        window = self.window[chosen] // multiple - windows.start
        return Cells(
            size,
            window.astype(np.uint32),
            self.fold[chosen],
            self.load[chosen],
            self.visits[chosen],
            self.node_visits[chosen],
            self.stays[chosen],
        )


@dataclass(frozen=True)
class Dealt:
    """Some tokens of a trace, or windows of a load table, that were dealt into folds.

    Parameters
    ----------
    traffic
        The trace, or the table.
    items
        Numbers of the tokens in the trace, or of the windows in the table [n].
    place
        Position of every item in the order in which they arrive [n]; None as recorded.
    folds
        The fold of every item.
    """

    traffic: Recording
    items: Integers
    place: Integers | None
    folds: Folds

    @property
    def pairs(self) -> int:
        """Pairs of neighbouring layers' experts of a token; 0 of a load table."""
        if not self.traffic.ordered:
            return 0
        return (self.traffic.layers - 1) * as_trace(self.traffic).top_k ** 2

    def measure_window(self, window: int | None) -> int:
        """Return the items of a window of so many tokens; None is all of them."""
        return self.traffic.rows_in(window or max(len(self.items), 1))

    def list_runs(self, windows: slice, size: int) -> list[slice]:
        """Return runs of items that hold all items of a run of windows, and maybe others."""
        begin, end = windows.start * size, min(windows.stop * size, len(self.items))
        if self.place is not None:
            begin, end = 0, len(self.items)
        firsts = range(begin, end, labelling.PIECE)
        return [slice(first, min(first + labelling.PIECE, end)) for first in firsts]

    def count_items(self, size: int) -> NDArray[np.uint64]:
        """Count items by window and fold [W,F], in windows of ``size`` items."""
        number, folds = max(-(-len(self.items) // size), 1), self.folds.number
        counts = np.zeros(number * folds, dtype=np.uint64)
        for run in self.list_runs(slice(0, number), size):
            cell = find_windows(run, self.place, size) * folds + self.folds.fold[run]
            first = int(cell.min())
            counts_of_run = np.bincount(cell - first).astype(np.uint64)
            counts[first : first + len(counts_of_run)] += counts_of_run
        return counts.reshape(number, folds)


def count_cells(
    dealt: Dealt, items_by_size: ItemsBySize, settings: Sequence[Setting], *, stays: bool
) -> Iterator[tuple[slice, list[Cells | None]]]:
    """Count the cells of windows that several folds share, under every setting.

    A window of one fold alone has the counts of all traffic. ``stays`` counts pairs that stay, too,
    which are not known by window otherwise, so the cells of all windows are counted.

    Cells are counted in the shortest windows, of which longer ones are made. Yields runs of windows
    of all sizes, as runs of items in the order in which they arrive, and the cells of every setting
    there; None where no folds share a window. Runs are as long as memory allows: cells are
    forgotten before the next run.
    """
    size, longest = min(items_by_size), max(items_by_size)
    items = items_by_size[size]
    number, multiple = len(items), -(-longest // size)
    is_counted = np.full(number, stays)
    for size_of_window, items_of_window in items_by_size.items():
        is_shared = np.count_nonzero(items_of_window, axis=1) > 1
        is_counted |= is_shared.repeat(-(-size_of_window // size))[:number]
    setting_of = {id(setting.placement): setting for setting in settings}
    counts_of_cell = sum(
        setting.placement.layers * (2 * setting.topology.devices + setting.topology.nodes)
        for setting in setting_of.values()
    )
    cells = int(np.count_nonzero(items[is_counted]))
    counts_of_window = max(cells * counts_of_cell // number, 1)
    step = max(CELL_COUNTS_AT_ONCE // counts_of_window // multiple, 1) * multiple
    for first in range(0, number, step):
        run = slice(first, min(first + step, number))
        windows = run.start + np.flatnonzero(is_counted[run])
        counted = _count_windows(dealt, windows, items, size, setting_of, stays=stays)
        items_of_run = slice(run.start * size, min(run.stop * size, len(dealt.items)))
        yield items_of_run, [counted.get(id(setting.placement)) for setting in settings]


def _count_windows(
    dealt: Dealt,
    windows: Integers,
    items: NDArray[np.uint64],
    size: int,
    setting_of: Mapping[int, Setting],
    *,
    stays: bool,
) -> dict[int, Cells]:
    """Count the cells of some windows, rising; ``items`` [W,F] is by window and fold.

    Returns cells by the key of their setting; none without windows.
    """
    if not windows.size:
        return {}
    cell_row, cell_fold = np.nonzero(items[windows])
    cell_window = windows[cell_row]
    item, cell = _find_cells(dealt, cell_window, cell_fold, size)
    reader = RowReader(
        as_trace(dealt.traffic),
        dealt.items[item],
        lambda run: cell[run],
        len(cell_window),
        int(items[windows].max()),
        place=item if dealt.place is None else dealt.place[item],
    )
    replays = {
        key: _split_by_position(setting).begin_replay(reader, stays=stays)
        for key, setting in setting_of.items()
    }
    read([reader], threads=next(iter(setting_of.values())).options.threads)
    counted = {}
    for key, replay in replays.items():
        load, visits, node_visits, _, _, stay_counts = replay.finish()
        counted[key] = Cells(
            size,
            cell_window.astype(np.uint32),
            cell_fold.astype(np.uint8),
            load,
            visits,
            node_visits,
            stay_counts[:, None, None],
        )
    return counted


def _find_cells(
    dealt: Dealt, cell_window: Integers, cell_fold: Integers, size: int
) -> tuple[Integers, NDArray[np.uint32]]:
    """Return the items [n] of cells, rising, and the number of each one's cell [n].

    Windows [C] of cells are rising, and of ``size`` items.
    """
    first, last = int(cell_window[0]), int(cell_window[-1])
    # The number of every window's and fold's cell; -1 in windows that are not counted.
    cell_number = np.full((last + 1 - first, dealt.folds.number), -1)
    cell_number[cell_window - first, cell_fold] = np.arange(len(cell_window))
    items, cells = [], []
    for run in dealt.list_runs(slice(first, last + 1), size):
        window = find_windows(run, dealt.place, size) - first
        inside = np.flatnonzero((window >= 0) & (window < len(cell_number)))
        cell = cell_number[window[inside], dealt.folds.fold[run][inside]]
        items.append(run.start + inside[cell >= 0])
        cells.append(cell[cell >= 0].astype(np.uint32))
    return np.concatenate(items), np.concatenate(cells)


def _split_by_position(setting: Setting) -> Setting:
    """Return a setting whose copies serve by position, where they take turns.

    Both share tokens as evenly, but whose turn it is depends on tokens of other folds.
    """
    if not setting.serving.rule.in_turns:
        return setting
    return replace(setting, serving=replace(setting.serving, split=EVEN))
