"""CSV with a header that names ``layer`` and ``expert``: a trace with ``token``, else counts.

See ``Rows`` for what the columns mean. Others are left out; the columns may be in any order, parted
by commas, semicolons or tabs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from moetuner.files import naming, size_of
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.records import head
from moetuner.formats.rows import Rows

SEPARATORS = (",", ";", "\t")
BATCH = 1 << 16
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
    names: list[str] = []
    for path in paths:
        with naming(path):
            size_of(path)
            with path.open(encoding="utf-8-sig", newline="") as file:
                separator, found = _header(file.readline(LONGEST_HEADER))
                if rows is None:
                    rows, names = Rows(found), found
                if found != names:
                    raise ValueError(f"must have columns {names[:8]} like the others, got {found}")
                for line, batch in _batches(csv.reader(file, delimiter=separator, strict=True)):
                    try:
                        _add(rows, names, batch)
                    except ValueError as error:
                        _name_line(names, line, batch)
                        raise ValueError(f"lines from {line}: {error}") from None
    if rows is None:
        raise ValueError("must have a file, got none")
    with naming(paths[0]):
        return rows.traffic(hints)


def _header(line: str) -> tuple[str, list[str]]:
    separator = max(SEPARATORS, key=line.count)
    return separator, [name.strip().strip('"') for name in line.strip().split(separator)]


def _batches(reader: Iterator[list[str]]) -> Iterator[tuple[int, list[list[str]]]]:
    line = 2
    try:
        while batch := list(islice(reader, BATCH)):
            yield line, batch
            line += len(batch)
    except csv.Error as error:
        raise ValueError(f"lines from {line}: must be CSV: {error}") from None


def _add(rows: Rows, names: list[str], batch: list[list[str]]) -> None:
    lines = list(filter(None, batch))
    if not lines:
        return
    if set(map(len, lines)) != {len(names)}:
        raise ValueError(f"must have {len(names)} values, one for each column")
    columns = dict(zip(names, zip(*lines, strict=True), strict=True))
    rows.add({name: columns[name] for name in rows.names})


def _name_line(names: list[str], first: int, batch: list[list[str]]) -> None:
    """Raise for the first line of a batch that is wrong by itself."""
    for number, line in enumerate(batch, first):
        try:
            _add(Rows(names), names, [line])
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
