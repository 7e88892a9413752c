"""Rows of a sparse matrix with their bounds, from lists of entries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix, one after the other (CSR)."""

    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    start: NDArray[np.int32]
    index: NDArray[np.int32]
    value: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        lower: ArrayLike,
        upper: ArrayLike,
        row: ArrayLike,
        column: ArrayLike,
        value: ArrayLike,
        columns: int,
    ) -> Rows:
        """Sort entries (row, column, value) into rows; arguments broadcast, see `Ilp.add_rows`."""
        low, high = np.broadcast_arrays(
            np.atleast_1d(np.asarray(lower, dtype=np.float64)), np.asarray(upper, dtype=np.float64)
        )
        row_of, column_of, entry = np.broadcast_arrays(
            np.asarray(row, dtype=np.int64),
            np.asarray(column, dtype=np.int64),
            np.asarray(value, dtype=np.float64),
        )
        for name, ids, n in (("row", row_of, len(low)), ("column", column_of, columns)):
            if ids.size and (ids.min() < 0 or ids.max() >= n):
                found = f"{ids.min()} to {ids.max()}"
                raise ValueError(f"{name} must be from 0 to {n - 1}, got {found}")
        if not np.isfinite(entry).all() or np.isnan(low).any() or np.isnan(high).any():
            raise ValueError("rows must have finite entries and bounds that are numbers")
        row_of, column_of, entry = row_of.ravel(), column_of.ravel(), entry.ravel()
        order = np.lexsort((column_of, row_of))
        start = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(low)))])
        return cls(
            np.ascontiguousarray(low),
            np.ascontiguousarray(high),
            start.astype(np.int32),
            column_of[order].astype(np.int32),
            np.ascontiguousarray(entry[order]),
        )

    @classmethod
    def all(cls, parts: list[Rows]) -> Rows:
        """Put rows below each other."""
        none, no_index = np.zeros(0), np.zeros(0, np.int32)
        empty = cls(none, none, np.zeros(1, np.int32), no_index, none)
        parts = [empty, *parts]
        first = np.cumsum([0, *(len(part.index) for part in parts[:-1])])
        starts = [part.start[:-1] + at for part, at in zip(parts, first, strict=True)]
        entries = sum(len(part.index) for part in parts)
        return cls(
            np.concatenate([part.lower for part in parts]),
            np.concatenate([part.upper for part in parts]),
            np.concatenate([*starts, [entries]]).astype(np.int32),
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.value for part in parts]),
        )

    def times(self, values: NDArray[np.float64], *, absolute: bool = False) -> NDArray[np.float64]:
        """Multiply with some values [columns]; or sum up the sizes of the terms."""
        terms = self.value * values[self.index]
        row = np.repeat(np.arange(len(self.lower)), np.diff(self.start))
        sums: NDArray[np.float64] = np.zeros(len(self.lower))
        np.add.at(sums, row, np.abs(terms) if absolute else terms)
        return sums
