"""Load tables as people and servers write them: plain CSV and JSON, bare ``.npy``, Prometheus.

``docs/loads.md`` has the forms. What counts GPUs, or says only how balanced they are, is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT
from moetuner.files import naming, npz, read_whole, safetensors
from moetuner.files.text import parse_json
from moetuner.formats.counts import by_expert, counts_in, statistics_of
from moetuner.formats.hints import Hints
from moetuner.formats.records import MARK, head
from moetuner.statistics import RoutingStatistics

# No model chooses more experts per token: longer rows that name one twice are counts.
MOST_CHOSEN = 32
# Windows that distinguish ids from counts, and how far sums of their layers may be apart.
FIRST, ALIKE = 64, 1.1

RECORD = '"eplb_load_stats"'
LOG = re.compile(r"EPLB step: \d|\[Expert Balancedness\]|balancedness=\d")
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)\{(.*)\} +([-+.\w]+)(?: +\d+)?$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
EXPERT = re.compile(r"(?:logical_|log_)?expert(?:_?(?:id|idx|index))?")
KINDS = {
    "window": re.compile(r"window|step|iteration|pass|time"),
    "layer": re.compile(r"(?:(?:moe_)?layer(?:_?(?:id|idx|index))?)?"),  # pandas gives no name
}
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", re.ASCII)
LAST = re.compile(r"\d+$", re.ASCII)
LONGEST_HEADER = 1 << 16
RECORD_EXPERTS = (
    "record experts instead: SGLang's /dump_expert_distribution_record, MOETUNER_RECORD with a "
    "plugin, or --enable-return-routed-experts (docs/loads.md)"
)

LoadCounts = NDArray[np.int64]


def recognises(path: Path) -> bool:
    """Whether a file is a load table of one of these forms."""
    return _reader_of(path) is not None


def read(paths: Sequence[Path], hints: Hints) -> RoutingStatistics:
    """Read load tables, one after the other; scrapes of Prometheus as what was counted between."""
    readers = [_reader_of(path) for path in paths]
    if {*readers} == {_scrapes}:
        with naming(paths[0]):
            return statistics_of(_scrapes(paths, hints), hints)
    parts = []
    for path, reader in zip(paths, readers, strict=True):
        with naming(path):
            if reader is None or reader is _scrapes:
                raise ValueError("must be a load table like the others (docs/loads.md)")
            parts.append(statistics_of(reader(path), hints))
    return RoutingStatistics.sum(parts)


def _reader_of(path: Path) -> Callable[..., NDArray[Any]] | None:
    start = head(path)
    if start.startswith(npz.MAGIC):
        return _array if _holds_counts(path) else None
    text = start.decode("latin-1").removeprefix(MARK).lstrip()
    if not text or "\0" in text:
        return None
    if text.startswith("{"):
        return _records if RECORD in text else None
    if re.match(r"\[\s*\[", text):
        return lambda path: np.asarray(json.loads(read_whole(path)))
    if LOG.search(text):
        return _log
    if SAMPLE.search(text):
        return _scrapes
    return _csv if _columns(text) is not None else None


def _holds_counts(path: Path) -> bool:
    """Whether a bare array cannot be ids [T,L,K]: of two axes, with fractions, or too large.

    So are rows that repeat experts, if they are long, or if those of all layers add up alike: with
    few choices a repeated expert may be damage.
    """
    try:
        with path.open("rb") as file:
            stored, fortran = npz.read_npy_header(file)
        if stored.dtype.kind not in "iuf" or len(stored.shape) not in (2, 3) or 0 in stored.shape:
            return False
        if len(stored.shape) == 2:
            return True
        begin = replace(stored, shape=(min(FIRST, stored.shape[0]), *stored.shape[1:]))
        first = npz.read_npy(path)[:FIRST] if fortran else safetensors.read(path, begin)
        counts_in("load", first)
    except ValueError as error:
        # Else the reader of moetuner's own says what is wrong.
        return "whole numbers" in str(error)
    if first.max() >= 1 << 16:
        return True
    in_order, sums = np.sort(first, axis=2), first.sum(axis=2, dtype=np.float64)
    repeats = ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] > 1)).any()
    sums = sums[:, sums.any(axis=0)]
    alike = sums.shape[1] > 1 and (sums.max(axis=1) <= ALIKE * sums.min(axis=1)).all()
    return bool(repeats and (first.shape[2] > MOST_CHOSEN or alike))


def _array(path: Path) -> LoadCounts:
    """Read a bare array; of one without windows, layers must have about as many choices."""
    table = counts_in("load", npz.read_npy(path))
    sums = table.sum(axis=-1)
    least = sums.min(initial=sums.max(), where=sums > 0)
    if table.ndim == 2 and sums.max() > 2 * least:
        rule = "ids [tokens, layers, top_k] or counts [layers, experts], all layers alike"
        got = f"{list(table.shape)} with {least} to {sums.max()} in a row"
        raise ValueError(f"must be {rule}; got {got}")
    return table


def _records(path: Path) -> LoadCounts:
    """Read what vLLM's expert_load_stats_path gets (PR 41141): loads of slots, a window a line."""
    windows: list[LoadCounts] = []
    for number, line in enumerate(read_whole(path).decode("utf-8").splitlines(), 1):
        if RECORD in line:
            with naming(f"line {number}"):
                fields = parse_json(line)
                load, slots = (np.asarray(fields.get(key)) for key in ("expert_load", "p2l_map"))
                if slots.ndim != 2 or slots.dtype.kind not in "iu":
                    raise ValueError("p2l_map must be lists of experts, one for every layer")
                windows.append(by_expert(counts_in("expert_load", load), slots, None))
    return np.stack(windows)


def _log(_: Path) -> LoadCounts:
    raise ValueError(f"this log says how balanced GPUs are, not experts' loads: {RECORD_EXPERTS}")


def _scrapes(paths: Sequence[Path], hints: Hints) -> NDArray[Any]:
    """Read scrapes of Prometheus; experts without a counter were never chosen."""
    scrapes = [_samples(read_whole(path).decode("utf-8")) for path in paths]
    layers, experts = (sorted({key[at] for counts in scrapes for key in counts}) for at in range(2))
    width = hints.num_experts or experts[-1] + 1
    if not 0 <= experts[0] <= experts[-1] < min(width, EXPERT_LIMIT):
        raise ValueError(f"experts must be from 0 to {width - 1}, got {experts[-1]}")
    total = np.zeros((len(scrapes), len(layers), width))
    for scrape, counts in zip(total, scrapes, strict=True):
        for (layer, expert), value in counts.items():
            scrape[layers.index(layer), expert] = value
    load = np.diff(total, axis=0) if len(total) > 1 else total
    if load.min() < 0:
        raise ValueError("counters must grow from scrape to scrape: did a server restart?")
    return load


def _samples(text: str) -> dict[tuple[int, int], float]:
    """Return the counter by layer and expert, added up over other labels."""
    metrics: dict[str, dict[tuple[int, int], float]] = {}
    for name, parts, value in SAMPLE.findall(text):
        labels = LABEL.findall(parts)
        layer = [value for key, value in labels if KINDS["layer"].fullmatch(key)]
        expert = [value for key, value in labels if EXPERT.fullmatch(key)]
        if layer and expert and not name.endswith(("_created", "_bucket")):
            key, cells = (int(layer[0]), int(expert[0])), metrics.setdefault(name, {})
            cells[key] = cells.get(key, 0.0) + float(value)
    if len(metrics) != 1:
        got = ", ".join(metrics) or f"none: {RECORD_EXPERTS}"
        raise ValueError(f"must have one metric with labels layer and expert, got {got}")
    return metrics.popitem()[1]


def _cells(line: str) -> tuple[str, list[str]]:
    separator = max(",;\t", key=line.count)
    return separator, [cell.strip().strip('"').lower() for cell in line.split(separator)]


def _columns(text: str) -> tuple[bool, dict[str, int], list[int]] | None:
    """Return whether there is a header, the columns of window and layer, and those of experts."""
    lines = text[:LONGEST_HEADER].split("\n", 2)[:2]
    names, row = (_cells(line)[1] for line in (lines[0], lines[-1]))
    if len(names) > 1 and all(map(NUMBER.fullmatch, names)):
        return False, {}, [*range(len(names))]
    experts = sorted(
        (int(number[0]), at) for at, number in enumerate(map(LAST.search, names)) if number
    )
    columns = {
        k: at for at, n in enumerate(names) for k, pattern in KINDS.items() if pattern.fullmatch(n)
    }
    is_table = experts and len(columns) + len(experts) == len(names) == len(row)
    if not is_table or not all(map(NUMBER.fullmatch, row)):
        return None
    return True, columns, [at for _, at in experts]


def _csv(path: Path) -> NDArray[Any]:
    """Read rows of counts: a row is a layer, and an empty line or a column begins a window."""
    text = read_whole(path).decode("utf-8-sig").strip()
    has_names, columns, experts = _columns(text) or (False, {}, [])
    lines = text.split("\n")[has_names:]
    rows = [line.replace('"', "") for line in lines if line.strip()]
    if not rows or not experts:
        raise ValueError("must have rows of counts, got none")
    table = np.loadtxt(rows, delimiter=_cells(rows[0])[0], ndmin=2, comments=None)
    window, layer = (table[:, columns[kind]].tolist() if kind in columns else [] for kind in KINDS)
    if not columns:
        empty = np.array([not line.strip() for line in lines])
        window = np.cumsum(empty)[~empty].tolist()
        if len(rows) > 2 and (np.diff(table[:, 0]) == 1).all():
            raise ValueError("the first column counts rows: name the columns, as in layer,0,1,2")
    numbers = (window or _seen(layer), layer or _seen(window))
    (windows, at), (layers, at_layer) = (np.unique(part, return_inverse=True) for part in numbers)
    load = np.full((len(windows), len(layers), len(experts)), -1.0)
    load[at, at_layer] = table[:, experts]
    if len(rows) != len(windows) * len(layers) or load.min() < 0:
        rule = f"one row of counts for each of {len(windows)} windows and {len(layers)} layers"
        raise ValueError(f"must have {rule}, got {len(rows)}")
    return load


def _seen(values: list[float]) -> list[int]:
    """Count how often every window was there before, which is the layer, or the other way round."""
    seen: Counter[float] = Counter()
    before = []
    for value in values:
        before.append(seen[value])
        seen[value] += 1
    return before
