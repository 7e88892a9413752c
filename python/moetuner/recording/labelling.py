"""Rows and their labels: ranks, counts and choices, in pieces that bound the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check

# Labels that are processed together: for all at once, numpy's copies would take much memory, and no
# signal could interrupt it.
PIECE = 1 << 20

Scalar = TypeVar("Scalar", bound=np.generic)


def evenly_spaced(number: int, limit: int) -> NDArray[np.int64]:
    """Return at most ``limit`` of so many numbers from 0, at even distances, the last with them."""
    return np.unique(np.linspace(0, number - 1, limit).round().astype(np.int64))


class Labelled(NamedTuple):
    """Rows by their labels.

    Parameters
    ----------
    labels
        The distinct labels in ascending order [S].
    rank
        Rank of every row's label among them [n].
    first, sizes
        Number of the first row of every label, and how many rows have it [S].
    """

    labels: NDArray[Any]
    rank: NDArray[Any]
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]


def by_label(values: NDArray[Any]) -> Labelled:
    """Return rows by their labels [n]."""
    labels = distinct(values)
    rank, number = ranks(values, labels), len(labels)
    first, sizes = np.full(number, len(values), dtype=np.int64), np.zeros(number, dtype=np.int64)
    begin = 0
    for order, present, start, times in _runs(rank):
        first[present] = np.minimum(first[present], begin + order[start])
        sizes[present] += times
        begin += len(order)
    return Labelled(labels, rank, first, sizes)


def pieces(values: NDArray[Scalar]) -> Iterator[NDArray[Scalar]]:
    """Yield labels [n] in pieces, at least one."""
    return (values[at : at + PIECE] for at in range(0, max(len(values), 1), PIECE))


def distinct(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """Return the distinct labels in ascending order."""
    return np.unique(np.concatenate([np.unique(piece) for piece in pieces(values)]))


def among(values: NDArray[Any], wanted: ArrayLike) -> NDArray[np.bool_]:
    """Return the mask of the labels that are among those wanted."""
    return np.concatenate([np.isin(piece, wanted) for piece in pieces(values)])


def at(values: NDArray[Scalar], numbers: NDArray[Any]) -> NDArray[Scalar]:
    """Return values by their numbers [n]."""
    return np.concatenate([values[piece] for piece in pieces(numbers)])


def ranks(values: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    """Return the rank of each value [n] among the distinct labels in ascending order."""
    kind = np.min_scalar_type(max(len(labels) - 1, 0))
    return np.concatenate([np.searchsorted(labels, piece).astype(kind) for piece in pieces(values)])


def counts(ranks: NDArray[Any], number: int) -> NDArray[np.int64]:
    """Count how often each rank below ``number`` occurs."""
    total = np.zeros(number, dtype=np.int64)
    for _, present, _, times in _runs(ranks):
        total[present] += times
    return total


def number_runs(
    first: NDArray[np.signedinteger[Any]], lengths: NDArray[np.int64]
) -> NDArray[np.signedinteger[Any]]:
    """Return the numbers of the items of runs [n], in the type of the first ones."""
    numbers: NDArray[np.signedinteger[Any]]
    numbers = np.repeat((first - np.cumsum(lengths) + lengths).astype(first.dtype), lengths)
    numbers += np.arange(len(numbers), dtype=first.dtype)
    return numbers


def sorted_by(ranks: NDArray[Any], number: int) -> NDArray[Any]:
    """Return the numbers of items [n] in the order of their ranks (a stable sort)."""
    place = np.empty(len(ranks), dtype=np.int32 if len(ranks) < 1 << 31 else np.int64)
    size, first = counts(ranks, number), 0
    begin = np.cumsum(size) - size
    for order, present, start, times in _runs(ranks):
        within = np.arange(len(order)) - np.repeat(start, times)
        place[np.repeat(begin[present], times) + within] = first + order
        begin[present] += times
        first += len(order)
    return place


def _runs(ranks: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Yield for every piece of ranks [n]: its stable order, and its distinct ranks.

    Each rank comes with the index in the order at which it begins, and with its count.
    """
    for piece in pieces(ranks):
        order = np.argsort(piece, kind="stable")
        in_order = piece[order]
        start = np.flatnonzero(np.append(True, in_order[1:] != in_order[:-1])[: len(piece)])
        yield order, in_order[start], start, np.diff(np.append(start, len(piece)))


def rows(name: str, values: ArrayLike, length: int) -> NDArray[Any]:
    """Return a mask of rows [length], or distinct numbers of rows, checked."""
    array = check.array_in(name, values)
    if array.dtype == np.bool_ and array.shape == (length,):
        return array.copy()
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise check.ArgumentError(
            f"{name} must be a mask [{length}] or numbers of rows, got {check.shown(array)}", name
        )
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < length):
        raise check.ArgumentError(
            f"{name} must be below {length} and at least 0, got {array.min()} to {array.max()}",
            name,
        )
    numbers = array.astype(np.int32 if length < 1 << 31 else np.int64)
    is_wanted = np.zeros(length, dtype=bool)
    for piece in pieces(numbers):
        is_wanted[piece] = True
    if np.count_nonzero(is_wanted) < len(numbers):
        raise check.ArgumentError(f"{name} must name each row once, got {check.shown(array)}", name)
    return numbers


def join_sequences(parts: list[NDArray[np.int32] | None]) -> NDArray[np.int64] | None:
    """Join the sequence labels of traces; if a label occurs in two, all are numbered anew."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    labels = [distinct(part) for part in present]
    ends = np.cumsum([len(values) for values in labels])
    if len(distinct(np.concatenate(labels))) == ends[-1]:
        return np.concatenate(present).astype(np.int64)
    rows = zip(present, labels, ends, strict=True)
    return np.concatenate(
        [np.searchsorted(values, part) + end - len(values) for part, values, end in rows]
    )


def join_groups(parts: Iterable[Any]) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Join the group numbers of traces or statistics, and return the joint names, too."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.group_names))
    if any(part.group is None for part in parts):
        return None, names
    numbers = [np.array([names.index(name) for name in part.group_names], int) for part in parts]
    groups = [number[part.group] for number, part in zip(numbers, parts, strict=True)]
    return np.concatenate(groups), names
