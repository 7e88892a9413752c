"""--group-by: groups of INPUT by the names in a file, or by INPUT's files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import naming, read_whole
from moetuner.files.cells import counted
from moetuner.formats import native
from moetuner.formats.hints import Traffic
from moetuner.recording import Recording
from moetuner.statistics import WINDOW

# Stands for the names of INPUT's files.
FILES = "files"
# Columns that hold the names of requests, as responses of engines repeat them.
REQUESTS = ("request_id", "id", "rid")
# The place of a name in its file, the name, and its request if the file names requests.
Row = tuple[str, str, str | None]
# Reads files; takes the groups of requests by name, if a file has them.
Read = Callable[[Sequence[Path], Mapping[str, str] | None], Traffic]


def locate_names(text: str, beside: Path) -> str | None:
    """Return the file of names of --group-by, here or beside another file; None if it is gone."""
    if text == FILES:
        return text
    folder = beside.parent
    for path in (text, str(folder / text)):
        if Path(path).is_file() or Path(path.rpartition(":")[0] or path).is_file():
            return path
    return None


def read_names(text: str) -> list[Row]:
    """Read a name from every line of a file, or from a column: FILE.csv:COLUMN."""
    path, column = Path(text), ""
    if not path.is_file():
        file, _, column = text.rpartition(":")
        path = Path(file)
    if not path.is_file():
        raise click.UsageError(f"'--group-by' must be a file, FILE:COLUMN or files, got '{text}'.")
    try:
        with naming(path):
            content = read_whole(path).decode("utf-8-sig")
            rows = _rows(content, column) if column else _lines(content)
            for where, name, _ in rows:
                if not name:
                    raise ValueError(f"{where} must have a name of a group, got none")
    except ValueError as error:
        raise click.UsageError(f"'--group-by': {error}") from None
    return rows


def _lines(content: str) -> list[Row]:
    """Read a name from every line."""
    lines = content.removesuffix("\n").split("\n") if content else []
    return [(f"line {number}", line.strip(), None) for number, line in enumerate(lines, 1)]


def _rows(content: str, column: str) -> list[Row]:
    """Read a column of a CSV, with the ids of requests if it has them.

    Every row must have all cells: a row that was cut off could name a wrong group.
    """
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        keys = [name for name in REQUESTS if name in header and name != column][:1]
        for name in (column, *keys):
            if header.count(name) != 1:
                got = ", ".join(header) or "none"
                raise ValueError(f"must have one column {name}, got columns {got}")
        end = reader.line_num
        for cells in reader:
            where, end = f"line {end + 1}", reader.line_num
            if len(cells) != len(header) and cells:
                raise ValueError(f"{where} must have {len(header)} cells, got {len(cells)}")
            if cells:
                request = cells[header.index(keys[0])].strip() if keys else None
                rows.append((where, cells[header.index(column)].strip(), request))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} must be CSV: {error}") from None
    return rows


def _check_requests(rows: Sequence[Row], text: str) -> None:
    """Check that every request has one group."""
    groups: dict[str, str] = {}
    for where, name, request in rows:
        if request and groups.setdefault(request, name) != name:
            raise click.UsageError(
                f"'--group-by': {text}: {where}: request {shown(request)} must have one group, got "
                f"{shown(groups[request])} and {shown(name)}"
            )


def group_input(text: str, paths: Sequence[Path], read: Read, window: int = WINDOW) -> Traffic:
    """Read files, with the groups that --group-by names.

    There is a name for each request (if both files name requests), each sequence in the order of
    labels, each window, or each file. ``window`` is the tokens per window of a trace.
    """
    if text == FILES:
        return _group_files(paths, _distinct_names(paths), read)
    rows = read_names(text)
    names = [name for _, name, _ in rows]
    requests = {request: name for _, name, request in rows if request}
    traffic = read(paths, requests or None)
    if requests and traffic.group is not None and {*traffic.group_names} <= {*requests.values()}:
        _check_requests(rows, text)
        return traffic
    labels = list(dict.fromkeys(names))
    numbers = np.array([labels.index(name) for name in names])
    first, *others = divisions = _list_divisions(traffic, window)
    if len(names) == first.number:
        return _label(traffic, numbers[first.part_of_row()], labels)
    if len(names) == len(paths):
        return _group_files(paths, names, read)
    for division in others:
        if len(names) == division.number:
            return _label(traffic, numbers[division.part_of_row()], labels)
    hint = f"; to take a column of the CSV: {text}:COLUMN" if text.lower().endswith(".csv") else ""
    of_input = ", ".join(f"{division.number} {division.what}" for division in divisions)
    raise click.UsageError(
        f"'--group-by' must have a name for each of {of_input} or "
        f"{counted(len(paths), 'file')}, got {len(names)} names{hint}."
    )


class _Division(NamedTuple):
    """A division of INPUT into parts with a group each: number, kind, and part of each row."""

    number: int
    what: str
    part_of_row: Callable[[], NDArray[np.int64]]


def _list_divisions(recording: Recording, window: int) -> list[_Division]:
    """Return the divisions of a recording: by window, and of a trace by sequence first."""
    length = recording.length
    if not recording.ordered:
        return [_Division(length, "windows", lambda: np.arange(length))]
    labels, part_of = np.zeros(0, np.int32), np.zeros(0, np.int64)
    if recording.sequence is not None:
        labels, part_of = np.unique(recording.sequence, return_inverse=True)
    sequences = _Division(len(labels), "sequences", lambda: part_of)
    tokens = f"windows of {window:,} tokens"
    return [sequences, _Division(-(-length // window), tokens, lambda: np.arange(length) // window)]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return names of files without endings; with endings or folders where names repeat."""
    for names in ([path.stem for path in paths], [path.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _label(traffic: Traffic, group: Any, names: Sequence[str]) -> Traffic:
    """Return traffic with the groups of its tokens, or windows."""
    return replace(traffic, group=group, group_names=tuple(names), population=None)


def _group_files(paths: Sequence[Path], names: Sequence[str], read: Read) -> Traffic:
    """Read files, each as a group."""
    recordings: list[Traffic] = []
    for path, name in zip(paths, names, strict=True):
        recording = read([path], None)
        recordings.append(_label(recording, np.zeros(recording.length, np.int64), [name]))
    return native.join(recordings, paths)
