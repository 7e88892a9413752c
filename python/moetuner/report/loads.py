"""Count the loads of a recording and of its parts once, for all that is measured of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moetuner.recording import Recording, compute_once
from moetuner.statistics import count_loads, sum_by_group

Loads = NDArray[np.uint64]


def count_part_loads(
    traffic: Recording, threads: int | None = None
) -> tuple[dict[str, Loads], Loads]:
    """Count the load [L,E] of every group that has tokens, and of both halves [2,L,E], once."""
    return compute_once(traffic, "loads of parts", lambda: _count(traffic, threads))


def _count(traffic: Recording, threads: int | None) -> tuple[dict[str, Loads], Loads]:
    groups: dict[str, Loads] = {}
    if traffic.group is not None and traffic.group.size:
        loads = sum_by_group(count_loads(traffic, threads=threads))
        groups = {
            name: load for name, load in zip(traffic.group_names, loads, strict=True) if load.any()
        }
    window = max(-(-traffic.length // 2), 1)
    load = count_loads(traffic, window=window, by_group=False, threads=threads).window_load
    halves = [half.sum(axis=0, dtype=np.uint64) for half in np.split(load, [len(load) // 2])]
    return groups, np.stack(halves)
