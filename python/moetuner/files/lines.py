"""JSON lines in batches, read by the core.

Python's JSON parser reads a line that the core refuses. Its wanted keys alone go to the core again,
so NaN and escapes under other keys do not matter.
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

Result = TypeVar("Result")

LINE_LIMIT = 1 << 29
BLOCK = 1 << 22
# Values of the columns where a line has none.
NO_INTEGER, NO_TEXT = -(1 << 63), -1


class Keys(NamedTuple):
    """Keys that are read from a line.

    A line has one of ``arrays``, which are ids with 2 or 3 dimensions; integers; and texts.
    """

    arrays: list[tuple[str, int]]
    integers: list[str]
    texts: list[str]


@dataclass
class Lines:
    """Consecutive lines of a file, as columns.

    Attributes
    ----------
    numbers
        Number of every line [n], from 1.
    ids
        Ids of all lines, flat.
    array
        The array that every line has [n], as an index into ``Keys.arrays``.
    sizes
        Sizes of that array [n,3], outermost first; an array with two dimensions has 1 in front.
    columns
        By key, the integer of every line [n], or ``NO_INTEGER``; and by key, the text of every line
        as an index into ``names``, or ``NO_TEXT``.
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

    def hand_to(self, take: Callable[[Lines], Result]) -> list[Result]:
        """Pass all lines to a function at once or, if that fails, one by one; return its results.

        The error then has the number of the wrong line.
        """
        try:
            return [take(self)]
        except ValueError as error:
            if len(self) == 1:
                raise ValueError(f"line {self.numbers[0]}: {error}") from None
        return [result for line in self._one_by_one() for result in line.hand_to(take)]

    def _one_by_one(self) -> Iterator[Lines]:
        ends = np.cumsum(self.sizes.prod(axis=1))
        for place, ids in enumerate(np.split(self.ids, ends[:-1])):
            line = slice(place, place + 1)
            columns = {key: column[line] for key, column in self.columns.items()}
            yield Lines(
                self.numbers[line], ids, self.array[line], self.sizes[line], columns, self.names
            )


def batches(
    path: Path, keys: Keys, is_header: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Iterator[Lines]:
    """Yield the lines of a file in batches; ``is_header`` may read the first line.

    ``is_header`` returns False if the first line is data. Memory holds a block of the file, or its
    longest line.
    """
    number = 1  # of the next line
    for block in _blocks(path):
        begin = 0  # of the next line in the block
        while begin < len(block):
            if number > 1:
                end, line_ends, lines, _ = _scan(block, begin, keys)
                if line_ends > len(lines):  # some are blank
                    texts = block[begin:end].split(b"\n")
                    lines.numbers = [n for n, text in enumerate(texts, number) if text.strip()]
                else:
                    lines.numbers = range(number, number + len(lines))
                begin, number = end, number + line_ends
                if len(lines):
                    yield lines
                if begin == len(block):
                    break
            # The first line may be a header, and the core has refused the others that come here.
            end = block.find(b"\n", begin) + 1 or len(block)
            if line := block[begin:end].strip():
                fields = fields_of(line, number)
                with naming(f"line {number}"):
                    if number > 1 or not is_header(fields):
                        yield _single(fields, keys, number)
            begin, number = end, number + 1


def _scan(text: bytes, start: int, keys: Keys) -> tuple[int, int, Lines, str | None]:
    """Read plain lines from a start, up to the first one that the core refuses.

    Returns
    -------
    tuple
        The place behind the lines, the number of their ends, the lines without numbers, and why the
        next line was refused; None at the end of the text.
    """
    end, line_ends, ids, table, names, refused = _core.scan_lines(text, start, *keys)
    columns = dict(zip([*keys.integers, *keys.texts], table.T[4:], strict=True))
    return end, line_ends, Lines([], ids, table[:, 0], table[:, 1:4], columns, names), refused


def _single(fields: dict[str, Any], keys: Keys, number: int) -> Lines:
    """Return the fields of one line as lines of one row."""
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
