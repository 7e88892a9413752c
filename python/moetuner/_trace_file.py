"""Trace files: what a safetensors, ``.npz`` or ``.npy`` file holds of a trace, and writing one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from moetuner import _labels, _numpy_files, _safetensors
from moetuner._files import Kind, naming, replacing
from moetuner._ids import Ids, IdsInFile, IdsInMemory
from moetuner._validation import experts_in

FORMAT = "moetuner.trace"
VERSION = "1"
NPZ_KEYS = ("expert_ids", "sequence", "group", "group_names", "num_experts", "model", "load")


@dataclass(frozen=True)
class Contents:
    """What a file says or is to say. Read ones: ids in memory are checked, labels are not."""

    ids: Ids
    num_experts: int
    sequence: ArrayLike | None = None
    group: ArrayLike | None = None
    group_names: Sequence[str] | None = None
    model: str | None = None
    expert_size: tuple[int, int] | None = None


def read(path: Path, kind: Kind, num_experts: int | None) -> Contents:
    """Read a file of a known kind.

    Raises
    ------
    ValueError
        Naming the file, if it is cut off, damaged or not a trace.
    """
    with naming(path):
        if kind == "safetensors":
            return _read_safetensors(path, num_experts)
        return _read_npz(path, num_experts) if kind == "npz" else _read_npy(path, num_experts)


def write(contents: Contents, path: Path, source: str | None, shard_bytes: int) -> None:
    """Write as safetensors, shard by shard; the file appears whole or not at all."""
    ids = contents.ids
    # The widest type first: then all tensors are aligned.
    tensors = {
        name: _safetensors.whole(np.asarray(labels))
        for name, labels in (("sequence", contents.sequence), ("group", contents.group))
        if labels is not None
    }
    tensors["expert_ids"] = (ids.dtype, ids.shape, ids.shards(shard_bytes))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": str(contents.num_experts),
        "group_names": json.dumps(contents.group_names),
        "model": contents.model,
        "expert_size": _labels.size_text(contents.expert_size),
        "source": source,
    }
    with replacing(path) as temporary:
        _safetensors.write(
            temporary, tensors, {key: text for key, text in metadata.items() if text is not None}
        )


def _read_safetensors(path: Path, num_experts: int | None) -> Contents:
    header = _safetensors.read_header(path)
    about = header.metadata
    found = about.get("format", FORMAT), about.get("version", VERSION)
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"format must be {FORMAT} version {VERSION}, got {found[0]} version {found[1]}"
        )
    experts = _experts(num_experts, about.get("num_experts"))
    sequence, group = (
        _safetensors.read(path, header.tensor(name)) if name in header else None
        for name in ("sequence", "group")
    )
    return Contents(
        IdsInFile.of(path, header.tensor("expert_ids"), experts),
        experts,
        sequence,
        group,
        json.loads(about.get("group_names", "null")),
        about.get("model"),
        _labels.size_of(about.get("expert_size")),
    )


def _read_npz(path: Path, num_experts: int | None) -> Contents:
    arrays = _numpy_files.read_npz(path, NPZ_KEYS)
    if "expert_ids" not in arrays:
        if "load" in arrays:
            raise ValueError("holds a load table, not a trace; RoutingStatistics.load reads it")
        raise ValueError("must hold an array 'expert_ids' (or 'load', a load table)")
    experts = _experts(num_experts, _numpy_files.integer(arrays, "num_experts"))
    return Contents(
        IdsInMemory.of(arrays["expert_ids"], experts),
        experts,
        arrays.get("sequence"),
        arrays.get("group"),
        _numpy_files.texts(arrays, "group_names"),
        _numpy_files.text(arrays, "model"),
    )


def _read_npy(path: Path, num_experts: int | None) -> Contents:
    with path.open("rb") as file:
        place, fortran = _numpy_files.read_npy_header(file)
    experts = _experts(num_experts, None)
    ids: Ids = IdsInFile.of(path, place, experts)
    if fortran:
        # Column-major: a token's ids are spread over the whole file.
        columns = _safetensors.read(path, replace(place, shape=place.shape[::-1]))
        ids = IdsInMemory.of(columns.transpose(), experts)
    return Contents(ids, experts)


def _experts(given: int | None, in_file: int | str | None) -> int:
    """Experts per layer: as the caller says, else as the file says."""
    if given is not None:
        return experts_in(given)
    if in_file is None:
        raise ValueError("num_experts is needed: the file does not say it")
    try:
        return experts_in(int(in_file))
    except ValueError:
        raise ValueError(f"num_experts must be from 1 to 65536, got {in_file!r:.40}") from None
