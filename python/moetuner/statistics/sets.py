"""ExpertSets: the distinct expert sets of a layer, with the tokens that chose each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check
from moetuner import _core
from moetuner.files.contents import SET_TABLES
from moetuner.frozen import Frozen
from moetuner.statistics.tables import check_counts


@dataclass(frozen=True, eq=False, repr=False)
class ExpertSets(Frozen):
    """Distinct expert sets of one layer, with the tokens that chose each.

    The number of devices that a token visits depends on its whole set, not on pairs. Every set is
    here once: ids rise within a set, and sets are in the order of their ids.

    Memory is 2 K + 8 bytes for each distinct set, of which there are at most as many as tokens.

    Parameters
    ----------
    ids
        Expert ids [N,K]; those of a set differ.
    counts
        Tokens of every set [N]. Counts of equal sets are added.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> sets = mt.ExpertSets(np.array([[2, 3], [1, 0], [0, 1]]), np.array([5, 1, 1]))
    >>> sets.ids.tolist(), sets.counts.tolist()
    ([[0, 1], [2, 3]], [2, 5])
    """

    ids: NDArray[np.uint16]
    counts: NDArray[np.uint64]

    def __post_init__(self) -> None:
        ids = check.array_in("ids of expert sets", self.ids)
        fits = ids.ndim == 2 and ids.shape[1] > 0 and ids.dtype.kind in "ui"
        if not fits or (ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 16):
            raise ValueError(
                f"ids of expert sets must be [sets, top_k] from 0 to 65535, got {check.shown(ids)}"
            )
        counts = check_counts("counts of expert sets", self.counts, "[sets]").astype(np.uint64)
        if len(counts) != len(ids):
            raise ValueError(
                f"counts of expert sets must be whole numbers [{len(ids)}] like their ids, "
                f"got {check.shown(counts)}"
            )
        ids, counts = _core.merge_sets(np.ascontiguousarray(ids, dtype=np.uint16), counts)
        if (ids[:, 1:] == ids[:, :-1]).any():
            raise ValueError("ids of an expert set must differ")
        vars(self).update(ids=ids, counts=counts)

    @property
    def top_k(self) -> int:
        """Experts of a token, K."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.counts)

    def __add__(self, other: ExpertSets) -> ExpertSets:
        """Join the sets of both; counts of equal ones are added."""
        if not isinstance(other, ExpertSets):
            return NotImplemented
        if self.top_k != other.top_k:
            sizes = f"{self.top_k} and {other.top_k}"
            raise ValueError(f"expert sets must have the same number of experts, got {sizes}")
        ids, counts = [self.ids, other.ids], [self.counts, other.counts]
        return ExpertSets(np.concatenate(ids), np.concatenate(counts))

    def load(self, experts: int) -> NDArray[np.uint64]:
        """Return tokens of every expert [E]."""
        least = int(self.ids.max(initial=0)) + 1
        load = np.zeros(check.whole_number("experts", experts, lowest=least), dtype=np.uint64)
        np.add.at(load, self.ids, self.counts[:, None])
        return load


def to_tables(sets: tuple[ExpertSets, ...] | None) -> dict[str, NDArray[Any] | None]:
    """Return the tables of a file that hold the sets of layers; each is None without sets."""
    if sets is None:
        return dict.fromkeys(SET_TABLES)
    ids, counts = (
        np.concatenate(arrays) for arrays in zip(*((s.ids, s.counts) for s in sets), strict=True)
    )
    return dict(zip(SET_TABLES, (ids, counts, np.array([*map(len, sets)], np.uint64)), strict=True))


def from_tables(tables: Mapping[str, NDArray[Any]]) -> tuple[ExpertSets, ...] | None:
    """Return the sets of every layer; None if the tables are missing."""
    missing = [name for name in SET_TABLES if name not in tables]
    if 0 < len(missing) < len(SET_TABLES):
        raise ValueError(f"expert sets must have {', '.join(SET_TABLES)}, got no {missing[0]}")
    if missing:
        return None
    ids, counts, sizes = (tables[name] for name in SET_TABLES)
    fits = sizes.ndim == 1 and sizes.dtype.kind in "ui" and len(sizes) > 0
    if not fits or sum(sizes.tolist()) != len(ids) or min(sizes.tolist()) < 0:
        raise ValueError(f"sets_per_layer must add up to the {len(ids)} sets of set_ids")
    if counts.shape != ids.shape[:1]:
        raise ValueError(f"set_counts must be [{len(ids)}], got {list(counts.shape)}")
    cuts = np.cumsum(sizes[:-1].astype(np.int64))
    return tuple(map(ExpertSets, np.split(ids, cuts), np.split(counts, cuts)))
