"""Ids in another order than they are in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moetuner._checks import IdArray, IdType
from moetuner.files.ids.part import Numbers, Part, Shape, tokens_per_shard
from moetuner.files.ids.stored import GAP_BYTES

# Bytes of tokens in another order that are gathered at once.
GATHERED_BYTES = 64 << 20
# Where the tokens of an order lie all over a file, every part of the order reads most of the file.
# Then there are no more parts than this.
MOST_PARTS = 8


@dataclass(frozen=True, eq=False)
class IdsInOrder:
    """Tokens of other ids in another order, gathered when they are read.

    Parameters
    ----------
    ids
        The other ids.
    order
        Numbers of their tokens [n], each at most once.
    """

    ids: Part
    order: Numbers

    @property
    def shape(self) -> Shape:
        """Sizes [n,L,K]."""
        return (len(self.order), *self.ids.shape[1:])

    @property
    def dtype(self) -> IdType:
        """Type of the shards."""
        return self.ids.dtype

    @property
    def fresh(self) -> bool:
        """True if shards are validated when they are read."""
        return self.ids.fresh

    def shards(self, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Gather runs of tokens."""
        return self._gather(self.order, max_bytes, threads)

    def chosen(self, items: Numbers, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Gather numbered tokens [n]."""
        return self._gather(self.order[items], max_bytes, threads)

    def _gather(self, order: Numbers, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Read tokens of an order in runs of at most ``max_bytes``.

        The tokens of several runs are read together, in the order of the file.
        """
        _, layers, top_k = self.shape
        step = tokens_per_shard(self.shape, self.dtype, max_bytes)
        at_once = max(self._tokens_at_once // step, 1) * step
        for first in range(0, len(order), at_once):
            numbers = order[first : first + at_once]
            place = np.argsort(numbers)
            ids: Any = np.empty((len(numbers), layers, top_k), self.dtype)
            done = 0
            for piece in self.ids.chosen(numbers[place], max_bytes, threads):
                ids[place[done : done + len(piece)]] = piece
                done += len(piece)
                del piece  # else memory holds it while the next one is read
            last = (len(ids) - 1) // step * step
            for begin in range(0, last, step):
                yield ids[begin : begin + step]
            end = ids[last:].copy()
            del ids  # else memory holds it while the next ones are gathered
            yield end
            del end

    @cached_property
    def _tokens_at_once(self) -> int:
        """Number of tokens that are gathered at once: more where they lie all over the file."""
        row = self.shape[1] * self.shape[2] * self.dtype.itemsize
        # Memory also has each token's number and its place, 16 bytes.
        tokens = max(GATHERED_BYTES // (row + 16), 1)
        apart = np.diff(np.sort(self.order[:tokens]))
        read = int(apart[apart <= max(GAP_BYTES // row, 1)].sum())
        return max(tokens, self.ids.shape[0] // MOST_PARTS if read > 2 * tokens else 0)
