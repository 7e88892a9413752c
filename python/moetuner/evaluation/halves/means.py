"""Average figures over windows: those of all traffic, and those of both sides of every halving."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.figures import FIGURES, CountsByOrder
from moetuner.evaluation.halves.cells import Cells, Dealt, count_cells
from moetuner.evaluation.halves.halved import Halved
from moetuner.evaluation.halves.halvings import list_sides
from moetuner.evaluation.halves.sides import count_sides
from moetuner.evaluation.reading import Progress
from moetuner.evaluation.replay import Counts, Setting

Floats = NDArray[np.float64]

# Counts of halves of windows that are in memory at once.
SIDE_COUNTS_AT_ONCE = 1 << 20


def halve_figures(
    dealt: Dealt,
    settings: Sequence[Setting],
    counts: Sequence[Counts],
    names: Collection[str],
    progress: Progress | None,
) -> list[dict[str, Halved]]:
    """Compute the named figures, as far as halves have them, of all traffic and of its halves.

    ``counts`` are those of all traffic under every setting.
    """
    pairs = dealt.pairs if "crossing" in names else 0
    sizes = [dealt.measure_window(setting.window) for setting in settings]
    items_by_size = {size: dealt.count_items(size) for size in dict.fromkeys(sizes)}
    sides = list_sides(dealt.folds.number)
    windowed = [
        _Windowed(setting, counts_of_all, items_by_size[size], size, pairs)
        for setting, counts_of_all, size in zip(settings, counts, sizes, strict=True)
    ]
    values = [
        traffic.compute_figures(names, has_tokens=dealt.traffic.ordered) for traffic in windowed
    ]
    sums = [{name: np.zeros((2, len(sides))) for name in named} for named in values]
    # A single fold has no sides.
    runs = count_cells(dealt, items_by_size, settings, stays=pairs > 0) if sides else ()
    for run, cells_of_settings in runs:
        for traffic, cells, totals in zip(windowed, cells_of_settings, sums, strict=True):
            for windows in traffic.list_windows(run, len(sides)):
                for name, sums_of_windows in traffic.sum_figures(totals, windows, cells, sides):
                    totals[name] += sums_of_windows
        if progress is not None:
            progress(run.stop / len(dealt.items))
    with np.errstate(invalid="ignore"):  # a side may have no full window
        return [
            {
                name: Halved(value, (totals[name][0] / totals[name][1]).reshape(2, -1), dealt.folds)
                for name, value in named.items()
            }
            for named, totals in zip(values, sums, strict=True)
        ]


@dataclass(frozen=True)
class _Windowed:
    """All traffic in the windows of a setting.

    Parameters
    ----------
    setting, counts
        The setting, and the counts of all traffic under it.
    items
        Items by window and fold [W,F].
    size
        Items of a window.
    pairs
        Pairs of neighbouring layers' experts of a token; 0 where those that cross do not matter.
    """

    setting: Setting
    counts: Counts
    items: NDArray[np.uint64]
    size: int
    pairs: int

    def compute_figures(self, names: Collection[str], *, has_tokens: bool) -> dict[str, float]:
        """Compute the named figures that halves have, in the order of ``FIGURES``."""
        replay = CountsByOrder([(1.0, self.counts)], None, self.setting)
        values = {}
        for name, figure in FIGURES.items():
            # Load tables give the experts that tokens combine for all windows together only.
            has_halves = figure.per == "window" or has_tokens
            if name not in names or figure.windows is None or not has_halves:
                continue
            # A replay gives crossings for all windows together, and cells those of traffic.
            if replay.steps(figure.windows) or (name == "crossing" and self.pairs):
                values[name] = figure.value(replay) or 0.0
        return values

    def list_windows(self, run: slice, sides: int) -> Iterator[slice]:
        """Yield the windows of a run of items, as many at a time as fit memory."""
        end = -(-run.stop // self.size)
        step = max(SIDE_COUNTS_AT_ONCE // max(sides * self.counts.load[0].size, 1), 1)
        for first in range(run.start // self.size, end, step):
            yield slice(first, min(first + step, end))

    def sum_figures(
        self, names: Collection[str], windows: slice, cells: Cells | None, side_bits: list[int]
    ) -> Iterator[tuple[str, Floats]]:
        """Yield sums over windows of weight * value, and of weights, by side [2,2*H], of figures.

        ``cells`` are those of these windows, and maybe of others; None where no folds share one.
        """
        sides = _core.Sides(self.items[windows], side_bits)
        _, side_items, window_items, row_of_side = sides.rows()
        if cells is not None:
            cells = cells.select(windows, self.size)
        counts = count_sides(sides, windows, self.counts, cells, self.setting, pairs=self.pairs)
        for name in names:
            figure = FIGURES[name]
            assert figure.windows is not None
            table = figure.windows(counts, self.setting)
            assert table is not None
            # The sum over devices, where a table has them, and the mean over layers.
            value = table.reshape(*table.shape[:2], -1).sum(axis=2).mean(axis=1)
            weight = side_items / window_items * counts.is_full_window
            if figure.per == "token":
                value, weight = value / window_items, side_items.astype(np.float64)
            sums_of_rows = np.stack([weight * value, weight])
            yield name, sums_of_rows[:, row_of_side].sum(axis=1)
