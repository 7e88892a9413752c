"""Expert ids [T,L,K]: parts in memory, in files, or in another order, and selections of them.

Every kind gives valid shards in order, and one array. Ids in a file stay there until a shard of
them is read, and are validated then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import U8, U16, IdArray, IdType, check_sizes, valid
from moetuner.files.ids.order import IdsInOrder
from moetuner.files.ids.part import IdsInMemory, Numbers, Part, Shape
from moetuner.files.ids.stored import IdsInFile
from moetuner.files.safetensors import TensorInFile, size_holding
from moetuner.frozen import freeze

LeftOut = tuple[int, tuple[int, ...]]
Mask = NDArray[np.bool_] | None
Layers = NDArray[np.intp] | None

# Bytes of an array up to which a selection is copied at once: a copy is read faster.
COPIED_BYTES = 64 << 20
# Tokens of a block whose marks are counted together, to find a token by its number among the marked
# ones.
MARKS = 1 << 12


@dataclass(frozen=True, eq=False)
class Ids:
    """Expert ids: parts one after the other, of which some tokens and layers are selected.

    Parameters
    ----------
    parts
        Ids in memory, in files, in another order, and selections, of the same layers and top-k.
    tokens, layers
        Marked tokens and numbered layers of the parts; None selects all.
    left_out
        Number of hidden layers that were recorded, and the numbers of the dense ones among them,
        which were left out; None where all have experts, or dense layers are unknown.
    """

    parts: tuple[Part, ...]
    tokens: Mask = None
    layers: Layers = None
    left_out: LeftOut | None = None

    @classmethod
    def of(cls, values: NDArray[np.generic], num_experts: int) -> Ids:
        """Check ids [T,L,K] and wrap them; uint8 and uint16 are not copied if C-contiguous."""
        check_sizes(values.shape, values.dtype, num_experts)
        return in_memory(valid(values, num_experts))

    @classmethod
    def in_file(cls, path: Path, stored: TensorInFile, num_experts: int) -> Ids:
        """Wrap an array in a file after checking its sizes and type; no id is read."""
        check_sizes(stored.shape, stored.dtype, num_experts)
        size = size_holding(path, stored)
        return cls((IdsInFile(path, stored, num_experts, size, path.stat().st_ino),))

    @property
    def shape(self) -> Shape:
        """Sizes [T,L,K]."""
        _, layers, top_k = self.parts[0].shape
        tokens = sum(part.shape[0] for part in self.parts)
        return (
            tokens if self.tokens is None else int(np.count_nonzero(self.tokens)),
            layers if self.layers is None else len(self.layers),
            top_k,
        )

    @property
    def dtype(self) -> IdType:
        """Type of the shards: uint8 or uint16."""
        return U16 if any(part.dtype == U16 for part in self.parts) else U8

    @property
    def fresh(self) -> bool:
        """True if shards are validated when they are read, so that they cannot have changed."""
        return all(part.fresh for part in self.parts)

    @property
    def whole(self) -> Part | None:
        """The only part, if all of it is selected."""
        is_whole = len(self.parts) == 1 and self.tokens is None and self.layers is None
        return self.parts[0] if is_whole else None

    def shards(self, max_bytes: int, threads: int | None = None) -> Iterator[IdArray]:
        """Read valid runs of tokens [t,L,K], C-contiguous, in order, none of them empty.

        Ids in a file are validated on ``threads`` threads, all cores by default.
        """
        first = 0
        for part in self.parts:
            for shard in part.shards(max_bytes, threads):
                marks = None if self.tokens is None else self.tokens[first : first + len(shard)]
                first += len(shard)
                if marks is None or marks.any():
                    selected: Any = _select(shard, marks, self.layers)
                    yield selected.astype(self.dtype, copy=False)
                    del selected
                del shard  # else memory holds it while the next one is made

    def chosen(
        self, items: Numbers, max_bytes: int, threads: int | None = None
    ) -> Iterator[IdArray]:
        """Read the valid ids [t,L,K] of numbered tokens [n], whose numbers rise, in pieces."""
        places = items if self.tokens is None else self._places_of(items)
        first = 0
        for part in self.parts:
            # numpy would copy numbers of another type before it looks for one among them.
            begin = bisect_left(places, first)
            in_part = slice(begin, bisect_left(places, first + part.shape[0], begin))
            within = places[in_part] - first
            first += part.shape[0]
            for piece in part.chosen(within, max_bytes, threads):
                selected: Any = _select(piece, None, self.layers)
                yield selected.astype(self.dtype, copy=False)
                del selected, piece  # else memory holds them while the next one is read

    @cached_property
    def _marked_before(self) -> NDArray[np.int64]:
        """Number of marked tokens before every block of ``MARKS`` tokens."""
        assert self.tokens is not None
        starts = np.arange(0, len(self.tokens), MARKS)
        counts = np.add.reduceat(self.tokens, starts, dtype=np.int64) if len(starts) else starts
        before: NDArray[np.int64] = np.cumsum(counts) - counts
        return before

    def _places_of(self, items: Numbers) -> Numbers:
        """Return the places [n] in the parts of marked tokens, given their rising numbers [n].

        Numbers count the marked tokens only.
        """
        if not len(items):
            return items
        assert self.tokens is not None
        before = self._marked_before
        first, last = np.searchsorted(before, items[[0, -1]], "right") - 1
        marked = np.flatnonzero(self.tokens[first * MARKS : (last + 1) * MARKS])
        places: NDArray[np.int64] = first * MARKS + marked[items - before[first]]
        return places

    def array(self) -> IdArray:
        """Return all ids [T,L,K]; a single array in a file is mapped, and not validated."""
        if isinstance(self.whole, IdsInFile) and self.whole.stored.dtype == self.dtype:
            return self.whole.mapped()
        return self.valid_array()

    def valid_array(self) -> IdArray:
        """Return all ids [T,L,K] in memory, validated; an array in memory is not copied."""
        if isinstance(self.whole, IdsInMemory):
            return self.whole.array
        array: IdArray = np.empty(self.shape, dtype=self.dtype)
        first = 0
        for shard in self.shards(1 << 24):
            array[first : first + len(shard)] = shard
            first += len(shard)
        return array

    def select(self, tokens: Mask, layers: Layers) -> Ids:
        """Select the marked tokens and the numbered layers; None selects all.

        A selection of a large array, or of a file, is copied when it is read.
        """
        small = self._small_array
        if small is not None:
            return in_memory(_select(small, tokens, layers))
        return Ids((self,), tokens, layers)

    def reorder(self, order: Numbers) -> Ids:
        """Return the numbered tokens [n] in this order.

        Tokens of a large array, or of a file, are copied when they are read.
        """
        small = self._small_array
        if small is not None:
            return in_memory(small[order])
        return Ids((IdsInOrder(self, freeze(order)),))

    @property
    def _small_array(self) -> IdArray | None:
        """All ids, if they are one array in memory that is small enough to be copied at once."""
        if isinstance(self.whole, IdsInMemory) and self.whole.array.nbytes <= COPIED_BYTES:
            return self.whole.array
        return None


def read_ahead(pieces: Iterator[IdArray]) -> Iterator[IdArray]:
    """Yield pieces of a file; a thread reads the next one while the caller works on this one."""
    from concurrent.futures import ThreadPoolExecutor  # which imports logging

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = reader.submit(next, pieces, None)
            yield piece
            del piece  # else memory holds it while the next but one is read


def joined(parts: tuple[Ids, ...]) -> Ids:
    """Join ids one after the other; they become one array if all are in memory."""
    together = Ids(parts)
    if all(isinstance(part.whole, IdsInMemory) for part in parts):
        return in_memory(together.array())
    return together


def _select(ids: IdArray, tokens: Mask, layers: Layers) -> IdArray:
    if tokens is not None and not tokens.all():
        ids = ids[tokens]
    return np.ascontiguousarray(ids if layers is None else np.take(ids, layers, axis=1))


def in_memory(ids: IdArray) -> Ids:
    """Wrap valid ids [T,L,K] that are in memory."""
    return Ids((IdsInMemory(cast(IdArray, freeze(cast("NDArray[np.generic]", ids)))),))
