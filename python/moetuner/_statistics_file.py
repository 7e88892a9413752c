"""Statistics files: what a safetensors file or a load table (``.npz``) holds, and writing one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moetuner import _labels, _numpy_files, _safetensors, _set_tables
from moetuner._files import kind_of, naming, replacing

FORMAT = "moetuner.statistics"
VERSION = "1"
TABLES = ("load", "transitions", "coactivation", "group", *_set_tables.NAMES)
NPZ_KEYS = ("load", "group", "group_names", "model")


@dataclass(frozen=True)
class Contents:
    """What a file says; nothing of it is checked but that it is there."""

    tables: dict[str, NDArray[Any]]
    window: int | None
    group_names: Sequence[str]
    model: str | None
    expert_size: tuple[int, int] | None = None


def holds_statistics(path: Path) -> bool:
    """Whether a file says that it holds counts, well or damaged.

    Raises
    ------
    ValueError
        If its format cannot be told, or its index is damaged.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        return _safetensors.read_header(path).metadata.get("format") == FORMAT
    if kind == "npz":
        with naming(path):
            names = _numpy_files.names_in_npz(path)
            return "load" in names and "expert_ids" not in names
    return False


def read(path: Path) -> Contents:
    """Read either format.

    Raises
    ------
    ValueError
        Naming the file, if it is cut off, damaged or holds something else.
    """
    kind = kind_of(path)
    with naming(path):
        if kind == "safetensors":
            return _read_safetensors(path)
        if kind == "npz":
            return _read_npz(path)
        raise ValueError("must be saved statistics (safetensors) or a load table (.npz)")


def write(
    path: Path,
    tables: Mapping[str, NDArray[Any] | None],
    *,
    window: int | None,
    group_names: Sequence[str],
    model: str | None,
    expert_size: tuple[int, int] | None = None,
) -> None:
    """Write as safetensors; the file appears whole or not at all."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "group_names": json.dumps(group_names),
        "window": None if window is None else str(window),
        "model": model,
        "expert_size": _labels.size_text(expert_size),
    }
    with replacing(path) as temporary:
        _safetensors.write(
            temporary,
            {
                name: _safetensors.whole(table)
                for name, table in tables.items()
                if table is not None
            },
            {key: text for key, text in metadata.items() if text is not None},
        )


def _read_safetensors(path: Path) -> Contents:
    header = _safetensors.read_header(path)
    about = header.metadata
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"format must be {FORMAT} version {VERSION}, "
            f"got {about.get('format')} version {about.get('version')}"
        )
    header.tensor("load")
    window = about.get("window")
    return Contents(
        {name: _safetensors.read(path, header.tensor(name)) for name in TABLES if name in header},
        None if window is None else int(window),
        json.loads(about.get("group_names", "[]")),
        about.get("model"),
        _labels.size_of(about.get("expert_size")),
    )


def _read_npz(path: Path) -> Contents:
    arrays = _numpy_files.read_npz(path, NPZ_KEYS)
    if "load" not in arrays:
        if "expert_ids" in _numpy_files.names_in_npz(path):
            raise ValueError("holds a trace, not a load table; RoutingTrace.load reads it")
        raise ValueError("must hold an array 'load' (or 'expert_ids', a trace)")
    group_names = _numpy_files.texts(arrays, "group_names")
    if group_names is None:
        group_names = _labels.numbered(arrays["group"]) if "group" in arrays else []
    model = _numpy_files.text(arrays, "model")
    return Contents(
        {k: arrays[k] for k in ("load", "group") if k in arrays}, None, group_names, model
    )
