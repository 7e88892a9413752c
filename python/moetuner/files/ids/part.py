"""A part of a recording's ids: tokens one after the other, in memory or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import IdArray, IdType

Shape = tuple[int, int, int]
Numbers = NDArray[np.integer[Any]]


class Part(Protocol):
    """Valid expert ids [T,L,K] that are read in pieces."""

    @property
    def shape(self) -> Shape:
        """Sizes [T,L,K]."""

    @property
    def dtype(self) -> IdType:
        """Type of the pieces: uint8 or uint16."""

    @property
    def fresh(self) -> bool:
        """True if pieces are validated when they are read, so that they cannot have changed."""

    def shards(self, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Read all tokens in order, in pieces of at most ``max_bytes``.

        Ids in a file are validated on ``threads`` threads, all cores by default.
        """

    def chosen(self, items: Numbers, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Read numbered tokens [n], whose numbers rise, in pieces of at most ``max_bytes``."""


@dataclass(frozen=True, eq=False)
class IdsInMemory:
    """Valid ids in an array [T,L,K]."""

    array: IdArray
    fresh = False

    @property
    def shape(self) -> Shape:
        """Sizes [T,L,K]."""
        return cast(Shape, self.array.shape)

    @property
    def dtype(self) -> IdType:
        """Type of the pieces."""
        return self.array.dtype

    def shards(self, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Cut the array."""
        step = tokens_per_shard(self.shape, self.dtype, max_bytes)
        return (self.array[first : first + step] for first in range(0, len(self.array), step))

    def chosen(self, items: Numbers, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Take numbered tokens."""
        step = tokens_per_shard(self.shape, self.dtype, max_bytes)
        return (self.array[items[first : first + step]] for first in range(0, len(items), step))


def tokens_per_shard(shape: tuple[int, ...], dtype: np.dtype[Any], max_bytes: int) -> int:
    """Return tokens that fit ``max_bytes``, at least one."""
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    return max(1, max_bytes // (shape[1] * shape[2] * dtype.itemsize))
