"""CSV with a header that names ``layer`` and ``expert``: a trace with ``token``, else counts.

See ``Rows`` for what the columns mean. Others are left out; the columns may be in any order, parted
by commas, semicolons or tabs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from io import BufferedReader
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, size_of
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.records import head
from moetuner.formats.rows import Rows

SEPARATORS = (",", ";", "\t")
BATCH = 1 << 16
BLOCK = 1 << 21
# Digits that 64 bits hold, whatever they are.
LONGEST_NUMBER = 18
LONGEST_HEADER = 1 << 12


def recognises(path: Path) -> bool:
    """Whether a file is text whose first line names a layer and an expert."""
    start = head(path, LONGEST_HEADER)
    try:
        header = start.partition(b"\n")[0].decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return {"layer", "expert"} <= set(_header(header)[1])


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read one table, or several of the same columns one after the other.

    Raises
    ------
    ValueError
        Naming the file and line of what is wrong.
    """
    rows: Rows | None = None
    columns: list[str] = []
    for path in paths:
        with naming(path):
            size_of(path)
            with path.open("rb") as file:
                separator, names = _header(file.readline(LONGEST_HEADER).decode("utf-8-sig"))
                if rows is None:
                    rows, columns = Rows(names), names
                if names != columns:
                    raise ValueError(
                        f"must have columns {columns[:8]} like the others, got {names}"
                    )
                line = _add_plain(rows, names, file, separator)
                with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
                    _add_others(
                        rows, names, csv.reader(text, delimiter=separator, strict=True), line
                    )
    if rows is None:
        raise ValueError("must have a file, got none")
    with naming(paths[0]):
        return rows.traffic(hints)


def _header(line: str) -> tuple[str, list[str]]:
    separator = max(SEPARATORS, key=line.count)
    return separator, [name.strip().strip('"') for name in line.strip().split(separator)]


def _add_plain(rows: Rows, names: list[str], file: BufferedReader, separator: str) -> int:
    """Take in blocks of lines that are nothing but numbers, and stop in front of any other.

    Returns
    -------
    int
        Number of the next line.
    """
    line = 2
    while True:
        begin = file.tell()
        block = file.read(BLOCK)
        end = block.rfind(b"\n") + 1
        table = _numbers(block[:end], len(names), separator)
        if table is None:
            file.seek(begin)
            return line
        file.seek(begin + end)
        try:
            rows.add(dict(zip(names, table.T, strict=True)))
        except ValueError:  # which is said again of the line where it is
            file.seek(begin)
            return line
        line += len(table)


def _numbers(block: bytes, columns: int, separator: str) -> NDArray[np.int64] | None:
    """Read a table [n, columns] of unsigned integers; None if a byte is anything else."""
    letters = np.frombuffer(block.replace(b"\r\n", b"\n"), dtype=np.uint8)
    ends = np.flatnonzero((letters < ord("0")) | (letters > ord("9")))
    shape = (-1, columns)
    if not ends.size or ends.size % columns or ends[0] == 0:
        return None
    lengths = np.diff(ends, prepend=-1) - 1
    if lengths.min() < 1 or lengths.max() > LONGEST_NUMBER:
        return None
    marks = np.full(columns, ord(separator), dtype=np.uint8)
    marks[-1] = ord("\n")
    if (letters[ends].reshape(shape) != marks).any():
        return None
    text = letters.copy()
    text[ends] = ord(" ")
    return np.fromstring(text.tobytes().decode("ascii"), dtype=np.int64, sep=" ").reshape(shape)


def _add_others(rows: Rows, names: list[str], lines: Iterator[list[str]], number: int) -> None:
    """Take in lines of any text, batch by batch, from this number on."""
    try:
        while batch := list(islice(lines, BATCH)):
            try:
                _add(rows, names, batch)
            except ValueError as error:
                for at, line in enumerate(batch, number):
                    with naming(f"line {at}"):  # the first that is wrong by itself
                        _add(Rows(names), names, [line])
                raise ValueError(f"lines from {number}: {error}") from None
            number += len(batch)
    except csv.Error as error:
        raise ValueError(f"lines from {number}: must be CSV: {error}") from None


def _add(rows: Rows, names: list[str], batch: list[list[str]]) -> None:
    lines = list(filter(None, batch))
    if not lines:
        return
    if set(map(len, lines)) != {len(names)}:
        raise ValueError(f"must have {len(names)} values, one for each column")
    columns = dict(zip(names, zip(*lines, strict=True), strict=True))
    rows.add({name: columns[name] for name in rows.names})
