"""Load tables as people and servers write them: plain CSV and JSON, bare ``.npy``, Prometheus.

``docs/loads.md`` says what each must look like. Also read are the loads that vLLM's proposed
``expert_load_stats_path`` writes (PR 41141). What counts GPUs or says only how balanced they are,
as logs of vLLM and SGLang and SGLang's histogram do, is refused with what to record instead.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, npz, read_whole
from moetuner.files.text import parse_json
from moetuner.formats.counts import by_expert, counts_in
from moetuner.formats.hints import Hints
from moetuner.formats.records import MARK, head
from moetuner.statistics import RoutingStatistics

# No model chooses more experts per token: longer rows that name one twice are counts.
MOST_CHOSEN = 32
# Windows of an array that tell ids from counts, and how far sums of layers may be apart in it, and
# in a table of one window.
FIRST, ALIKE, ALIKE_ALONE = 64, 1.1, 2.0

RECORD = '"eplb_load_stats"'
LOG = re.compile(r"EPLB step: \d|\[Expert Balancedness\]|balancedness=\d")
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)\{(.*)\} +([-+.\w]+)(?: +\d+)?$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
NUMBERED = r"(?:_?(?:id|idx|index))?"
EXPERT = re.compile(rf"(?:logical_|log_)?expert{NUMBERED}")
LAYER = re.compile(rf"(?:moe_)?layer{NUMBERED}|")
WINDOW = re.compile(r"window|step|iteration|pass|time")
RECORD_EXPERTS = (
    "record experts instead: SGLang's /dump_expert_distribution_record, MOETUNER_RECORD with a "
    "plugin, or --enable-return-routed-experts (docs/loads.md)"
)

Counts = NDArray[np.int64]


def recognises(path: Path) -> bool:
    """Whether a file is a load table of one of these forms."""
    return _reader_of(path) is not None


def read(paths: Sequence[Path], hints: Hints) -> RoutingStatistics:
    """Read load tables, one after the other; scrapes of Prometheus as what was counted between."""
    tables: list[tuple[Any, Counts]] = []
    for path in paths:
        with naming(path):
            reader = _reader_of(path)
            if reader is None:
                raise ValueError("must be a load table; docs/loads.md says what is read")
            table = counts_in("load", reader(path))
            if table.ndim not in (2, 3) or 0 in table.shape:
                rule = "[layers, experts] or [windows, layers, experts]"
                raise ValueError(f"load must be {rule}, got {list(table.shape)}")
            if reader is npz.read_npy and table.ndim == 2:
                _check_rows(table)
            hints.check_experts(table.shape[-1])
            tables.append((reader, table if table.ndim == 3 else table[None]))
    with naming(paths[0]):
        if len({table.shape[1:] for _, table in tables}) > 1:
            raise ValueError("load tables must have the same layers and experts")
        load = np.concatenate([table for _, table in tables])
        if len(load) > 1 and all(reader is _prometheus for reader, _ in tables):
            load = np.diff(load, axis=0)
            if load.min() < 0:
                raise ValueError("counters must grow from scrape to scrape: did a server restart?")
        statistics = without_dense(load, hints)
        hints.check_axes(statistics)
        return statistics


def _check_rows(table: Counts) -> None:
    """Raise where the rows of a bare array [L,E] do not look like those of layers."""
    sums = table.sum(axis=1)
    sums = sums[sums > 0]
    if sums.size and sums.max() > ALIKE_ALONE * sums.min():
        raise ValueError(
            f"must be ids [tokens, layers, top_k] or counts [layers, experts], got "
            f"{list(table.shape)}, whose rows add up to {sums.min()} to {sums.max()}: in counts "
            "every layer has about as many"
        )


def without_dense(load: Counts, hints: Hints) -> RoutingStatistics:
    """Make statistics of counts [W,hidden,E], without the rows of dense layers."""
    hidden = load.shape[1]
    moe = hints.moe_layers(hidden)
    if moe is None:
        moe = np.flatnonzero(load.any(axis=(0, 2))).tolist()
    if not moe:
        raise ValueError(
            "every count is zero, so nothing was recorded: send traffic while the recorder runs, "
            "then dump it"
        )
    dense = tuple(sorted(set(range(hidden)) - set(moe)))
    return RoutingStatistics.from_load(load[:, moe], left_out=(hidden, dense) if dense else None)


def _reader_of(path: Path) -> Callable[[Path], NDArray[Any]] | None:
    start = head(path)
    if start.startswith(npz.MAGIC):
        return npz.read_npy if _holds_counts(path) else None
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
        return _prometheus
    lines = text.splitlines()
    whole = lines[:-1] if len(start) < path.stat().st_size else lines
    return _csv if _columns(whole) is not None else None


def _holds_counts(path: Path) -> bool:
    """Whether a bare array cannot be ids [T,L,K]: of two axes, with fractions, or too large.

    So are rows that repeat experts, if they are long, or if those of all layers add up alike: with
    few choices a repeated expert may be damage.
    """
    try:
        with path.open("rb") as file:
            stored, _ = npz.read_npy_header(file)
        if stored.dtype.kind not in "iuf" or len(stored.shape) not in (2, 3) or 0 in stored.shape:
            return False
        if len(stored.shape) == 2:
            return True
        first = npz.read_npy(path)[:FIRST]
    except ValueError:
        return False  # the reader of moetuner's own says what is wrong
    if first.max() >= 1 << 16 or not (first == np.floor(first)).all():
        return True
    in_order, sums = np.sort(first, axis=2), first.sum(axis=2, dtype=np.float64)
    repeats = ((in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] > 1)).any()
    sums = sums[:, sums.any(axis=0)]
    alike = sums.shape[1] > 1 and (sums.max(axis=1) <= ALIKE * sums.min(axis=1)).all()
    return bool(repeats and (first.shape[2] > MOST_CHOSEN or alike))


def _records(path: Path) -> Counts:
    """Read the records of vLLM's load statistics: a window each, slots added up by expert."""
    windows: list[Counts] = []
    for number, line in enumerate(read_whole(path).decode("utf-8").splitlines(), 1):
        if RECORD in line:
            with naming(f"line {number}"):
                fields = parse_json(line)
                load, slots = (np.asarray(fields.get(of)) for of in ("expert_load", "p2l_map"))
                if slots.ndim != 2 or slots.dtype.kind not in "iu":
                    raise ValueError("p2l_map must be lists of experts, one for every layer")
                windows.append(by_expert(counts_in("expert_load", load), slots, None))
    return np.stack(windows)


def _log(_: Path) -> Counts:
    raise ValueError(f"this log says how balanced GPUs are, not experts' loads: {RECORD_EXPERTS}")


def _prometheus(path: Path) -> Counts:
    """Read one scrape: a counter by layer and expert, or a histogram whose buckets are experts."""
    metrics: dict[str, dict[tuple[int, int], float]] = {}
    for name, text, value in SAMPLE.findall(read_whole(path).decode("utf-8")):
        labels = dict(LABEL.findall(text))
        layer = [of for key, of in labels.items() if LAYER.fullmatch(key)]
        expert = [of for key, of in labels.items() if EXPERT.fullmatch(key)]
        if not expert and name.endswith("_bucket") and "expert" in name and "gpu" not in name:
            expert = [of for key, of in labels.items() if key == "le" and of != "+Inf"]
        if not name.endswith("_created") and layer and expert:
            key = int(layer[0]), int(float(expert[0]))
            cells = metrics.setdefault(name, {})
            cells[key] = cells.get(key, 0.0) + float(value)
    if len(metrics) != 1:
        found = f"got {', '.join(metrics)}" if metrics else f"got none: {RECORD_EXPERTS}"
        raise ValueError(f"must have one metric with labels layer and expert, {found}")
    ((name, cells),) = metrics.items()
    load = _filled([*cells], [*cells.values()])
    cumulated = name.endswith("_bucket")
    return load - np.pad(load, ((0, 0), (1, 0)))[:, :-1] if cumulated else load


def _filled(keys: list[tuple[int, int]], values: Any) -> Counts:
    """Return rows in the order of their numbers; each must have every column."""
    numbers = [sorted({key[at] for key in keys}) for at in range(2)]
    if len(numbers[0]) * len(numbers[1]) != len(keys):
        raise ValueError(
            f"must have one value for each of {len(numbers[0])} x {len(numbers[1])} rows, "
            f"got {len(keys)}"
        )
    order = np.lexsort(np.array(keys).T[::-1])
    table: Counts = counts_in("load", np.asarray(values)[order])
    return table.reshape(len(numbers[0]), len(numbers[1]), *table.shape[1:])


def _cells(line: str) -> list[str]:
    separator = max(",;\t", key=line.count)
    return [cell.strip().strip('"') for cell in line.split(separator)]


def _columns(lines: list[str]) -> tuple[int, dict[str, int], list[int]] | None:
    """Return lines of a header, columns of window and layer, and of experts; None if no table."""
    rows = [_cells(line) for line in [line for line in lines if line.strip()][:2]]
    if not rows or len(rows[0]) < 2 or not all(map(_is_number, rows[-1])):
        return None
    if all(map(_is_number, rows[0][1:])) and _is_number(rows[0][0]):
        return 0, {}, list(range(len(rows[0])))
    about, experts = {}, []
    for at, name in enumerate(name.lower() for name in rows[0]):
        number = re.search(r"\d+$", name)
        if number is not None:
            experts.append((int(number[0]), at))
        elif WINDOW.fullmatch(name):
            about["window"] = at
        elif LAYER.fullmatch(name):
            about["layer"] = at
        else:
            return None
    return (1, about, [at for _, at in sorted(experts)]) if experts and len(rows) > 1 else None


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", cell, re.ASCII) is not None


def _csv(path: Path) -> Counts:
    """Read rows of counts: a row is a layer, and an empty line or a column begins a window."""
    lines = read_whole(path).decode("utf-8-sig").splitlines()
    columns = _columns(lines)
    assert columns is not None
    header, about, experts = columns
    width, begun = len(_cells(lines[0])), 0
    rows: list[list[float]] = []
    keys: list[tuple[int, int]] = []
    seen: Counter[int] = Counter()
    for number, line in enumerate(lines[header:], header + 1):
        cells = _cells(line)
        if not line.strip():
            begun = len(rows)
            continue
        if len(cells) != width or not all(map(_is_number, cells)):
            raise ValueError(f"line {number}: must have {width} numbers, got {line:.40}")
        key = {name: int(float(cells[at])) for name, at in about.items()}
        # Of window and layer what has no column is how often the other was there before.
        given = key.get("window", key.get("layer", begun))
        of_layer = (seen[given], given)
        of_window = (given, key.get("layer", seen[given]))
        keys.append(of_layer if [*about] == ["layer"] else of_window)
        seen[given] += 1
        rows.append([float(cells[at]) for at in experts])
    if not about and len(rows) > 2 and len({row[0] - at for at, row in enumerate(rows)}) == 1:
        raise ValueError("the first column counts rows: name the columns, as in layer,0,1,2")
    return _filled(keys, rows)
