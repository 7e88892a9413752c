"""Read named arrays of ``.npz``, safetensors and files of torch.save."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import naming, npz, safetensors
from moetuner.files.opened import Opened
from moetuner.formats import pickled

# Arrays by step and layer.
Dump = dict[tuple[int, int], NDArray[Any]]


def list_names(file: Opened) -> list[str]:
    """List the names of the arrays of a file; empty for a file of another kind.

    Arrays of a list that torch.save wrote are called ``arr_0`` and so on, as in ``numpy.savez``;
    the only array of a file without names is called "".
    """
    if pickled.is_pickled(file):
        return [*_name_tensors(pickled.peek(file.path))]
    start = file.head[:9]
    if start.startswith(b"PK"):
        return sorted(file.names)
    if start[8:] == b"{" and file.kind == "safetensors":
        return list(file.header.entries)
    return [""] if start.startswith(npz.MAGIC) else []


def read_arrays(file: Opened, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read arrays by name."""
    path, kind = file.path, file.kind
    if pickled.is_pickled(file):
        content = _name_tensors(pickled.load(path))
        for name in names:
            if not isinstance(content[name], pickled.Tensor):
                raise ValueError(f"{name:.60} must be a tensor, got {shown(content[name])}")
        return {name: content[name].array() for name in names}
    if kind != "safetensors":
        return npz.read_npz(path, names) if kind == "npz" else {"": npz.read_npy(path)}
    return safetensors.read_all(path, {name: file.header.tensor(name) for name in names})


def read_by_step(file: Opened, pattern: re.Pattern[str], like: str) -> Dump:
    """Read all arrays of a file by step and layer, in rising order.

    ``pattern`` matches whole names. Its group ``layer`` is the layer, and its group ``step``, if it
    has one, the step, otherwise 0. ``like`` is an example of a name, for messages.
    """
    names: dict[tuple[int, int], str] = {}
    for name in list_names(file):
        match = pattern.fullmatch(name)
        if match is None:
            raise ValueError(f"arrays must be named as {like}, got {name:.60}")
        key = int(match.groupdict().get("step") or 0), int(match["layer"])
        if key in names:
            raise ValueError(f"layer {key[1]} must be there once, got {name:.60} too")
        names[key] = name
    if not names:
        raise ValueError("must hold arrays of at least one layer, got none")
    steps, layers = ({key[at] for key in names} for at in range(2))
    for step, layer in product(sorted(steps), sorted(layers)):
        if (step, layer) not in names:
            raise ValueError(f"step {step} must have layer {layer} like the others")
    arrays = read_arrays(file, list(names.values()))
    return {key: arrays[names[key]] for key in sorted(names)}


def read_ranks(files: Sequence[Opened], read: Callable[[Opened], Dump]) -> dict[Path, Dump]:
    """Read arrays by step and layer of all ranks with a function; they have the same ones."""
    dumps: dict[Path, Dump] = {}
    for file in files:
        with naming(file.path):
            dumps[file.path] = read(file)
            if other := dumps[file.path].keys() ^ dumps[files[0].path].keys():
                step, layer = min(other)
                raise ValueError(
                    f"must have the steps and layers of {files[0].path.name}, differs in step "
                    f"{step}, layer {layer}"
                )
    return dumps


def _name_tensors(content: Any) -> dict[str, Any]:
    """Return the tensors of a container by name; a single tensor has the name ""."""
    if isinstance(content, dict):
        return {str(name): value for name, value in content.items()}
    if isinstance(content, list | tuple):
        return {f"arr_{number}": value for number, value in enumerate(content)}
    return {"": content} if isinstance(content, pickled.Tensor) else {}
