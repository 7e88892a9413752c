"""Expert ids that lie in many pieces of files, such as the responses of an engine.

Only where they lie is kept; a shard of them is read and validated when it is asked for.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import IdArray, IdType, check_sizes, id_type, valid
from moetuner.files import naming
from moetuner.files.ids import Ids, SelectedIds, Shape, gathered, tokens_per_shard
from moetuner.formats.hints import Hints
from moetuner.trace import RoutingTrace

# Where what is dense cannot be seen in one token: so many bytes are looked at at once.
LOOK = 1 << 24


class Piece(Protocol):
    """A run of tokens in a file."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes [t,R,K]: tokens, rows of the file (layers, dense ones too), experts of a token."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids in the file."""

    def read(self, first: int, count: int) -> NDArray[Any]:
        """Read some of its tokens."""


@dataclass(frozen=True)
class Base64Piece:
    """An array as base64 text in a file.

    Parameters
    ----------
    path
        The file.
    start
        First byte of the text.
    shape
        Sizes of the array.
    dtype
        Its type.
    skip
        Bytes of a header before it.
    where
        Which part of the file it is, for messages.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    skip: int = 0
    where: str = ""

    def read(self, first: int, count: int) -> NDArray[Any]:
        """Decode only what is asked for: four letters are three bytes."""
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        begin = self.skip + first * row
        end = begin + count * row
        with self.path.open("rb") as file:
            file.seek(self.start + begin // 3 * 4)
            text = file.read(-(-end // 3) * 4 - begin // 3 * 4)
        data = decoded(text, self.where)[begin % 3 :]
        if len(data) < end - begin:
            raise ValueError(f"{self.where}: routed experts are cut off")
        flat = np.frombuffer(data, dtype=self.dtype, count=(end - begin) // self.dtype.itemsize)
        return flat.reshape(count, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class ArrayPiece:
    """An array that is in memory."""

    path: Path
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its type."""
        return self.values.dtype

    def read(self, first: int, count: int) -> NDArray[Any]:
        """Return some of its tokens."""
        return self.values[first : first + count]


def decoded(text: bytes, where: str) -> bytes:
    """Decode base64.

    Raises
    ------
    ValueError
        If it is something else.
    """
    try:
        return binascii.a2b_base64(text)
    except binascii.Error as error:
        raise ValueError(f"{where}: routed experts must be base64: {error}") from None


@dataclass(frozen=True, eq=False)
class IdsInPieces:
    """Expert ids of pieces, one after the other, of those rows that are layers with experts."""

    pieces: tuple[Piece, ...]
    rows: tuple[int, ...]
    num_experts: int

    @property
    def shape(self) -> Shape:
        tokens = sum(piece.shape[0] for piece in self.pieces)
        return tokens, len(self.rows), self.pieces[0].shape[2]

    @property
    def dtype(self) -> IdType:
        return id_type(np.result_type(*self._dtypes), self.num_experts)

    @property
    def fresh(self) -> bool:
        return True

    def shards(self, max_bytes: int, threads: int | None = None) -> Iterator[IdArray]:
        wide = max(dtype.itemsize for dtype in self._dtypes) * self.pieces[0].shape[1]
        step = tokens_per_shard((0, wide, self.shape[2]), np.dtype(np.uint8), max_bytes)
        chosen = self._chosen
        found: list[tuple[Path, NDArray[Any]]] = []
        tokens = done = 0
        for piece in self.pieces:
            for first in range(0, piece.shape[0], step):
                count = min(step, piece.shape[0] - first)
                if tokens and tokens + count > step:
                    yield self._valid(found, done, threads)
                    found, tokens, done = [], 0, done + tokens
                with naming(piece.path):
                    found.append((piece.path, piece.read(first, count)[:, chosen]))
                tokens += count
        if tokens:
            yield self._valid(found, done, threads)

    def _valid(
        self, found: list[tuple[Path, NDArray[Any]]], done: int, threads: int | None
    ) -> IdArray:
        """Validate many pieces at once; only where one is wrong, each, to name its file."""
        joined = np.concatenate([raw for _, raw in found])
        try:
            ids = valid(joined, self.num_experts, done, threads)
        except ValueError:
            for path, raw in found:
                with naming(path):
                    valid(raw, self.num_experts, done, threads)
                done += len(raw)
            raise
        return cast(IdArray, ids.astype(self.dtype, copy=False))

    @cached_property
    def _dtypes(self) -> set[np.dtype[Any]]:
        return {piece.dtype for piece in self.pieces}

    @property
    def _chosen(self) -> slice | list[int]:
        """The rows, as what is quickest to take: dense layers mostly come first."""
        first, last = self.rows[0], self.rows[-1]
        if self.rows == tuple(range(first, last + 1)):
            return slice(first, last + 1)
        return list(self.rows)

    def array(self) -> IdArray:
        return gathered(self)

    def select(self, tokens: NDArray[np.bool_] | None, layers: NDArray[np.intp] | None) -> Ids:
        return SelectedIds(self, tokens, layers)


def ids_of(
    pieces: Sequence[Piece],
    num_experts: int | None,
    moe_rows: list[int] | None,
    source: str,
) -> IdsInPieces:
    """Make ids of pieces, and tell the rows of dense layers by their content.

    Engines fill the rows of layers without experts with zeros. A token never has the same expert
    twice in a layer, so with top-k above 1 one token tells; with top-1 a row must be zero for all.

    Parameters
    ----------
    pieces
        The pieces; those without tokens are left out.
    num_experts
        Experts per layer.
    moe_rows
        Rows that are layers with experts, if they are known.
    source
        What the pieces are, for messages.

    Raises
    ------
    ValueError
        If nothing is there, the pieces are of different sizes, or no row has experts.
    """
    pieces = tuple(piece for piece in pieces if piece.shape[0])
    if not pieces:
        raise ValueError(f"{source} must have at least one token with routed experts, got none")
    sizes = {piece.shape[1:] for piece in pieces}
    if len(sizes) > 1:
        raise ValueError(
            f"{source} must all have the same layers and top-k, got "
            f"{' and '.join(str(list(size)) for size in sorted(sizes)[:2])}"
        )
    if num_experts is None:
        raise ValueError(f"num_experts is needed: {source} do not say it")
    rows = moe_rows
    if rows is None:
        dense = _dense(pieces)
        rows = np.flatnonzero(~dense).tolist()
        if not rows:
            raise ValueError(f"{source} must have a layer with experts, got only rows of zeros")
    tokens = sum(piece.shape[0] for piece in pieces)
    check_sizes((tokens, len(rows), pieces[0].shape[2]), pieces[0].dtype, num_experts)
    return IdsInPieces(pieces, tuple(rows), num_experts)


def trace_of(pieces: Sequence[Piece], hints: Hints, paths: Sequence[Path]) -> RoutingTrace:
    """Make a trace of responses, a sequence each, without the rows of layers that are dense."""
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    with naming(where):
        moe = hints.moe_layers(pieces[0].shape[1]) if pieces else None
        ids = ids_of(pieces, hints.num_experts, moe, "responses")
        lengths = [piece.shape[0] for piece in ids.pieces]
        sequence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        return RoutingTrace(ids, ids.num_experts, sequence=sequence)


def layers_left_out(ids: Ids) -> tuple[int, tuple[int, ...]] | None:
    """Return how many hidden layers were recorded, and those of them that were left out as dense.

    None where all have experts, or nothing is known of others.
    """
    if not isinstance(ids, IdsInPieces):
        return None
    hidden = ids.pieces[0].shape[1]
    dense = tuple(layer for layer in range(hidden) if layer not in set(ids.rows))
    return (hidden, dense) if dense else None


def _dense(pieces: Sequence[Piece]) -> NDArray[np.bool_]:
    """Which rows [R] are filled with zeros and no more."""
    _, rows, top_k = pieces[0].shape
    if top_k > 1:
        with naming(pieces[0].path):
            first = pieces[0].read(0, 1)[0]
        return np.asarray((first == 0).all(axis=1))
    dense = np.ones(rows, dtype=bool)
    for piece in pieces:
        step = max(1, LOOK // max(1, rows * piece.dtype.itemsize))
        for at in range(0, piece.shape[0], step):
            with naming(piece.path):
                dense &= ~piece.read(at, min(step, piece.shape[0] - at)).any(axis=(0, 2))
        if not dense.any():
            break
    return dense
