"""Check and add counts that engines record; turn counts of slots into counts of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT, LAYER_LIMIT
from moetuner.files import naming
from moetuner.formats.arrays import Dump
from moetuner.formats.hints import Hints
from moetuner.statistics import RoutingStatistics

# Limits of an engine's sums, for INPUT's description.
CAUTION = (
    "Sums over many steps tell which experts are busy, but not how far single steps are from them, "
    "nor which experts are chosen together or one after the other."
)
# Limit of a single count, excluded. Sums must stay below 2**63, as in statistics.
COUNT_LIMIT = 1 << 48
# Cells that a table may always have, and cells for each count in a file: a token with one of 128
# experts leaves 127 cells empty.
FREE_CELLS, CELLS_PER_ENTRY = 1 << 22, 128


def counts_in(name: str, array: NDArray[Any]) -> NDArray[np.int64]:
    """Return counts in 64 bits; raise unless they are whole, at least 0 and below 2**48."""
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be counts, got {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "f":
        array = array.astype(np.float64, copy=False)  # 16 bits do not hold the limit
        _refuse(f"{name} must be whole numbers of tokens", array, array != np.floor(array))
    rule = f"{name} must be counts from 0 to 2**48"
    _refuse(rule, array, (array < 0) | (array >= COUNT_LIMIT))
    return array.astype(np.int64, copy=False)


def _refuse(rule: str, array: NDArray[Any], wrong: NDArray[np.bool_]) -> None:
    """Raise if a value is wrong, with the first such value and its place."""
    if wrong.any():
        place = np.unravel_index(int(np.argmax(wrong)), array.shape)
        where = f" at {[*map(int, place)]}" if place else ""
        raise ValueError(f"{rule}, got {array[place]}{where}")


def check_filled(entries: int, shape: tuple[int, int, int]) -> None:
    """Check that a table [windows, layers, experts] is not far larger than its counts.

    Otherwise a few bytes of a file, such as one large number, would decide on the memory.
    """
    windows, layers, experts = shape
    if layers > LAYER_LIMIT or experts > EXPERT_LIMIT:
        raise ValueError(
            f"must have at most {LAYER_LIMIT} layers and {EXPERT_LIMIT} experts, got {layers} and "
            f"{experts}"
        )
    if prod(shape) > max(FREE_CELLS, CELLS_PER_ENTRY * entries):
        raise ValueError(
            f"counts must fill their table, got {entries} counts for {windows} windows of {layers} "
            f"layers x {experts} experts"
        )


def make_statistics(
    table: NDArray[Any], hints: Hints, moe: list[int] | None = None
) -> RoutingStatistics:
    """Make statistics of counts [W,hidden,E] or [hidden,E], of the layers ``moe`` only."""
    if table.ndim not in (2, 3) or 0 in table.shape:
        rule = "[layers, experts] or [windows, layers, experts]"
        raise ValueError(f"counts must be {rule}, got {list(table.shape)}")
    if not table.any():
        raise ValueError(
            "every count is zero, so nothing was recorded: send traffic while the recorder runs, "
            "then dump it"
        )
    statistics = RoutingStatistics.from_load(counts_in("counts", table))
    check_filled(table.size, (statistics.windows, statistics.layers, statistics.num_experts))
    hints.check_experts(statistics.num_experts)
    statistics = drop_dense_layers(statistics, moe)
    hints.check_axes(statistics)
    return statistics


def stack_windows(windows: Sequence[NDArray[Any]], hints: Hints) -> RoutingStatistics:
    """Make statistics of windows [hidden,E], without the rows of dense layers."""
    if not windows:
        raise ValueError("must hold the counts of at least one window, got none")
    load = np.stack(windows)
    return make_statistics(load, hints, hints.moe_layers(load.shape[1]))


def drop_dense_layers(
    statistics: RoutingStatistics, moe: list[int] | None = None
) -> RoutingStatistics:
    """Return a load table without dense layers: all but ``moe``, by default those with zeros."""
    if moe is None:
        moe = np.flatnonzero(statistics.total_load.any(axis=1)).tolist()
        moe = moe or [*range(statistics.layers)]
    dense = tuple(sorted(set(range(statistics.layers)) - set(moe)))
    left_out = (statistics.layers, dense) if dense else None
    return replace(statistics, window_load=statistics.window_load[:, moe], left_out=left_out)


def add_up(total: NDArray[Any] | None, counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return the sum of a total and counts; None is an empty total."""
    if total is None:
        return counts.astype(np.int64)
    if total.shape != counts.shape:
        raise ValueError(
            f"counts must be {list(total.shape)} like those before, got {list(counts.shape)}"
        )
    if int(total.max(initial=0)) + int(counts.max(initial=0)) >= 1 << 63:
        raise ValueError("counts must add up to less than 2**63")
    return total.astype(np.int64, copy=False) + counts.astype(np.int64, copy=False)


def add_window(windows: list[NDArray[np.int64]], window: NDArray[np.int64]) -> None:
    """Append counts [L,E] to windows; raise unless their sizes are those of the ones before."""
    if windows and window.shape != windows[0].shape:
        raise ValueError(
            f"must have layers and experts of the windows before, {list(windows[0].shape)}, got "
            f"{list(window.shape)}"
        )
    windows.append(window)


def sum_ranks(
    dumps: Mapping[Path, Dump], hints: Hints, stack: Callable[[Dump], NDArray[Any]]
) -> NDArray[np.int64]:
    """Add the counts of the files of all ranks, of which ``stack`` makes tables [W,L,E]."""
    total: Any = None
    for path, dump in dumps.items():
        with naming(path):
            load = counts_in("counts", stack(dump))
            hints.check_experts(load.shape[2])
            total = add_up(total, load)
    return cast("NDArray[np.int64]", total)


def sum_by_expert(
    load: NDArray[np.int64], slots: NDArray[np.int64], experts: int | None
) -> NDArray[np.int64]:
    """Add up loads of slots [..,L,P] by the expert [L,P] that is in them: [..,L,E]."""
    layers, count = slots.shape
    if load.shape[-2:] != slots.shape:
        raise ValueError(
            f"loads and slots must have the same layers and slots, got {list(load.shape[-2:])} and "
            f"{list(slots.shape)}"
        )
    end = int(slots.max(initial=-1)) + 1
    experts = max(end, 1) if experts is None else experts
    if end > experts or int(slots.min(initial=0)) < -1:
        raise ValueError(
            f"slots must hold experts from 0 to {experts - 1}, got {slots.min()} to {end - 1}"
        )
    if experts > count:
        # Else a single number of a file would decide how large the table is.
        raise ValueError(
            f"slots must hold every expert of a layer, got {count} for {experts} experts"
        )
    if int(load.max(initial=0)) * count >= 1 << 63:
        raise ValueError(f"loads of {count} slots must add up to less than 2**63, got {load.max()}")
    # Empty slots, -1, are the last column, which is left out.
    table = np.zeros((*load.shape[:-1], experts + 1), dtype=np.int64)
    for layer in range(layers):
        np.add.at(table[..., layer, :].T, slots[layer], load[..., layer, :].T)
    return table[..., :experts]
