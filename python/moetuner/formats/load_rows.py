"""Read load tables as rows of CSV, with a column of counts for every expert.

A row is a layer of a window. ``formats/csv.py`` reads tables with a row for every choice.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import LAYER_LIMIT, shown
from moetuner.files import read_whole
from moetuner.formats.counts import COUNT_LIMIT, check_filled
from moetuner.formats.hints import Hints
from moetuner.formats.rows import split_cells

# Names of columns, and of labels, that say which layer is counted.
LAYER = re.compile(r"(?:moe_)?layer(?:_?(?:id|idx|index))?")
KINDS = {
    "window": re.compile(r"window|step|iteration|pass|time"),
    # pandas writes the first column, its index, without a name.
    "layer": re.compile(rf"(?:{LAYER.pattern})?"),
}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", re.ASCII)
LAST = re.compile(r"(?<!\d)\d{1,9}$", re.ASCII)
LONGEST_HEADER = 1 << 16


class CountColumns(NamedTuple):
    """The columns of a load table.

    They are the names of all columns, none if the table has no header; the columns of window and
    layer, by these words; and the numbers of experts with their columns.
    """

    names: list[str]
    columns: dict[str, int]
    experts: list[tuple[int, int]]


def read_header(text: str) -> CountColumns | None:
    """Read the first line of a load table; None if the text is no load table."""
    lines = text[:LONGEST_HEADER].split("\n", 2)[:2]
    names, row = (split_cells(line.lower())[1] for line in (lines[0], lines[-1]))
    if len(names) > 1 and all(map(NUMBER.fullmatch, names)):
        return CountColumns([], {}, [(at, at) for at in range(len(names))])
    numbers = enumerate(map(LAST.search, names))
    experts = sorted((int(number[0]), at) for at, number in numbers if number)
    columns: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        for kind, pattern in KINDS.items():
            if pattern.fullmatch(name) and (name or not at):
                columns.setdefault(kind, []).append(at)
    if not experts or sum(map(len, columns.values())) + len(experts) != len(names):
        return None
    # Without a column of layers or windows, the next row has to show that it is such a table.
    if not columns and not (len(names) == len(row) and all(map(NUMBER.fullmatch, row))):
        return None
    for kind, places in columns.items():
        if len(places) > 1:
            same = " and ".join(names[at] for at in places)
            raise ValueError(f"line 1: must have one column of the {kind}, got {same}")
    return CountColumns(names, {kind: places[0] for kind, places in columns.items()}, experts)


def read_rows(path: Path, hints: Hints) -> NDArray[Any]:
    """Read rows of counts: a row is a layer, and an empty line, or the window column, a new window.

    Experts without tokens may have no column, as in a pivot table.
    """
    text = read_whole(path).decode("utf-8-sig")
    header = read_header(text.lstrip())
    if header is None:
        raise ValueError("must have columns window, layer and a numbered one for every expert")
    first, width = _experts(header, hints)
    lines = text.rstrip().split("\n")
    filled = [at for at, line in enumerate(lines) if line.strip()][bool(header.names) :]
    if not filled:
        raise ValueError("must have rows of counts, got none")
    table = _numbers(lines, filled, header)
    values = {kind: table[:, column].tolist() for kind, column in header.columns.items()}
    window, layer = values.get("window", []), values.get("layer", [])
    if not header.columns:
        window = (np.array(filled) - np.arange(len(filled))).tolist()
        if len(filled) > 2 and (np.diff(table[:, 0]) == 1).all():
            raise ValueError("the first column counts rows: name the columns, as in layer,0,1,2")
    labels = (window or _count_earlier(layer), layer or _count_earlier(window))
    windows, window_of_row = np.unique(labels[0], return_inverse=True)
    layers, layer_of_row = np.unique(labels[1], return_inverse=True)
    cells, rows = np.unique(window_of_row * len(layers) + layer_of_row, return_index=True)
    if len(rows) < len(filled):
        again = min({*range(len(filled))} - {*rows.tolist()})
        window_of, layer_of = windows[window_of_row[again]], layers[layer_of_row[again]]
        raise ValueError(
            f"line {filled[again] + 1}: window {window_of:g} must have layer {layer_of:g} once, "
            "got it twice"
        )
    if len(rows) < len(windows) * len(layers):
        missing = int(np.argmax(np.append(cells, -1) != np.arange(len(cells) + 1)))
        window_of, layer_of = windows[missing // len(layers)], layers[missing % len(layers)]
        raise ValueError(
            f"must have one row of counts for each of {len(windows)} windows and {len(layers)} "
            f"layers, got none of window {window_of:g}, layer {layer_of:g}"
        )
    check_filled(len(rows) * len(header.experts), (len(windows), len(layers), width))
    load = np.zeros((len(windows), len(layers), width))
    experts = [number - first for number, _ in header.experts]
    columns = [column for _, column in header.experts]
    load[window_of_row[:, None], layer_of_row[:, None], experts] = table[:, columns]
    return load


def _experts(header: CountColumns, hints: Hints) -> tuple[int, int]:
    """Return the number of the first expert in column names, 0 or 1, and the number of experts."""
    numbers = [number for number, _ in header.experts]
    for number, after in pairwise(numbers):
        if number == after:
            names = [header.names[column] for which, column in header.experts if which == number]
            raise ValueError(
                f"line 1: expert {number} must have one column, got {' and '.join(names[:2])}"
            )
    highest, experts = numbers[-1], hints.num_experts
    has_gaps = highest - numbers[0] >= len(numbers)
    first = int(highest == experts or (numbers[0] == 1 and not has_gaps))
    if numbers[0] and not first:
        raise ValueError(
            f"line 1: columns of experts must be numbered from 0, or from 1 without a gap, got "
            f"{shown(numbers)}: add a column of zeros for every expert that is missing"
        )
    width = highest + 1 - first
    return first, max(width, experts or 0) if has_gaps else width


def _numbers(lines: list[str], filled: list[int], header: CountColumns) -> NDArray[np.float64]:
    """Read the rows of a table; raise unless layers and counts are whole numbers from 0."""
    rows = [lines[at].replace('"', "") for at in filled]
    try:
        table = np.loadtxt(rows, delimiter=split_cells(rows[0])[0], ndmin=2, comments=None)
    except ValueError as error:
        width = len(header.names or header.experts)
        for at in filled:
            cells = split_cells(lines[at].lower())[1]
            for column, cell in enumerate(cells[:width]):
                if not _is_float(cell):
                    where = f"line {at + 1}, column {_column(header, column)}"
                    raise ValueError(f"{where}: must be a number, got {shown(cell)}") from None
            if len(cells) != width:
                rule = f"must have {width} numbers, got {len(cells)}"
                raise ValueError(f"line {at + 1}: {rule}") from None
        raise ValueError(f"must be rows of numbers: {error}") from None
    width = len(header.names or header.experts)
    if table.shape[1] != width:  # all rows alike, but not as line 1 says
        raise ValueError(f"line {filled[0] + 1}: must have {width} numbers, got {table.shape[1]}")
    times = header.columns.get("window")
    layers = header.columns.get("layer")
    wrong = ~np.isfinite(table)
    for column in {*range(table.shape[1])} - {times}:
        values = table[:, column]
        limit = LAYER_LIMIT if column == layers else COUNT_LIMIT
        wrong[:, column] |= (values < 0) | (values >= limit) | (values != np.floor(values))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        rule = "a time" if column == times else "a count from 0 to 2**48"
        rule = f"a layer from 0 to {LAYER_LIMIT - 1}" if column == layers else rule
        where = f"line {filled[row] + 1}, column {_column(header, column)}"
        raise ValueError(f"{where}: must be {rule}, got {table[row, column]:g}")
    return table


def _column(header: CountColumns, column: int) -> str:
    """Return the name of a column, else its number from 1."""
    return shown(header.names[column]) if header.names else str(column + 1)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _count_earlier(values: list[float]) -> list[int]:
    """Count the earlier rows with the same value; rows of a window are its layers in order."""
    counts: Counter[float] = Counter()
    earlier = []
    for value in values:
        earlier.append(counts[value])
        counts[value] += 1
    return earlier
