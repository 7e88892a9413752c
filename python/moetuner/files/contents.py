"""Read and write traces and statistics: safetensors, ``.npz`` and ``.npy``."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks
from moetuner._checks import ArgumentError, MissingArgumentError, experts_in, shown
from moetuner.files import naming, npz, replacing, safetensors
from moetuner.files.ids import Ids, in_memory
from moetuner.files.opened import Opened

TRACE_FORMAT, STATISTICS_FORMAT = "moetuner.trace", "moetuner.statistics"
VERSION = "1"
# Sets of all layers one after the other: ids [sum N, K], counts [sum N], and sets per layer [L].
SET_TABLES = ("set_ids", "set_counts", "sets_per_layer")
TABLES = ("load", "transitions", "coactivation", "group", *SET_TABLES)
# Tables and numbers of a ``Population``, as a file has them.
Population = tuple[dict[str, NDArray[Any]], dict[str, int | None]]
POPULATION = "population."
ARRAYS = ("expert_ids", "load", "sequence", "group")
# Further arrays of an archive, which describe these: numpy's letters of the types that they may
# have, their dimensions, and both in words.
ABOUT = {
    "group_names": ("U", 1, "texts [n]"),
    "model": ("U", 0, "one text"),
    "num_experts": ("iu", 0, "one integer"),
}


@dataclass(frozen=True)
class TraceContents:
    """The contents of a trace's file; of those that were read, labels are not checked yet."""

    ids: Ids
    num_experts: int
    sequence: NDArray[Any] | None = None
    group: NDArray[Any] | None = None
    group_names: Sequence[str] | None = None
    model: str | None = None
    expert_size: tuple[int, int] | None = None
    population: Population | None = None


class TraceInParts:
    """A trace that is added part by part: ids are checked, and stored in the narrowest type."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts, self.tokens = num_experts, 0
        self.ids: list[NDArray[Any]] = []
        self.labels: dict[str, list[NDArray[Any]]] = {}

    def add(self, ids: NDArray[Any], **labels: NDArray[Any]) -> None:
        """Add tokens [t,L,K] of the same sizes as those before, and their labels [t]."""
        if not self.ids:
            _checks.check_sizes(ids.shape, ids.dtype, self.num_experts)
        part: NDArray[Any] = _checks.valid(ids, self.num_experts, self.tokens)
        self.ids.append(part.astype("u1" if self.num_experts <= 256 else "u2", copy=False))
        self.tokens += len(ids)
        for name, values in labels.items():
            self.labels.setdefault(name, []).append(values)

    def contents(self, **fields: Any) -> TraceContents:
        """Return the trace with further fields, and drop its parts; there must be one or more."""
        ids: Any = np.empty((self.tokens, *self.ids[0].shape[1:]), self.ids[0].dtype)
        end = self.tokens
        while self.ids:  # memory of a part is free as soon as it is copied
            last_ids = self.ids.pop()
            ids[end - len(last_ids) : end] = last_ids
            end -= len(last_ids)
        labels = {name: np.concatenate(parts) for name, parts in self.labels.items()}
        return TraceContents(in_memory(ids), self.num_experts, **{**labels, **fields})


def read_trace(file: Opened, num_experts: int | None) -> TraceContents:
    """Read a file of arrays."""
    path, kind = file.path, file.kind
    with naming(path):
        arrays: dict[str, NDArray[Any]] = {}
        metadata: dict[str, Any] = {}
        if kind == "npy":
            place, fortran = npz.read_npy_header(io.BytesIO(file.head))
            # Column-major, a token's ids are spread over the whole file.
            values = npz.read_npy(path) if fortran else None
        elif kind == "npz":
            arrays, metadata = _read_archive(path, "expert_ids")
            values = arrays["expert_ids"]
        else:
            header, values = file.header, None
            # The library of safetensors writes neither format nor version.
            metadata = _parse_metadata(
                {"format": TRACE_FORMAT, "version": VERSION, **header.metadata}, TRACE_FORMAT
            )
            place = header.tensor("expert_ids")
            arrays = _read_tables(path, header, ("sequence", "group"))
            metadata["population"] = _read_population(path, header)
        experts = _choose_experts(num_experts, metadata.pop("num_experts", None))
        return TraceContents(
            Ids.in_file(path, place, experts) if values is None else Ids.of(values, experts),
            experts,
            arrays.get("sequence"),
            arrays.get("group"),
            **metadata,
        )


def write_trace(contents: TraceContents, path: Path, source: str | None, shard_bytes: int) -> None:
    """Write as safetensors, shard by shard; the file appears whole or not at all."""
    ids = contents.ids
    # The widest type first: then all tensors are aligned.
    tensors = {
        name: safetensors.whole(np.asarray(labels))
        for name, labels in (("sequence", contents.sequence), ("group", contents.group))
        if labels is not None
    }
    # Tensors of 64 bits come first, and ids of the narrowest type last.
    tensors = _pieces_of(contents.population) | tensors
    tensors["expert_ids"] = (ids.dtype, ids.shape, ids.shards(shard_bytes))
    names = ("num_experts", "group_names", "model", "expert_size")
    labels = {name: getattr(contents, name) for name in names}
    facts = {**labels, "source": source, **_facts_of(contents.population)}
    _write(path, tensors, {"format": TRACE_FORMAT, **facts})


def holds_statistics(file: Opened) -> bool:
    """Return whether a file claims to hold counts; it may be damaged."""
    if file.kind == "safetensors":
        return file.header.metadata.get("format") == STATISTICS_FORMAT
    return file.kind == "npz" and "load" in file.names and "expert_ids" not in file.names


def is_own(file: Opened) -> bool:
    """Return whether a file claims that moetuner wrote it, so that its axes are known."""
    forms = (TRACE_FORMAT, STATISTICS_FORMAT)
    return file.kind == "safetensors" and file.header.metadata.get("format") in forms


def read_statistics(file: Opened) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read saved statistics or a load table, unchecked: tables, and metadata."""
    path, kind = file.path, file.kind
    with naming(path):
        if kind == "npz":
            arrays, metadata = _read_archive(path, "load")
            if metadata["group_names"] is None and "group" in arrays:
                metadata["group_names"] = _checks.name_groups(arrays["group"])
            del metadata["num_experts"]
            return {name: arrays[name] for name in arrays if name in TABLES}, metadata
        if kind != "safetensors":
            raise ValueError("must be saved statistics (safetensors) or a load table (.npz)")
        header = file.header
        metadata = _parse_metadata(header.metadata, STATISTICS_FORMAT)
        header.tensor("load")
        del metadata["num_experts"]
        for name in ("window", "set_tokens", "top_k"):
            metadata[name] = _parse_integer(name, header.metadata.get(name))
        metadata["population"] = _read_population(path, header)
        return _read_tables(path, header, TABLES), metadata


def write_statistics(
    path: Path, tables: Mapping[str, NDArray[Any] | None], metadata: Mapping[str, Any]
) -> None:
    """Write as safetensors; the file appears whole or not at all."""
    pieces = {name: safetensors.whole(table) for name, table in tables.items() if table is not None}
    metadata = dict(metadata)
    population = metadata.pop("population", None)
    pieces |= _pieces_of(population)
    _write(path, pieces, {"format": STATISTICS_FORMAT, **metadata, **_facts_of(population)})


def _pieces_of(population: Population | None) -> dict[str, safetensors.Pieces]:
    """Return the tables of a population, as a file has them; none without one."""
    tables = {} if population is None else population[0]
    return {POPULATION + name: safetensors.whole(table) for name, table in tables.items()}


def _facts_of(population: Population | None) -> dict[str, str]:
    """Return the numbers of a population as metadata; none without one."""
    return {} if population is None else {"population": json.dumps(population[1])}


def _read_population(path: Path, header: safetensors.Header) -> Population | None:
    """Read the population that the rows of a file were drawn from; None where it has none."""
    text = header.metadata.get("population")
    if text is None:
        return None
    try:
        numbers = json.loads(text)
    except ValueError as error:
        raise ValueError(f"population must be JSON: {error}") from None
    if not isinstance(numbers, dict):
        raise ValueError(f"population must be numbers by name, got {shown(text)}")
    names = [name for name in header.entries if name.startswith(POPULATION)]
    places = {name.removeprefix(POPULATION): header.tensor(name) for name in names}
    return safetensors.read_all(path, places), numbers


def _write(path: Path, tensors: Mapping[str, safetensors.Pieces], metadata: dict[str, Any]) -> None:
    """Write tensors, and the metadata that are not None."""
    metadata |= {
        "group_names": json.dumps(metadata["group_names"]),
        "expert_size": _checks.format_size(metadata["expert_size"]),
    }
    metadata = {key: str(value) for key, value in metadata.items() if value is not None}
    with replacing(path) as temporary:
        safetensors.write(temporary, tensors, {"version": VERSION, **metadata})


def _read_tables(
    path: Path, header: safetensors.Header, names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Read the arrays of these names that a file has."""
    places = {name: header.tensor(name) for name in names if name in header}
    return safetensors.read_all(path, places)


def _parse_metadata(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """Check format and version of a file; return the metadata of its arrays."""
    version = metadata.get("format"), metadata.get("version")
    if version != (name, VERSION):
        raise ValueError(
            f"format must be {name} version {VERSION}, got {version[0]} version {version[1]}"
        )
    return {
        "num_experts": metadata.get("num_experts"),
        "group_names": _parse_group_names(metadata.get("group_names", "null")),
        "model": metadata.get("model"),
        "expert_size": _checks.parse_size(metadata.get("expert_size")),
    }


def _parse_group_names(text: str) -> Any:
    """Return the names of groups in metadata."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"group_names must be JSON: {error}") from None


def _parse_integer(name: str, text: str | None) -> int | None:
    """Return an integer of metadata; None where it is not there."""
    if text is not None and not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
        raise ValueError(f"{name} must be an integer, got {shown(text)}")
    return None if text is None else int(text)


def _read_archive(path: Path, wanted: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read an archive of a trace or a load table: its arrays, and its metadata."""
    arrays = npz.read_npz(path, (*ARRAYS, *ABOUT))
    if wanted not in arrays:
        kinds = {"expert_ids": "a trace", "load": "a load table"}
        other = "load" if wanted == "expert_ids" else "expert_ids"
        if other in arrays:
            loader = "RoutingTrace" if other == "expert_ids" else "RoutingStatistics"
            raise ValueError(f"holds {kinds[other]}, not {kinds[wanted]}; {loader}.load reads it")
        raise ValueError(f"must hold an array '{wanted}' (or '{other}', {kinds[other]})")
    values: dict[str, Any] = {}
    for name, (letters, dimensions, rule) in ABOUT.items():
        array = arrays.pop(name, None)
        if array is None:
            values[name] = None
            continue
        has_wrong_type = array.size and array.dtype.kind not in letters
        if array.ndim != dimensions or has_wrong_type:
            raise ValueError(f"{name} must be {rule}, got {shown(array)}")
        values[name] = array.tolist()
    return arrays, values


def _choose_experts(argument: int | None, in_file: int | str | None) -> int:
    """Return experts per layer: the caller's argument, else the number in the file."""
    if argument is not None:
        return experts_in(argument)
    if in_file is None:
        raise MissingArgumentError("num_experts is needed: the file does not say it", "num_experts")
    try:
        return experts_in(int(in_file))
    except ValueError:
        raise ArgumentError(
            f"num_experts must be from 1 to 65536, got {shown(in_file)}", "num_experts"
        ) from None
