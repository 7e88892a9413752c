"""Read load tables as people and servers write them: CSV, JSON, bare ``.npy``, Prometheus.

``docs/loads.md`` has the forms. Loads of GPUs, and logs of their balancedness, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from moetuner.formats.load_rows import LAYER, read_header, read_rows
from moetuner.formats.records import MARK
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
LIMITS = {"layer": LAYER_LIMIT, "expert": EXPERT_LIMIT}
RECORD_EXPERTS = (
    "record experts instead: SGLang's /dump_expert_distribution_record, MOETUNER_RECORD with a "
    "plugin, or --enable-return-routed-experts (docs/loads.md)"
)


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
        return read_rows if read_header(text) is not None else None


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


def _array(path: Path, _: Hints) -> NDArray[np.int64]:
    """Read a bare array; without windows, its layers must have about the same number of choices."""
    table = counts_in("load", npz.read_npy(path))
    sums = table.sum(axis=-1)
    least = sums.min(initial=sums.max(), where=sums > 0)
    if table.ndim == 2 and sums.max() > 2 * least:
        rule = "ids [tokens, layers, top_k] or counts [layers, experts], all layers alike"
        got = f"{list(table.shape)} with {least} to {sums.max()} in a row"
        raise ValueError(f"must be {rule}; got {got}")
    return table


def _records(path: Path, _: Hints) -> NDArray[np.int64]:
    """Read loads of slots, a window per line, of vLLM's expert_load_stats_path (PR 41141)."""
    windows: list[NDArray[np.int64]] = []
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


def _log(*_: Any) -> NDArray[np.int64]:
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
        layers = [text for key, text in labels if LAYER.fullmatch(key)]
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
