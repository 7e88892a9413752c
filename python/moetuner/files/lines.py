"""JSON lines in batches: plain ones by the core, all others one by one, as Python reads JSON.

The core takes runs of lines that are surely right and gives up in front of any other, so what a
line means, and what is wrong with it, is said in one place: here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.files.text import parse_json

LINE_LIMIT = 1 << 29
BLOCK = 1 << 22
# Values of the table where a line has none.
NO_INTEGER, NO_TEXT = -(1 << 63), -1


@dataclass(frozen=True)
class Keys:
    """What is read of a line.

    Attributes
    ----------
    arrays
        Keys of expert ids, with their dimensions, 2 or 3; a plain line has exactly one.
    integers
        Keys of integers.
    texts
        Keys of texts.
    """

    arrays: Sequence[tuple[str, int]]
    integers: Sequence[str] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Batch:
    """Plain lines one after the other.

    Attributes
    ----------
    number
        Number of the first line, from 1.
    text
        The lines themselves.
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

    number: int
    text: bytes
    ids: NDArray[np.uint16]
    array: NDArray[np.int64]
    sizes: NDArray[np.int64]
    columns: dict[str, NDArray[np.int64]]
    names: list[str]

    def __len__(self) -> int:
        return len(self.array)

    def one_by_one(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Read the same lines as objects, with their numbers."""
        for number, line in enumerate(self.text.split(b"\n"), self.number):
            if line.strip():
                yield number, fields_of(line, number)


def batches(path: Path, keys: Keys) -> Iterator[Batch | tuple[int, dict[str, Any]]]:
    """Read a file: batches of plain lines, and the number and object of each other line, in order.

    The first line is always an object: it may be a header. Memory holds a block of the file, or
    its longest line.

    Raises
    ------
    ValueError
        Naming the line that is too long, not JSON or not an object.
    """
    arrays, integers, texts = list(keys.arrays), list(keys.integers), list(keys.texts)
    number = 1
    for block in _blocks(path):
        at = 0
        while at < len(block):
            if number > 1:
                begin = at
                at, ends, ids, table, names = _core.scan_lines(block, at, arrays, integers, texts)
                if len(table):
                    columns = dict(zip([*integers, *texts], table.T[4:], strict=True))
                    plain = block[begin:at]
                    yield Batch(number, plain, ids, table[:, 0], table[:, 1:4], columns, names)
                number += ends
                if at == len(block):
                    break
            end = block.find(b"\n", at) + 1 or len(block)
            line = block[at:end]
            if line.strip():
                yield number, fields_of(line, number)
            at, number = end, number + 1


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
