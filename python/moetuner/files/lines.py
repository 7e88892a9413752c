"""JSON lines in batches, read by the core.

A line that the core refuses is looked at once more as Python reads JSON: only what is wanted of it
goes to the core again, so that NaN and escapes elsewhere do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.files import naming
from moetuner.files.text import parse_json

Taken = TypeVar("Taken")

LINE_LIMIT = 1 << 29
BLOCK = 1 << 22
# Values of the columns where a line has none.
NO_INTEGER, NO_TEXT = -(1 << 63), -1


class Keys(NamedTuple):
    """What is read of a line: ids with 2 or 3 dimensions, one of them; integers; and texts."""

    arrays: list[tuple[str, int]]
    integers: list[str]
    texts: list[str]


@dataclass
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

    def hand_to(self, take: Callable[[Lines], Taken]) -> list[Taken]:
        """Hand all lines over at once; where that fails, one by one. Returns what is given back."""
        try:
            return [take(self)]
        except ValueError as error:
            if len(self) == 1:
                raise ValueError(f"line {self.numbers[0]}: {error}") from None
        return [taken for line in self._one_by_one() for taken in line.hand_to(take)]

    def _one_by_one(self) -> Iterator[Lines]:
        ends = np.cumsum(self.sizes.prod(axis=1))
        for at, ids in enumerate(np.split(self.ids, ends[:-1])):
            one = slice(at, at + 1)
            columns = {key: column[one] for key, column in self.columns.items()}
            numbers = self.numbers[one]
            yield Lines(numbers, ids, self.array[one], self.sizes[one], columns, self.names)


def batches(
    path: Path, keys: Keys, is_header: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Iterator[Lines]:
    """Read a file; ``is_header`` takes in the first line, if it is no data.

    Memory holds a block of the file, or its longest line.
    """
    number = 1
    for block in _blocks(path):
        at = 0
        while at < len(block):
            if number > 1:
                begin = at
                at, ends, lines, _ = _scan(block, at, keys)
                if ends > len(lines):  # some are blank
                    texts = block[begin:at].split(b"\n")
                    lines.numbers = [n for n, text in enumerate(texts, number) if text.strip()]
                else:
                    lines.numbers = range(number, number + len(lines))
                number += ends
                if len(lines):
                    yield lines
                if at == len(block):
                    break
            end = block.find(b"\n", at) + 1 or len(block)
            if line := block[at:end].strip():
                fields = fields_of(line, number)
                with naming(f"line {number}"):
                    if number > 1 or not is_header(fields):
                        yield _single(fields, keys, number)
            at, number = end, number + 1


def _scan(text: bytes, start: int, keys: Keys) -> tuple[int, int, Lines, str | None]:
    """Read plain lines: gives their end, their number, what they hold, and what ends them."""
    at, ends, ids, table, names, refused = _core.scan_lines(text, start, *keys)
    columns = dict(zip([*keys.integers, *keys.texts], table.T[4:], strict=True))
    return at, ends, Lines([], ids, table[:, 0], table[:, 1:4], columns, names), refused


def _single(fields: dict[str, Any], keys: Keys, number: int) -> Lines:
    """Return what an object says, as columns of one row."""
    arrays = [key for key, _ in keys.arrays]
    if not any(key in fields for key in arrays):
        raise ValueError(f"must have {' or '.join(map(repr, arrays))}, got keys {list(fields)[:8]}")
    wanted = {*arrays, *keys.integers, *keys.texts}
    text = json.dumps({key: value for key, value in fields.items() if key in wanted})
    _, _, lines, refused = _scan(text.encode(), 0, keys)
    if refused is not None:
        raise ValueError(refused)
    lines.numbers = [number]
    return lines


def fields_of(line: bytes, number: int) -> dict[str, Any]:
    """Read one line as an object."""
    with naming(f"line {number}"):
        return parse_json(line, allow_nan=True)


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
