"""Named arrays of a file, whatever holds them: ``.npz``, safetensors, or a dict of torch.save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import kind_of, naming, npz, safetensors
from moetuner.formats import pickled
from moetuner.formats.records import head


def names_in(path: Path) -> list[str]:
    """List the names of the arrays of a file; none where it has no names."""
    if pickled.is_pickled(path):
        content = pickled.peek(path)
        return [str(name) for name in content] if isinstance(content, dict) else []
    start = head(path, 9)
    if start.startswith(b"PK"):
        with naming(path):
            return sorted(npz.names_in_npz(path))
    if start[8:] == b"{" and kind_of(path) == "safetensors":
        return list(safetensors.read_header(path).entries)
    return []


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays of these names.

    Raises
    ------
    ValueError
        If the file is damaged, or one is no array.
    """
    if pickled.is_pickled(path):
        content = pickled.load(path)
        for name in names:
            if not isinstance(content[name], pickled.Tensor):
                raise ValueError(f"{name:.60} must be a tensor, got {shown(content[name])}")
        return {name: content[name].array() for name in names}
    if kind_of(path) == "npz":
        return npz.read_npz(path, tuple(names))
    header = safetensors.read_header(path)
    return {name: safetensors.read(path, header.tensor(name)) for name in names}
