"""JSON lines in batches: plain ones by the core, all others one by one, as Python reads JSON.

The core takes runs of lines that are surely right and gives up in front of any other, so what a
line means, and what is wrong with it, is said in one place: here. Both give the same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner._checks import shown
from moetuner.files.text import parse_json

LINE_LIMIT = 1 << 29
BLOCK = 1 << 22
# Values of the columns where a line has none.
NO_INTEGER, NO_TEXT = -(1 << 63), -1


@dataclass(frozen=True)
class Keys:
    """What is read of a line.

    Attributes
    ----------
    arrays
        Keys of expert ids, with the names of their two or three dimensions; a line has one of them.
    integers
        Keys of integers.
    texts
        Keys of texts.
    may_be_empty
        Whether a line may have no ids.
    """

    arrays: Sequence[tuple[str, Sequence[str]]]
    integers: Sequence[str] = ()
    texts: Sequence[str] = ()
    may_be_empty: bool = False


@dataclass(frozen=True)
class Lines:
    """Lines one after the other.

    Attributes
    ----------
    numbers
        Number of every line [n], from 1.
    ids
        Ids of all lines.
    array
        Which array every line has [n], an index into ``Keys.arrays``.
    sizes
        Its sizes [n,3], outermost first; 1 in front of two.
    columns
        Integers of every line by key [n], ``NO_INTEGER`` where it has none; and texts, as indices
        into ``names``, ``NO_TEXT`` where it has none.
    names
        The texts that lines have.
    """

    numbers: Sequence[int]
    ids: NDArray[Any]
    array: NDArray[np.int64]
    sizes: NDArray[np.int64]
    columns: dict[str, NDArray[np.int64]]
    names: list[str]

    def __len__(self) -> int:
        return len(self.array)

    def hand_to(self, take: Callable[[Lines], object]) -> None:
        """Hand all lines over at once; where that fails, one by one.

        Raises
        ------
        ValueError
            Naming the first line that is refused.
        """
        try:
            take(self)
        except ValueError as error:
            if len(self) == 1:
                raise ValueError(f"line {self.numbers[0]}: {error}") from None
            for line in self._one_by_one():
                line.hand_to(take)

    def _one_by_one(self) -> Iterator[Lines]:
        ends = np.cumsum(self.sizes.prod(axis=1))
        for at, end in enumerate(ends.tolist()):
            one = slice(at, at + 1)
            ids = self.ids[end - int(self.sizes[at].prod()) : end]
            columns = {key: column[one] for key, column in self.columns.items()}
            numbers = self.numbers[one]
            yield Lines(numbers, ids, self.array[one], self.sizes[one], columns, self.names)


def batches(
    path: Path, keys: Keys, is_header: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Iterator[Lines]:
    """Read a file; ``is_header`` takes in the first line, if it is no data.

    Memory holds a block of the file, or its longest line.

    Raises
    ------
    ValueError
        Naming the line that is too long, not JSON, not an object, or has other values.
    """
    arrays = [(key, len(dimensions)) for key, dimensions in keys.arrays]
    integers, texts = list(keys.integers), list(keys.texts)
    number = 1
    for block in _blocks(path):
        at = 0
        while at < len(block):
            if number > 1:
                begin = at
                at, ends, ids, table, names = _core.scan_lines(block, at, arrays, integers, texts)
                if len(table):
                    columns = dict(zip([*integers, *texts], table.T[4:], strict=True))
                    numbers: Sequence[int] = range(number, number + len(table))
                    if ends > len(table):  # some are blank
                        lines = block[begin:at].split(b"\n")
                        numbers = [n for n, line in enumerate(lines, number) if line.strip()]
                    yield Lines(numbers, ids, table[:, 0], table[:, 1:4], columns, names)
                number += ends
                if at == len(block):
                    break
            end = block.find(b"\n", at) + 1 or len(block)
            line = block[at:end]
            if line.strip():
                fields = fields_of(line, number)
                try:
                    if number > 1 or not is_header(fields):
                        yield _line(fields, keys, number)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"line {number}: {error}") from None
            at, number = end, number + 1


def _line(fields: dict[str, Any], keys: Keys, number: int) -> Lines:
    """Return what an object says, as columns of one row."""
    which = [at for at, (key, _) in enumerate(keys.arrays) if key in fields]
    if len(which) != 1:
        names = " or ".join(repr(key) for key, _ in keys.arrays)
        raise ValueError(f"must have {names}, got keys {list(fields)[:8]}")
    key, dimensions = keys.arrays[which[0]]
    ids = _ids(fields[key], f"{key} must be integers [{', '.join(dimensions)}]", keys, dimensions)
    columns: dict[str, int] = {}
    for name in keys.integers:
        value = columns[name] = fields.get(name, NO_INTEGER)
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"{name} must be an integer of 64 bits, got {shown(value)}")
    texts: list[str] = []
    for name in keys.texts:
        columns[name] = len(texts) if name in fields else NO_TEXT
        if name in fields:
            if not isinstance(fields[name], str):
                raise ValueError(f"{name} must be a text, got {shown(fields[name])}")
            texts.append(fields[name])
    return Lines(
        [number],
        ids.ravel(),
        np.array(which),
        np.array([[1] * (3 - ids.ndim) + list(ids.shape)]),
        {name: np.array([value]) for name, value in columns.items()},
        texts,
    )


def _ids(values: object, rule: str, keys: Keys, dimensions: Sequence[str]) -> NDArray[Any]:
    try:
        ids = np.asarray(values)
    except ValueError:
        raise ValueError(f"{rule}, got lists of different lengths or depths") from None
    if keys.may_be_empty and ids.shape == (0,):
        return np.zeros([0] * len(dimensions), dtype=np.uint16)
    if ids.ndim != len(dimensions) or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"{rule}, got {ids.dtype} {list(ids.shape)}")
    return ids


def fields_of(line: bytes, number: int) -> dict[str, Any]:
    """Read one line as an object.

    Raises
    ------
    ValueError
        Naming the line, if it is not JSON or not an object.
    """
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except ValueError as error:
        raise ValueError(f"line {number}: must be JSON: {error}") from None
    try:
        fields = parse_json(text, allow_nan=True)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"line {number}: must be a JSON object, got {type(fields).__name__}")
    return fields


def _blocks(path: Path) -> Iterator[bytes]:
    """Read whole lines, about ``BLOCK`` bytes of them at a time."""
    number, parts = 1, [b""]
    with path.open("rb", buffering=0) as file:
        while piece := file.read(BLOCK):
            cut = piece.rfind(b"\n") + 1
            if cut:
                block = b"".join([*parts, piece[:cut]])
                yield block
                number += block.count(b"\n")
                parts = []
            parts.append(piece[cut:])
            if sum(map(len, parts)) > LINE_LIMIT:
                raise ValueError(f"line {number}: must have at most {LINE_LIMIT} bytes")
    if rest := b"".join(parts):
        yield rest
