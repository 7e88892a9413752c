"""Read load tables as people and servers write them: CSV, JSON, bare ``.npy``, Prometheus.

``docs/loads.md`` has the forms. Loads of GPUs, and logs of their balancedness, are refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT, LAYER_LIMIT, shown
from moetuner.files import naming, npz, read_whole
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats.counts import (
    COUNT_LIMIT,
    add_window,
    check_filled,
    counts_in,
    make_statistics,
    sum_by_expert,
)
from moetuner.formats.hints import Hints
from moetuner.formats.records import MARK
from moetuner.formats.rows import split_cells
from moetuner.statistics import RoutingStatistics

# No model chooses more experts per token: longer rows with a repeated number are counts.
MOST_CHOSEN = 32
# Windows that are read to distinguish ids from counts.
FIRST = 64
# Layers have about the same sum of counts if the ratio of any two sums is at most this.
ALIKE = 1.1

RECORD = '"eplb_load_stats"'
LOG = re.compile(r"EPLB step: \d|\[Expert Balancedness\]|balancedness=\d")
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)\{(.*)\} +([-+.\w]+)(?: +\d+)?$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
EXPERT = re.compile(r"(?:logical_|log_)?expert(?:_?(?:id|idx|index))?")
KINDS = {
    "window": re.compile(r"window|step|iteration|pass|time"),
    # pandas writes the first column, its index, without a name.
    "layer": re.compile(r"(?:(?:moe_)?layer(?:_?(?:id|idx|index))?)?"),
}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", re.ASCII)
LAST = re.compile(r"(?<!\d)\d{1,9}$", re.ASCII)
LIMITS = {"layer": LAYER_LIMIT, "expert": EXPERT_LIMIT}
LONGEST_HEADER = 1 << 16
RECORD_EXPERTS = (
    "record experts instead: SGLang's /dump_expert_distribution_record, MOETUNER_RECORD with a "
    "plugin, or --enable-return-routed-experts (docs/loads.md)"
)

LoadCounts = NDArray[np.int64]


def recognises(file: Opened) -> bool:
    """Return whether a file is a load table of one of these forms."""
    return _find_reader(file) is not None


def read(files: Sequence[Opened], hints: Hints) -> RoutingStatistics:
    """Read load tables one after the other; scrapes of Prometheus become windows between them."""
    paths = [file.path for file in files]
    readers = [_find_reader(file) for file in files]
    if {*readers} == {_scrapes}:
        with naming(paths[0]):
            return make_statistics(_scrapes(paths, hints), hints)
    parts = []
    for path, reader in zip(paths, readers, strict=True):
        with naming(path):
            if reader is None or reader is _scrapes:
                raise ValueError("must be a load table like the others (docs/loads.md)")
            parts.append(make_statistics(reader(path, hints), hints))
    with naming(", ".join(map(str, paths))):
        return RoutingStatistics.sum(parts)


def _find_reader(file: Opened) -> Callable[..., NDArray[Any]] | None:
    """Return the function that reads a file, by its content; None for other files."""
    start = file.head
    if start.startswith(npz.MAGIC):
        return _array if _holds_counts(file) else None
    text = start.decode("latin-1").removeprefix(MARK).lstrip()
    if not text or "\0" in text:
        return None
    if text.startswith("{"):
        return _records if RECORD in text else None
    if re.match(r"\[\s*\[", text):
        return _lists
    if LOG.search(text):
        return _log
    if SAMPLE.search(text):
        return _scrapes
    with naming(file.path):
        return _csv if _header(text) is not None else None


def _holds_counts(file: Opened) -> bool:
    """Return whether a bare array cannot be ids [T,L,K]: by axes, fractions or large numbers.

    Rows with repeated numbers are no ids either, if they are long, or if the sums of all layers are
    about the same: a repeated expert among few choices may be damage.
    """
    try:
        rows = npz.read_npy(file.path, FIRST)
        if rows.dtype.kind not in "iuf" or rows.ndim not in (2, 3) or not rows.size:
            return False
        if rows.ndim == 2:
            return True
        first = counts_in("load", rows)
    except ValueError as error:
        # Other errors are those of the reader of moetuner's own files.
        return "whole numbers" in str(error)
    if first.max() >= 1 << 16:
        return True
    in_order, sums = np.sort(first, axis=2), first.sum(axis=2, dtype=np.float64)
    repeats = ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] > 1)).any()
    sums = sums[:, sums.any(axis=0)]
    alike = sums.shape[1] > 1 and (sums.max(axis=1) <= ALIKE * sums.min(axis=1)).all()
    return bool(repeats and (first.shape[2] > MOST_CHOSEN or alike))


def _lists(path: Path, _: Hints) -> NDArray[Any]:
    """Read nested lists of JSON."""
    try:
        return np.asarray(json.loads(read_whole(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON: {error}") from None
    except ValueError:  # lists of several lengths
        rule = "[layers][experts] or [windows][layers][experts], all layers with as many experts"
        raise ValueError(f"must be lists {rule}") from None


def _array(path: Path, _: Hints) -> LoadCounts:
    """Read a bare array; without windows, its layers must have about the same number of choices."""
    table = counts_in("load", npz.read_npy(path))
    sums = table.sum(axis=-1)
    least = sums.min(initial=sums.max(), where=sums > 0)
    if table.ndim == 2 and sums.max() > 2 * least:
        rule = "ids [tokens, layers, top_k] or counts [layers, experts], all layers alike"
        got = f"{list(table.shape)} with {least} to {sums.max()} in a row"
        raise ValueError(f"must be {rule}; got {got}")
    return table


def _records(path: Path, _: Hints) -> LoadCounts:
    """Read loads of slots, a window per line, of vLLM's expert_load_stats_path (PR 41141)."""
    windows: list[LoadCounts] = []
    for number, line in enumerate(read_whole(path).decode("utf-8").splitlines(), 1):
        if RECORD in line:
            with naming(f"line {number}"):
                fields = parse_json(line)
                load, slots = (np.asarray(fields.get(key)) for key in ("expert_load", "p2l_map"))
                if slots.ndim != 2 or slots.dtype.kind not in "iu":
                    raise ValueError("p2l_map must be lists of experts, one for every layer")
                load = counts_in("expert_load", load)
                add_window(windows, sum_by_expert(load, slots, None))
    return np.stack(windows)


def _log(*_: Any) -> LoadCounts:
    """Raise for a log of balancedness, which has no loads of experts."""
    raise ValueError(f"this log says how balanced GPUs are, not experts' loads: {RECORD_EXPERTS}")


def _scrapes(paths: Sequence[Path], hints: Hints) -> NDArray[Any]:
    """Read scrapes of Prometheus; an expert without a counter has no tokens."""
    scrapes = []
    for path in paths:
        with naming(path):
            scrapes.append(_samples(read_whole(path).decode("utf-8")))
    layers = sorted({layer for counts in scrapes for layer, _ in counts})
    highest = max(expert for counts in scrapes for _, expert in counts)
    width = hints.num_experts or highest + 1
    if highest >= width:
        raise ValueError(f"experts must be from 0 to {width - 1}, got {highest}")
    shape = (len(scrapes), len(layers), width)
    check_filled(sum(map(len, scrapes)), shape)
    total = np.zeros(shape)
    row_of = {layer: row for row, layer in enumerate(layers)}
    for scrape, counts in zip(total, scrapes, strict=True):
        for (layer, expert), value in counts.items():
            scrape[row_of[layer], expert] = value
    load = np.diff(total, axis=0) if len(total) > 1 else total
    fallen = np.argwhere(load < 0)
    if len(fallen):
        scrape, row, expert = fallen[0].tolist()
        raise ValueError(
            f"counters must grow from scrape to scrape, but that of layer {layers[row]} and expert "
            f"{expert} falls in {paths[scrape + 1].name}: did a server restart?"
        )
    return load


def _samples(text: str) -> dict[tuple[int, int], float]:
    """Return counters by layer and expert, added up over other labels."""
    metrics: dict[str, dict[tuple[int, int], float]] = {}
    last = text.rpartition("\n")[2]
    if last and not last.startswith("#") and not SAMPLE.match(last):
        raise ValueError(f"must end with a whole line, got {shown(last)}: the file is cut off")
    series: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    for number, line in enumerate(text.split("\n"), 1):
        sample = SAMPLE.match(line)
        if sample is None or sample[1].endswith(("_created", "_bucket")):
            continue
        labels = LABEL.findall(sample[2])
        layers = [text for key, text in labels if KINDS["layer"].fullmatch(key)]
        experts = [text for key, text in labels if EXPERT.fullmatch(key)]
        if not layers or not experts:
            continue
        with naming(f"line {number}"):
            key = _label("layer", layers[0]), _label("expert", experts[0])
            if (name := (sample[1], frozenset(labels))) in series:
                raise ValueError(
                    f"layer {key[0]} and expert {key[1]} must have a counter once, got it twice: "
                    "give every scrape a file of its own"
                )
            series.add(name)
            count = float(sample[3])
            if not 0 <= count < COUNT_LIMIT:
                raise ValueError(f"a counter must be from 0 to 2**48, got {sample[3]}")
            cells = metrics.setdefault(sample[1], {})
            cells[key] = cells.get(key, 0.0) + count
    if len(metrics) != 1:
        got = ", ".join(metrics) or f"none: {RECORD_EXPERTS}"
        raise ValueError(f"must have one metric with labels layer and expert, got {got}")
    return metrics.popitem()[1]


def _label(name: str, text: str) -> int:
    """Return the number of a layer or an expert in a label."""
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) >= LIMITS[name]:
        raise ValueError(f"{name} must be from 0 to {LIMITS[name] - 1}, got {shown(text)}")
    return int(text)


class _Header(NamedTuple):
    """The columns of a load table.

    They are the names of all columns, none if the table has no header; the columns of window and
    layer, by these words; and the numbers of experts with their columns.
    """

    names: list[str]
    columns: dict[str, int]
    experts: list[tuple[int, int]]


def _header(text: str) -> _Header | None:
    """Read the first line of a load table; None if the text is no load table."""
    lines = text[:LONGEST_HEADER].split("\n", 2)[:2]
    names, row = (split_cells(line.lower())[1] for line in (lines[0], lines[-1]))
    if len(names) > 1 and all(map(NUMBER.fullmatch, names)):
        return _Header([], {}, [(at, at) for at in range(len(names))])
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
    return _Header(names, {kind: places[0] for kind, places in columns.items()}, experts)


def _csv(path: Path, hints: Hints) -> NDArray[Any]:
    """Read rows of counts: a row is a layer, and an empty line, or the window column, a new window.

    Experts without tokens may have no column, as in a pivot table.
    """
    text = read_whole(path).decode("utf-8-sig")
    header = _header(text.lstrip())
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


def _experts(header: _Header, hints: Hints) -> tuple[int, int]:
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


def _numbers(lines: list[str], filled: list[int], header: _Header) -> NDArray[np.float64]:
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


def _column(header: _Header, column: int) -> str:
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
