"""Ids in a file: read in pieces when they are wanted, and validated then."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import IdArray, IdType, id_type, valid
from moetuner.files import naming, size_of
from moetuner.files.ids.part import Numbers, Shape, tokens_per_shard
from moetuner.files.safetensors import TensorInFile

# Largest gap between two chosen tokens, in bytes, that is read with them. Reading so many bytes
# takes as long as another call.
GAP_BYTES = 1 << 16


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
        step, tokens = self._tokens_in(max_bytes), self.shape[0]
        runs = (np.arange(at, min(at + step, tokens)) for at in range(0, tokens, step))
        return self._read_each(runs, step, threads)

    def chosen(self, items: Numbers, max_bytes: int, threads: int | None) -> Iterator[IdArray]:
        """Read and validate numbered tokens [n], whose numbers rise."""
        step = self._tokens_in(max_bytes)
        pieces = (items[at : at + step] for at in range(0, len(items), step))
        return self._read_each(pieces, step, threads)

    def _tokens_in(self, max_bytes: int) -> int:
        """Return the tokens that are read together."""
        return tokens_per_shard(self.shape, self.stored.dtype, max_bytes)

    def _read_each(
        self, pieces: Iterable[Numbers], limit: int, threads: int | None
    ) -> Iterator[IdArray]:
        """Read and validate pieces of rising numbered tokens."""
        self._check_unchanged()
        with self.path.open("rb", buffering=0) as file, naming(self.path):
            for items in pieces:
                yield self._read_numbered(file, items, limit, threads)

    def _read_numbered(
        self, file: IO[bytes], items: Numbers, limit: int, threads: int | None
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


def _runs(items: Numbers, gap: int, length: int) -> Iterator[slice]:
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
