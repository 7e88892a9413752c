"""Expert sets of all layers as the flat tables that files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.expert_sets import ExpertSets

# Sets of all layers one after the other: ids [sum N, K], counts [sum N], and how many a layer has
# [L].
NAMES = ("set_ids", "set_counts", "sets_per_layer")


def to_tables(sets: tuple[ExpertSets, ...] | None) -> dict[str, NDArray[Any] | None]:
    """Give the tables, each None without sets."""
    if sets is None:
        return dict.fromkeys(NAMES)
    tables = (
        np.concatenate([of.ids for of in sets]),
        np.concatenate([of.counts for of in sets]),
        np.array([len(of) for of in sets], dtype=np.uint64),
    )
    return dict(zip(NAMES, tables, strict=True))


def from_tables(tables: Mapping[str, NDArray[Any]]) -> tuple[ExpertSets, ...] | None:
    """Give the sets of every layer, None where the tables are missing.

    Raises
    ------
    ValueError
        If they do not belong together.
    """
    if not any(name in tables for name in NAMES):
        return None
    missing = [name for name in NAMES if name not in tables]
    if missing:
        raise ValueError(f"expert sets must have {', '.join(NAMES)}, got no {missing[0]}")
    ids, counts, sizes = (tables[name] for name in NAMES)
    fits = sizes.ndim == 1 and sizes.dtype.kind in "ui" and len(sizes) > 0
    if not fits or sum(sizes.tolist()) != len(ids) or min(sizes.tolist()) < 0:
        raise ValueError(f"sets_per_layer must add up to the {len(ids)} sets of set_ids")
    if counts.shape != ids.shape[:1]:
        raise ValueError(f"set_counts must be [{len(ids)}], got {list(counts.shape)}")
    cuts = np.cumsum(sizes[:-1].astype(np.int64))
    parts = zip(np.split(ids, cuts), np.split(counts, cuts), strict=True)
    return tuple(ExpertSets(*part) for part in parts)
