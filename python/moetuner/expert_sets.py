"""ExpertSets: which experts tokens chose together in a layer, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core


@dataclass(frozen=True, eq=False)
class ExpertSets:
    """Distinct expert sets of one layer, with the tokens that chose each.

    How many devices a token visits depends on its whole set, not on pairs. However it was made, it
    holds every set once: ids rise within a set, and sets are in the order of their ids.

    Memory is 2 K + 8 bytes for each distinct set, of which there are at most as many as tokens.

    Parameters
    ----------
    ids
        Expert ids [N,K]; those of a set differ.
    counts
        Tokens of every set [N]. Counts of equal sets are added.
    """

    ids: NDArray[np.uint16]
    counts: NDArray[np.uint64]

    def __post_init__(self) -> None:
        ids, counts = np.asarray(self.ids), np.asarray(self.counts)
        if ids.ndim != 2 or ids.shape[1] == 0 or not _whole(ids, 1 << 16):
            raise ValueError(
                f"ids of expert sets must be [sets, top_k] from 0 to 65535, got {_kind(ids)}"
            )
        if counts.shape != ids.shape[:1] or not _whole(counts, 1 << 63):
            raise ValueError(
                f"counts of expert sets must be whole numbers [{len(ids)}], got {_kind(counts)}"
            )
        if not float(counts.sum(dtype=np.float64)) < 2.0**63:
            raise ValueError("counts of expert sets must add up to less than 2**63")
        ids, counts = _core.merge_sets(
            np.ascontiguousarray(ids, dtype=np.uint16),
            np.ascontiguousarray(counts, dtype=np.uint64),
        )
        if (ids[:, 1:] == ids[:, :-1]).any():
            raise ValueError("ids of an expert set must differ")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "counts", counts)

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
            raise ValueError(
                "expert sets must have the same number of experts, got "
                f"{self.top_k} and {other.top_k}"
            )
        return ExpertSets(
            np.concatenate([self.ids, other.ids]), np.concatenate([self.counts, other.counts])
        )

    def load(self, experts: int) -> NDArray[np.uint64]:
        """Tokens of every expert [E]."""
        load = np.zeros(experts, dtype=np.uint64)
        np.add.at(load, self.ids, self.counts[:, None])
        return load


def _whole(array: NDArray[Any], end: int) -> bool:
    """Whether all are integers from 0 to ``end``, excluded."""
    if array.dtype.kind not in "ui":
        return False
    return not array.size or (int(array.min()) >= 0 and int(array.max()) < end)


def _kind(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
