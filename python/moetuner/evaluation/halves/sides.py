"""Add cells up to the counts of sides: those of its folds in a window, scaled to all of its tokens.

Sides that have the same folds in a window share a row of counts there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.halves.cells import Cells
from moetuner.evaluation.replay import Counts, Setting


def count_sides(
    sides: _core.Sides,
    windows: slice,
    counts: Counts,
    cells: Cells | None,
    setting: Setting,
    *,
    pairs: int,
) -> Counts:
    """Compute the counts of sides in a run of windows, scaled to all tokens of each window.

    Each row of the counts stands for a window and a set of its folds, those that one or more sides
    have there. A row begins as the counts of all traffic in the window (``counts``). Where other
    folds have tokens in the window too, the sums over the cells of the set replace it. Without
    ``cells`` no folds share a window of the run. A token has ``pairs`` of neighbouring layers'
    experts; 0 if those that cross are not counted.
    """
    window = windows.start + sides.rows()[0].astype(np.int64)
    tables = {
        name: table[window].astype(np.float64)
        for name in ("load", "visits", "node_visits")
        if (table := getattr(counts, name)) is not None
    }
    if cells is not None:
        for name, table in tables.items():
            sides.add_up(cells.window, cells.fold, getattr(cells, name), table)
    load, active = tables["load"], None
    if counts.active is not None:
        # An expert is idle if every token of its device goes to others, independently.
        experts = (setting.placement.slots >= 0).sum(axis=2)
        idle = np.clip(1 - counts.active[window] / np.maximum(experts, 1), 0, 1)
        active = experts * (1 - idle ** (load / np.maximum(counts.load[window], 1)))
    # Homes are counted over all windows together: every row has their shares.
    share = tables["visits"].sum(axis=0) / counts.total_visits
    return replace(
        counts,
        **tables,
        dispatch=counts.dispatch * share[:, None, :],
        active=active,
        is_full_window=counts.is_full_window[window],
        crossed=_count_crossings(sides, cells, pairs) if cells is not None and pairs else None,
    )


def _count_crossings(sides: _core.Sides, cells: Cells, pairs: int) -> NDArray[np.float64]:
    """Compute the crossing share of every token, summed by row [R]."""
    row_window, _, window_items, _ = sides.rows()
    stays_of_window = np.bincount(cells.window, cells.stays.ravel())
    stays = stays_of_window[row_window].astype(np.float64)[:, None, None]
    sides.add_up(cells.window, cells.fold, cells.stays, stays)
    return window_items - stays.ravel() / pairs
