"""Count the loads of a recording and of its parts once, for all that is measured of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner.recording import Recording, compute_once
from moetuner.statistics import count_loads

Loads = NDArray[np.uint64]


class PartLoads(NamedTuple):
    """Loads [L,E] of a recording's groups that have tokens, and of its earlier and later half."""

    groups: dict[str, Loads]
    early: Loads
    late: Loads

    @property
    def total(self) -> Loads:
        """Load [L,E] of all tokens."""
        return self.early + self.late


def count_part_loads(traffic: Recording, threads: int | None = None) -> PartLoads:
    """Count the loads of the parts of a recording; they are counted once."""
    return compute_once(traffic, "loads of parts", lambda: _count(traffic, threads))


def _count(traffic: Recording, threads: int | None) -> PartLoads:
    groups: dict[str, Loads] = {}
    if traffic.group is not None and traffic.group.size:
        windows = count_loads(traffic, threads=threads)
        assert windows.group is not None
        for number, name in enumerate(windows.group_names):
            load = windows.window_load[windows.group == number].sum(axis=0, dtype=np.uint64)
            if load.any():
                groups[name] = load
    window = max(-(-traffic.length // 2), 1)
    halves = count_loads(traffic, window=window, by_group=False, threads=threads).window_load
    early, late = (
        half.sum(axis=0, dtype=np.uint64) for half in np.split(halves, [len(halves) // 2])
    )
    return PartLoads(groups, early, late)
