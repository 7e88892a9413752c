"""Expert ids [T,L,K] in memory or in a file; selections, sequences and orders of them.

Every kind gives valid shards in order, and one array. Ids in a file stay there until a shard of
them is read, and are validated then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import U8, U16, IdArray, IdType, check_sizes, id_type, valid
from moetuner.files import naming, size_of
from moetuner.files.safetensors import TensorInFile, size_holding
from moetuner.frozen import freeze

Shape = tuple[int, int, int]
Mask = NDArray[np.bool_] | None
Numbers = NDArray[np.intp] | None
LeftOut = tuple[int, tuple[int, ...]]

# Bytes of an array up to which a selection is copied at once: a copy is read faster.
COPIED_BYTES = 64 << 20
# Tokens of a block whose marks are counted together, to find a token by its number among the marked
# ones.
MARKS = 1 << 12
# Largest gap between two chosen tokens, in bytes, that is read with them. Reading so many bytes
# takes as long as another call.
GAP_BYTES = 1 << 16
# Bytes of tokens in another order that are gathered at once.
GATHERED_BYTES = 64 << 20
# Where the tokens of an order lie all over a file, every part of the order reads most of the file.
# Then there are no more parts than this.
MOST_PARTS = 8


@dataclass(frozen=True, eq=False)
class Ids:
    """Expert ids: parts one after the other, of which some tokens and layers are selected.

    Parameters
    ----------
    parts
        Valid arrays, arrays in files, and other ids, of the same layers and top-k.
    tokens, layers
        Marked tokens and numbered layers of the parts; None selects all.
    left_out
        Number of hidden layers that were recorded, and the numbers of the dense ones among them,
        which were left out; None where all have experts, or dense layers are unknown.
    """

    parts: tuple[IdArray | IdsInFile | ReorderedIds | Ids, ...]
    tokens: Mask = None
    layers: Numbers = None
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
        return all(not isinstance(part, np.ndarray) and part.fresh for part in self.parts)

    @property
    def whole(self) -> IdArray | IdsInFile | ReorderedIds | Ids | None:
        """The only part, if all of it is selected."""
        is_whole = len(self.parts) == 1 and self.tokens is None and self.layers is None
        return self.parts[0] if is_whole else None

    def shards(self, max_bytes: int, threads: int | None = None) -> Iterator[IdArray]:
        """Read valid runs of tokens [t,L,K], C-contiguous, in order, none of them empty.

        Ids in a file are validated on ``threads`` threads, all cores by default.
        """
        first = 0
        for part in self.parts:
            if isinstance(part, np.ndarray):
                shards = _cut(part, max_bytes)
            else:
                shards = part.shards(max_bytes, threads)
            for shard in shards:
                marks = None if self.tokens is None else self.tokens[first : first + len(shard)]
                first += len(shard)
                if marks is None or marks.any():
                    selected: Any = _select(shard, marks, self.layers)
                    yield selected.astype(self.dtype, copy=False)
                    del selected
                del shard  # else memory holds it while the next one is made

    def chosen(
        self, items: NDArray[np.integer[Any]], max_bytes: int, threads: int | None = None
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
            if isinstance(part, np.ndarray):
                pieces = _chosen_of(part, within, max_bytes)
            else:
                pieces = part.chosen(within, max_bytes, threads)
            for piece in pieces:
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

    def _places_of(self, items: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
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
        if isinstance(self.whole, np.ndarray):
            return self.whole
        if isinstance(self.whole, IdsInFile) and self.whole.stored.dtype == self.dtype:
            return self.whole.mapped()
        return self.valid_array()

    def valid_array(self) -> IdArray:
        """Return all ids [T,L,K] in memory, validated; an array in memory is not copied."""
        if isinstance(self.whole, np.ndarray):
            return self.whole
        array: IdArray = np.empty(self.shape, dtype=self.dtype)
        first = 0
        for shard in self.shards(1 << 24):
            array[first : first + len(shard)] = shard
            first += len(shard)
        return array

    def select(self, tokens: Mask, layers: Numbers) -> Ids:
        """Select the marked tokens and the numbered layers; None selects all.

        A selection of a large array, or of a file, is copied when it is read.
        """
        if isinstance(self.whole, np.ndarray) and self.whole.nbytes <= COPIED_BYTES:
            return in_memory(_select(self.whole, tokens, layers))
        return Ids((self,), tokens, layers)

    def reorder(self, order: NDArray[np.integer[Any]]) -> Ids:
        """Return the numbered tokens [n] in this order.

        Tokens of a large array, or of a file, are copied when they are read.
        """
        if isinstance(self.whole, np.ndarray) and self.whole.nbytes <= COPIED_BYTES:
            return in_memory(self.whole[order])
        return Ids((ReorderedIds(self, freeze(order)),))


@dataclass(frozen=True, eq=False)
class IdsInFile:
    """An array in a file, in row-major order.

    Shards are read into fresh memory, not through a map: pages of a map count as this process's
    memory, and a file that is cut off behind a map kills the process instead of raising.
    """

    path: Path
    stored: TensorInFile
    num_experts: int
    size: int
    inode: int
    fresh = True

    @property
    def shape(self) -> Shape:
        """Sizes [T,L,K]."""
        return cast(Shape, self.stored.shape)

    @property
    def dtype(self) -> IdType:
        """Type of the shards; the file may have another one."""
        return id_type(self.stored.dtype, self.num_experts)

    def shards(self, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Read and validate runs of tokens."""
        step = tokens_per_shard(self.shape, self.stored.dtype, max_bytes)
        tokens = self.shape[0]
        self._check_unchanged()
        with self.path.open("rb", buffering=0) as file, naming(self.path):
            file.seek(self.stored.offset)
            for first in range(0, tokens, step):
                yield self._read(file, first, min(step, tokens - first), threads)

    def chosen(
        self, items: NDArray[np.integer[Any]], max_bytes: int, threads: int | None
    ) -> Iterator[IdArray]:
        """Read and validate numbered tokens [n], whose numbers rise."""
        step = tokens_per_shard(self.shape, self.stored.dtype, max_bytes)
        self._check_unchanged()
        with self.path.open("rb", buffering=0) as file, naming(self.path):
            for first in range(0, len(items), step):
                yield self._read_numbered(file, items[first : first + step], step, threads)

    def _read_numbered(
        self, file: IO[bytes], items: NDArray[np.integer[Any]], limit: int, threads: int | None
    ) -> IdArray:
        """Read and validate rising numbered tokens [n], at most ``limit`` in one read.

        Tokens in a small gap between two of them are read, too, and dropped.
        """
        _, layers, top_k = self.shape
        row = layers * top_k * self.stored.dtype.itemsize
        raw = np.empty((len(items), layers, top_k), self.stored.dtype)
        runs = [*_runs(items, max(GAP_BYTES // row, 1), limit)]
        for run in runs:
            begin = int(items[run.start])
            within = items[run] - begin
            number = int(within[-1]) + 1
            file.seek(self.stored.offset + begin * row)
            if number == len(within):
                self._fill(file, raw[run])
            else:
                read = np.empty((number, layers, top_k), raw.dtype)
                self._fill(file, read)
                raw[run] = read[within]
                del read  # else memory holds it while the next run is read
        try:
            return valid(raw, self.num_experts, int(items[0]), threads)
        except ValueError:
            for number, ids in zip(items.tolist(), raw, strict=True):  # name the faulty token
                valid(ids[None], self.num_experts, number, threads)
            raise

    def _read(self, file: IO[bytes], first: int, tokens: int, threads: int | None) -> IdArray:
        """Read and validate the next tokens of an open file; ``first`` is the first's number."""
        raw = np.empty((tokens, *self.shape[1:]), self.stored.dtype)
        self._fill(file, raw)
        return valid(raw, self.num_experts, first, threads)

    def _fill(self, file: IO[bytes], raw: NDArray[np.generic]) -> None:
        """Fill an array with the next bytes of an open file."""
        buffer, done = raw.reshape(-1).view(np.uint8), 0
        while done < len(buffer):
            count = cast(Any, file).readinto(buffer[done:])
            if not count:
                missing = len(buffer) - done
                raise ValueError(f"file shrank while it was read: {missing} bytes are missing")
            done += count

    def mapped(self) -> IdArray:
        """Map the file; its ids are not validated."""
        self._check_unchanged()
        if 0 in self.shape:  # nothing to map
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.stored.offset, self.shape)

    def _check_unchanged(self) -> None:
        """Check that the file is the one that was opened."""
        size = size_of(self.path)
        if size != self.size:
            raise ValueError(
                f"{self.path}: file must have {self.size} bytes, as when it was loaded, got {size}"
            )
        if self.path.stat().st_ino != self.inode:
            raise ValueError(f"{self.path}: file was replaced after it was loaded; load it again")


@dataclass(frozen=True, eq=False)
class ReorderedIds:
    """Tokens of other ids in another order, gathered when they are read.

    Parameters
    ----------
    ids
        The other ids.
    order
        Numbers of their tokens [n], each at most once.
    """

    ids: Ids
    order: NDArray[np.integer[Any]]

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

    def chosen(
        self, items: NDArray[np.integer[Any]], max_bytes: int, threads: int | None
    ) -> Iterator[IdArray]:
        """Gather numbered tokens [n]."""
        return self._gather(self.order[items], max_bytes, threads)

    def _gather(
        self, order: NDArray[np.integer[Any]], max_bytes: int, threads: int | None
    ) -> Iterator[IdArray]:
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
    if all(isinstance(part.whole, np.ndarray) for part in parts):
        return in_memory(together.array())
    return together


def tokens_per_shard(shape: tuple[int, ...], dtype: np.dtype[Any], max_bytes: int) -> int:
    """Return tokens that fit ``max_bytes``, at least one."""
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    return max(1, max_bytes // (shape[1] * shape[2] * dtype.itemsize))


def _runs(items: NDArray[np.integer[Any]], gap: int, length: int) -> Iterator[slice]:
    """Yield runs of rising numbers [n], whose range is at most ``length`` long.

    Neighbours in a run are at most ``gap`` apart.
    """
    ends = [*(np.flatnonzero(np.diff(items) > gap) + 1).tolist(), len(items)]
    first = 0
    for end in ends:
        while first < end:
            last = bisect_left(items, int(items[first]) + length, first, end)
            yield slice(first, last)
            first = last


def _cut(ids: IdArray, max_bytes: int) -> Iterator[IdArray]:
    step = tokens_per_shard(ids.shape, ids.dtype, max_bytes)
    return (ids[first : first + step] for first in range(0, len(ids), step))


def _chosen_of(ids: IdArray, items: NDArray[np.integer[Any]], max_bytes: int) -> Iterator[IdArray]:
    step = tokens_per_shard(ids.shape, ids.dtype, max_bytes)
    return (ids[items[first : first + step]] for first in range(0, len(items), step))


def _select(ids: IdArray, tokens: Mask, layers: Numbers) -> IdArray:
    if tokens is not None and not tokens.all():
        ids = ids[tokens]
    return np.ascontiguousarray(ids if layers is None else np.take(ids, layers, axis=1))


def in_memory(ids: IdArray) -> Ids:
    """Wrap valid ids [T,L,K] that are in memory."""
    return Ids((cast(IdArray, freeze(cast("NDArray[np.generic]", ids))),))
