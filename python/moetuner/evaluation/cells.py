"""Counts of cells: a cell is the tokens of a window that are of one fold.

The counts of a half in a window are the sums of its cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Cells(NamedTuple):
    """Counts of the cells of some windows under a placement.

    Parameters
    ----------
    window, fold
        The window of every cell, rising, and its fold [C].
    tables
        Load and visits of devices, and visits of nodes [C,L,D or N].
    stays
        Pairs of neighbouring layers' experts that are on one device [C,1,1].
    """

    window: NDArray[np.uint32]
    fold: NDArray[np.uint8]
    tables: Sequence[NDArray[Any]]
    stays: NDArray[np.uint64]


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
        self,
        is_counted: NDArray[np.bool_],
        size: int,
        setting_of: dict[int, Setting],
        *,
        multiple: int,
        stays: bool,
    ) -> Iterator[tuple[slice, dict[int, Cells]]]:
        """Count the cells of marked windows [W], under the setting of every placement.

        Yields runs of windows of ``size`` items, and the cells of those that are marked, by the key
        of their setting; cells are forgotten before the next run. Runs are as long as memory
        allows, and start at a ``multiple`` of windows. ``stays`` counts pairs that stay, too.
        """
        items = self.count_items(size)
        counts_of_cell = sum(
            setting.placement.layers * (2 * setting.topology.devices + setting.topology.nodes)
            for setting in setting_of.values()
        )
        cells = int(np.count_nonzero(items[is_counted]))
        counts_of_window = max(cells * counts_of_cell // len(items), 1)
        step = max(CELL_COUNTS_AT_ONCE // counts_of_window // multiple, 1) * multiple
        for first in range(0, len(items), step):
            run = slice(first, min(first + step, len(items)))
            windows = run.start + np.flatnonzero(is_counted[run])
            yield run, self._count_cells_of(windows, items, size, setting_of, stays=stays)

    def _count_cells_of(
        self,
        windows: Integers,
        items: NDArray[np.uint64],
        size: int,
        setting_of: dict[int, Setting],
        *,
        stays: bool,
    ) -> dict[int, Cells]:
        """Count the cells of some windows, rising; ``items`` [W,F] is by window and fold."""
        if not windows.size:
            return {}
        cell_row, cell_fold = np.nonzero(items[windows])
        cell_window, first_window = windows[cell_row], windows[0]
        # The number of every window's and fold's cell; -1 in windows that are not counted.
        cell_number = np.full((windows[-1] + 1 - first_window, self.folds.number), -1)
        cell_number[cell_window - first_window, cell_fold] = np.arange(len(cell_window))
        chosen_items, cells_of_items = [], []
        for run in self.list_runs(slice(int(first_window), int(windows[-1]) + 1), size):
            window = find_windows(run, self.place, size) - first_window
            inside = np.flatnonzero((window >= 0) & (window < len(cell_number)))
            cell = cell_number[window[inside], self.folds.fold[run][inside]]
            chosen_items.append(run.start + inside[cell >= 0])
            cells_of_items.append(cell[cell >= 0].astype(np.uint32))
        item, row = np.concatenate(chosen_items), np.concatenate(cells_of_items)
        reader = RowReader(
            as_trace(self.traffic),
            self.items[item],
            lambda run: row[run],
            len(cell_window),
            int(items[windows].max()),
            place=item if self.place is None else self.place[item],
        )
        replays = {
            key: _split_by_position(setting).begin_replay(reader, stays=stays)
            for key, setting in setting_of.items()
        }
        read([reader], threads=next(iter(setting_of.values())).options.threads)
        counted = {}
        for key, replay in replays.items():
            *tables, _, _, stay_counts = replay.finish()
            counted[key] = Cells(
                cell_window.astype(np.uint32),
                cell_fold.astype(np.uint8),
                tables,
                stay_counts[:, None, None],
            )
        return counted


def _split_by_position(setting: Setting) -> Setting:
    """Return a setting whose copies serve by position, where they take turns.

    Both share tokens as evenly, but whose turn it is depends on tokens of other folds.
    """
    if not setting.serving.rule.in_turns:
        return setting
    return replace(setting, serving=replace(setting.serving, split=EVEN))
