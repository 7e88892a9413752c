"""Read CSV with columns ``layer`` and ``expert``: a trace if it has ``token``, else counts.

``Choices`` has the meaning of columns, and ``ALIASES`` further names of columns of counts. Columns
may be in any order, separated by commas, semicolons or tabs; others are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moetuner.files import size_of
from moetuner.files.opened import Opened
from moetuner.formats.rows import LABELS, Add, OpenTable, add_rows, read_tables, split_cells

# Other names of columns of counts.
ALIASES = {"count": "weight", "counts": "weight", "load": "weight", "tokens": "weight"}
ALIASES |= {"window": "sequence", "step": "sequence", "layer_id": "layer", "expert_id": "expert"}
COLUMNS = (*LABELS, "token", "weight", "layer", "expert")
BLOCK = 1 << 21
LONGEST_HEADER = 1 << 12


def recognises(file: Opened) -> bool:
    """Return whether the first line of a file names columns layer and expert."""
    try:
        header = file.head[:LONGEST_HEADER].partition(b"\n")[0].decode("utf-8-sig")
    except UnicodeDecodeError:
        return False
    return {"layer", "expert"} <= set(_header(header)[1])


def _header(line: str) -> tuple[str, list[str]]:
    """Return the separator and the names of columns of a header."""
    separator, names = split_cells(line)
    if "token" in names:
        return separator, names
    return separator, [ALIASES.get(name.lower(), name) for name in names]


@contextmanager
def open_table(path: Path) -> Iterator[OpenTable]:
    """Open a file as a table."""
    size_of(path)
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline(LONGEST_HEADER)
        separator, names = _header(header)
        for name in COLUMNS:
            if names.count(name) > 1:
                pairs = zip(split_cells(header)[1], names, strict=True)
                same = [cell for cell, renamed in pairs if renamed == name]
                raise ValueError(f"line 1: must have one column {name}, got {' and '.join(same)}")
        yield OpenTable(names, None, partial(_add_lines, file, separator, names))


read = partial(read_tables, open_table)


def _add_lines(
    file: TextIO, separator: str, names: list[str], wanted: Sequence[str], add: Add
) -> None:
    """Pass all lines to ``add``, block by block."""
    number = 2
    while lines := file.readlines(BLOCK):

        def columns_of(begin: int, end: int, lines: list[str] = lines) -> dict[str, Any]:
            return _columns(lines[begin:end], separator, names, wanted)

        add_rows(add, columns_of, len(lines), f"line {number}")
        number += len(lines)


def _columns(
    lines: list[str], separator: str, names: list[str], wanted: Sequence[str]
) -> dict[str, Any]:
    """Read columns of lines: integers, or labels as texts."""
    if any(line.count('"') % 2 for line in lines):
        raise ValueError("must be CSV: quotes must end on their line")
    kinds = [np.int64 if name in wanted and name not in LABELS else object for name in names]
    fields: Any = [(str(at), kind) for at, kind in enumerate(kinds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing but blank lines
        warnings.simplefilter("error", DeprecationWarning)  # 1.5 as an integer
        try:
            table = np.loadtxt(
                lines, fields, delimiter=separator, quotechar='"', comments=None, ndmin=1
            )
        except ValueError as error:
            text = str(error).partition(" at row")[0]
            rule = f"must have {len(names)} values, integers but for sequence and group"
            raise ValueError(f"{rule}: {text}") from None
    return {name: table[str(at)] for at, name in enumerate(names) if name in wanted}
