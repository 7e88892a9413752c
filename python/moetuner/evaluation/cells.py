"""What folds have of windows of some traffic: cells, from which sides of halves are added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner.evaluation.reading import Integers, Rows, read
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.samples import Folds
from moetuner.recording import Recording
from moetuner.serving.splits import EVEN
from moetuner.trace import as_trace

# Counts of cells that are in memory at once.
PARTS = 1 << 25


class Cells(NamedTuple):
    """What folds have of some of the shortest windows under a placement.

    Parameters
    ----------
    window, fold
        The window of every cell, rising, and its fold [C].
    tables
        Load and visits of devices, and visits of nodes [C,L,D or N].
    stays
        Pairs of neighbouring layers' experts that one device serves both [C,1,1].
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
        Which tokens of the trace these are, or windows of the table [n].
    place
        Where each of them arrives among these [n]; None as recorded.
    folds
        The fold of each of them.
    """

    traffic: Recording
    items: Integers
    place: Integers | None
    folds: Folds

    def window_of(self, run: slice, length: int) -> Integers:
        """Return the window of a run of items, in windows of so many."""
        place = np.arange(run.start, run.stop) if self.place is None else self.place[run]
        return place.astype(np.int64) // length

    def runs(self, windows: slice, length: int) -> list[slice]:
        """Return runs of items that hold all items of a run of windows."""
        first, end = windows.start * length, min(windows.stop * length, len(self.items))
        if self.place is not None:
            first, end = 0, len(self.items)
        return [slice(at, min(at + check.PIECE, end)) for at in range(first, end, check.PIECE)]

    def by_fold(self, length: int) -> NDArray[np.uint64]:
        """Count items by window and fold [W,F], in windows of so many items."""
        number, folds = max(-(-len(self.items) // length), 1), self.folds.number
        counts = np.zeros(number * folds, dtype=np.uint64)
        for run in self.runs(slice(0, number), length):
            cell = self.window_of(run, length) * folds + self.folds.fold[run]
            first = int(cell.min())
            times = np.bincount(cell - first).astype(np.uint64)
            counts[first : first + len(times)] += times
        return counts.reshape(number, folds)

    def count(
        self,
        is_read: NDArray[np.bool_],
        length: int,
        settings: dict[int, Setting],
        *,
        times: int,
        stays: bool,
    ) -> Iterator[tuple[slice, dict[int, Cells]]]:
        """Yield runs of windows of so many items, and what folds have of those that are read [W].

        It is counted under every placement at once, and forgotten before the next run. Runs are as
        long as what is counted of them fits, and several ``times`` windows long.
        """
        tokens = self.by_fold(length)
        sizes = sum(
            setting.placement.layers * (2 * setting.topology.devices + setting.topology.nodes)
            for setting in settings.values()
        )
        numbers = max(int(np.count_nonzero(tokens[is_read])) * sizes // len(tokens), 1)
        step = max(PARTS // numbers // times, 1) * times
        for first in range(0, len(tokens), step):
            run = slice(first, min(first + step, len(tokens)))
            windows = run.start + np.flatnonzero(is_read[run])
            yield run, self._count(windows, tokens, length, settings, stays=stays)

    def _count(
        self,
        windows: Integers,
        tokens: NDArray[np.uint64],
        length: int,
        settings: dict[int, Setting],
        *,
        stays: bool,
    ) -> dict[int, Cells]:
        """Count what every fold has of some windows, rising, under every placement."""
        if not windows.size:
            return {}
        fold_tokens = tokens[windows]
        window, fold = np.nonzero(fold_tokens)
        # The cell of every window and fold; windows that are not read have none.
        cell = np.full((windows[-1] + 1 - windows[0], self.folds.number), -1)
        cell[windows[window] - windows[0], fold] = np.arange(len(window))
        items, row = [], []
        for run in self.runs(slice(int(windows[0]), int(windows[-1]) + 1), length):
            at = self.window_of(run, length) - windows[0]
            inside = np.flatnonzero((at >= 0) & (at < len(cell)))
            cells = cell[at[inside], self.folds.fold[run][inside]]
            items.append(run.start + inside[cells >= 0])
            row.append(cells[cells >= 0].astype(np.uint32))
        item, rows = np.concatenate(items), np.concatenate(row)
        reader = Rows(
            as_trace(self.traffic),
            self.items[item],
            lambda run: rows[run],
            len(window),
            int(fold_tokens.max()),
            place=item if self.place is None else self.place[item],
        )
        # Copies serve by the place of a token, as evenly as those that take turns.
        replays = {
            key: _by_position(setting).begin_replay(reader, stays=stays)
            for key, setting in settings.items()
        }
        read([reader], threads=next(iter(settings.values())).options.threads)
        told = {}
        for key, replay in replays.items():
            *tables, _, _, stayed = replay.finish()
            own = windows[window].astype(np.uint32), fold.astype(np.uint8)
            told[key] = Cells(*own, tables, stayed[:, None, None])
        return told


def _by_position(setting: Setting) -> Setting:
    """Return a setting whose copies serve by position: as evenly as those that take turns."""
    if not setting.serving.rule.in_turns:
        return setting
    return replace(setting, serving=replace(setting.serving, split=EVEN))
