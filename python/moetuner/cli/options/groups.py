"""--group-by: groups for INPUT that brings none, named by a file or by INPUT's files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from moetuner.evaluation.replay import Traffic
from moetuner.formats import own
from moetuner.report.cells import counted
from moetuner.statistics import WINDOW
from moetuner.trace import RoutingTrace

# Stands for the names of INPUT's files.
FILES = "files"
# Columns that hold the names of requests, as responses of engines repeat them.
REQUESTS = ("request_id", "id", "rid")
# Reads files, with the groups of requests by their names where they are known.
Read = Callable[[Sequence[Path], Mapping[str, str] | None], Traffic]


def read_names(text: str) -> tuple[list[str], dict[str, str] | None]:
    """Read a name from every line of a file, or from a column: FILE.csv:COLUMN.

    Returns the names, and those of requests by their ids where another column has these.
    """
    requests = None
    path, column = Path(text), ""
    if not path.is_file():
        file, _, column = text.rpartition(":")
        path = Path(file)
    if not path.is_file():
        raise click.UsageError(f"'--group-by' must be a file, FILE:COLUMN or files, got '{text}'.")
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    if not column:
        names = [line.strip() for line in lines]
    else:
        rows = csv.DictReader(lines)
        if column not in (rows.fieldnames or ()):
            columns = ", ".join(rows.fieldnames or ())
            raise click.UsageError(f"'--group-by': {path} has no column {column}, but {columns}.")
        cells = list(rows)
        names = [str(row[column]).strip() for row in cells]
        keys = [name for name in REQUESTS if name in (rows.fieldnames or ()) and name != column]
        if keys:
            requests = {
                str(row[keys[0]]).strip(): name for row, name in zip(cells, names, strict=True)
            }
    if "" in names:
        raise click.UsageError(f"'--group-by': line {names.index('') + 1} of {path} has no name.")
    return names, requests


def group_input(
    text: str,
    paths: Sequence[Path],
    read: Read,
    window: int = WINDOW,
) -> Traffic:
    """Return what files hold, with the groups that ``--group-by`` names.

    Names are of requests, where responses and the file name them, of sequences, in the order of
    their labels, of windows, or of files. Windows of a trace have so many tokens.
    """
    if text == FILES:
        return _group_files(paths, [path.stem for path in paths], read)
    names, requests = read_names(text)
    traffic = read(paths, requests)
    if requests and traffic.group is not None and {*traffic.group_names} <= {*requests.values()}:
        return traffic
    is_trace = isinstance(traffic, RoutingTrace)
    if not isinstance(traffic, RoutingTrace):
        size = traffic.windows
        part_of = np.arange(size)
    elif traffic.sequence is not None:
        sequences, part_of = np.unique(traffic.sequence, return_inverse=True)
        size = len(sequences)
    else:
        size, part_of = 0, np.zeros(0, np.int64)
    if len(names) == size:
        labels = list(dict.fromkeys(names))
        numbers = np.array([labels.index(name) for name in names])
        return _label(traffic, numbers[part_of], labels)
    if len(names) == len(paths):
        return _group_files(paths, names, read)
    parts = f"{size} {'sequences' if is_trace else 'windows'}"
    if isinstance(traffic, RoutingTrace):
        count = -(-traffic.tokens // window)
        if len(names) == count:
            labels = list(dict.fromkeys(names))
            numbers = np.array([labels.index(name) for name in names])
            return _label(traffic, numbers[np.arange(traffic.tokens) // window], labels)
        parts += f", {count} windows of {window:,} tokens"
    raise click.UsageError(
        f"'--group-by' must have a name for each of {parts} or {counted(len(paths), 'file')}, got "
        f"{len(names)} names{_column_hint(text)}."
    )


def _column_hint(text: str) -> str:
    """Write how to name a column, where a whole CSV was taken for names."""
    is_table = text.lower().endswith(".csv")
    return f"; to take a column of the CSV: {text}:COLUMN" if is_table else ""


def _label(traffic: Traffic, group: Any, names: Sequence[str]) -> Traffic:
    """Return traffic with the groups of its tokens, or windows."""
    return replace(traffic, group=group, group_names=tuple(names))


def _group_files(paths: Sequence[Path], names: Sequence[str], read: Read) -> Traffic:
    """Return what files hold, each of them in a group."""
    parts: list[Traffic] = []
    for path, name in zip(paths, names, strict=True):
        part = read([path], None)
        length = part.tokens if isinstance(part, RoutingTrace) else part.windows
        parts.append(_label(part, np.zeros(length, np.int64), [name]))
    return own.join(parts)
