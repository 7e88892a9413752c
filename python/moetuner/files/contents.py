"""Trace files: what a safetensors, ``.npz`` or ``.npy`` file holds of a trace, and writing one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks
from moetuner._checks import experts_in, shown
from moetuner.files import Kind, kind_of, naming, npz, replacing, safetensors
from moetuner.files.ids import Ids, IdsInFile, IdsInMemory

TRACE_FORMAT = "moetuner.trace"
VERSION = "1"
TRACE_ARRAYS = ("expert_ids", "sequence", "group", "group_names", "num_experts", "model", "load")


@dataclass(frozen=True)
class TraceContents:
    """What a file says or is to say. Read ones: ids in memory are checked, labels are not."""

    ids: Ids
    num_experts: int
    sequence: NDArray[Any] | None = None
    group: NDArray[Any] | None = None
    group_names: Sequence[str] | None = None
    model: str | None = None
    expert_size: tuple[int, int] | None = None


def read_trace(path: Path, kind: Kind, num_experts: int | None) -> TraceContents:
    """Read a file of a known kind."""
    readers = {"safetensors": _trace_in_safetensors, "npz": _trace_in_npz, "npy": _trace_in_npy}
    with naming(path):
        return readers[kind](path, num_experts)


def write_trace(contents: TraceContents, path: Path, source: str | None, shard_bytes: int) -> None:
    """Write as safetensors, shard by shard; the file appears whole or not at all."""
    ids = contents.ids
    # The widest type first: then all tensors are aligned.
    tensors = {
        name: safetensors.whole(np.asarray(labels))
        for name, labels in (("sequence", contents.sequence), ("group", contents.group))
        if labels is not None
    }
    tensors["expert_ids"] = (ids.dtype, ids.shape, ids.shards(shard_bytes))
    metadata = {
        "format": TRACE_FORMAT,
        "version": VERSION,
        "num_experts": str(contents.num_experts),
        "group_names": json.dumps(contents.group_names),
        "model": contents.model,
        "expert_size": _checks.size_text(contents.expert_size),
        "source": source,
    }
    with replacing(path) as temporary:
        safetensors.write(
            temporary, tensors, {key: text for key, text in metadata.items() if text is not None}
        )


def _trace_in_safetensors(path: Path, num_experts: int | None) -> TraceContents:
    header = safetensors.read_header(path)
    about = header.metadata
    _check_format({"format": TRACE_FORMAT, "version": VERSION, **about}, TRACE_FORMAT)
    experts = _experts(num_experts, about.get("num_experts"))
    sequence, group = (
        safetensors.read(path, header.tensor(name)) if name in header else None
        for name in ("sequence", "group")
    )
    return TraceContents(
        IdsInFile.of(path, header.tensor("expert_ids"), experts),
        experts,
        sequence,
        group,
        json.loads(about.get("group_names", "null")),
        about.get("model"),
        _checks.size_of(about.get("expert_size")),
    )


def _trace_in_npz(path: Path, num_experts: int | None) -> TraceContents:
    arrays = npz.read_npz(path, TRACE_ARRAYS)
    if "expert_ids" not in arrays:
        if "load" in arrays:
            raise ValueError("holds a load table, not a trace; RoutingStatistics.load reads it")
        raise ValueError("must hold an array 'expert_ids' (or 'load', a load table)")
    experts = _experts(num_experts, npz.plain(arrays, "num_experts", "iu", 0, "one integer"))
    return TraceContents(
        IdsInMemory.of(arrays["expert_ids"], experts),
        experts,
        arrays.get("sequence"),
        arrays.get("group"),
        npz.plain(arrays, "group_names", "U", 1, "texts [n]"),
        npz.plain(arrays, "model", "U", 0, "one text"),
    )


def _trace_in_npy(path: Path, num_experts: int | None) -> TraceContents:
    with path.open("rb") as file:
        place, fortran = npz.read_npy_header(file)
    experts = _experts(num_experts, None)
    ids: Ids = IdsInFile.of(path, place, experts)
    if fortran:
        # Column-major: a token's ids are spread over the whole file.
        ids = IdsInMemory.of(npz.read_npy(path), experts)
    return TraceContents(ids, experts)


def _experts(given: int | None, in_file: int | str | None) -> int:
    """Return experts per layer: as the caller says, else as the file says."""
    if given is not None:
        return experts_in(given)
    if in_file is None:
        raise ValueError("num_experts is needed: the file does not say it")
    try:
        return experts_in(int(in_file))
    except ValueError:
        raise ValueError(f"num_experts must be from 1 to 65536, got {shown(in_file)}") from None


def _check_format(about: dict[str, str], name: str) -> None:
    given = about.get("format"), about.get("version")
    if given != (name, VERSION):
        raise ValueError(
            f"format must be {name} version {VERSION}, got {given[0]} version {given[1]}"
        )


STATISTICS_FORMAT = "moetuner.statistics"
# Sets of all layers one after the other: ids [sum N, K], counts [sum N], and how many a layer has
# [L].
SET_TABLES = ("set_ids", "set_counts", "sets_per_layer")
TABLES = ("load", "transitions", "coactivation", "group", *SET_TABLES)
LOAD_TABLE_ARRAYS = ("load", "group", "group_names", "model")


@dataclass(frozen=True)
class StatisticsContents:
    """What a file says; nothing of it is checked but that it is there."""

    tables: dict[str, NDArray[Any]]
    window: int | None
    group_names: Sequence[str]
    model: str | None
    expert_size: tuple[int, int] | None = None
    set_tokens: int | None = None


def holds_statistics(path: Path) -> bool:
    """Whether a file says that it holds counts, well or damaged."""
    kind = kind_of(path)
    if kind == "safetensors":
        return safetensors.read_header(path).metadata.get("format") == STATISTICS_FORMAT
    if kind == "npz":
        with naming(path):
            names = npz.names_in_npz(path)
            return "load" in names and "expert_ids" not in names
    return False


def read_statistics(path: Path) -> StatisticsContents:
    """Read either format."""
    kind = kind_of(path)
    with naming(path):
        if kind == "safetensors":
            return _statistics_in_safetensors(path)
        if kind == "npz":
            return _load_table(path)
        raise ValueError("must be saved statistics (safetensors) or a load table (.npz)")


def write_statistics(
    path: Path,
    tables: Mapping[str, NDArray[Any] | None],
    *,
    window: int | None,
    group_names: Sequence[str],
    model: str | None,
    expert_size: tuple[int, int] | None = None,
    set_tokens: int | None = None,
) -> None:
    """Write as safetensors; the file appears whole or not at all."""
    metadata = {
        "format": STATISTICS_FORMAT,
        "version": VERSION,
        "group_names": json.dumps(group_names),
        "window": None if window is None else str(window),
        "model": model,
        "expert_size": _checks.size_text(expert_size),
        "set_tokens": None if set_tokens is None else str(set_tokens),
    }
    with replacing(path) as temporary:
        safetensors.write(
            temporary,
            {name: safetensors.whole(table) for name, table in tables.items() if table is not None},
            {key: text for key, text in metadata.items() if text is not None},
        )


def _statistics_in_safetensors(path: Path) -> StatisticsContents:
    header = safetensors.read_header(path)
    about = header.metadata
    _check_format(about, STATISTICS_FORMAT)
    header.tensor("load")
    window, sampled = about.get("window"), about.get("set_tokens")
    return StatisticsContents(
        {name: safetensors.read(path, header.tensor(name)) for name in TABLES if name in header},
        None if window is None else int(window),
        json.loads(about.get("group_names", "[]")),
        about.get("model"),
        _checks.size_of(about.get("expert_size")),
        None if sampled is None else int(sampled),
    )


def _load_table(path: Path) -> StatisticsContents:
    arrays = npz.read_npz(path, LOAD_TABLE_ARRAYS)
    if "load" not in arrays:
        if "expert_ids" in npz.names_in_npz(path):
            raise ValueError("holds a trace, not a load table; RoutingTrace.load reads it")
        raise ValueError("must hold an array 'load' (or 'expert_ids', a trace)")
    group_names = npz.plain(arrays, "group_names", "U", 1, "texts [n]")
    if group_names is None:
        group_names = _checks.numbered(arrays["group"]) if "group" in arrays else []
    model = npz.plain(arrays, "model", "U", 0, "one text")
    return StatisticsContents(
        {k: arrays[k] for k in ("load", "group") if k in arrays}, None, group_names, model
    )
