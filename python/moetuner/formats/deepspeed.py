"""DeepSpeed's counts of tokens: buffers of AutoEP's layers, or what its MoE layers return.

AutoEP's routers keep ``tokens_per_expert`` [E] (``deepspeed/moe/ep_router.py`` of 0.19.8), which
every rank adds up over its own tokens and no checkpoint saves. A file of them per rank is made by::

    counts = {n: b.cpu() for n, b in model.named_buffers() if n.endswith("tokens_per_expert")}
    torch.save(counts, f"tokens_per_expert_rank{rank}.pt")

and may be safetensors or ``.npz`` as well. ``exp_counts``, which classic MoE layers return, is read
under such names too; rows of two dimensions [W,E] are windows. The number in a name is its layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import kind_of, naming, npz, safetensors
from moetuner.formats import pickled
from moetuner.formats.hints import Hints
from moetuner.formats.ranks import by_rank
from moetuner.formats.records import head
from moetuner.formats.slots import added
from moetuner.statistics import RoutingStatistics

NAME = re.compile(r"(?:.*\D)?(\d{1,5})\D*\.?(?:tokens_per_expert|exp_counts)", re.ASCII)
SUFFIXES = ("tokens_per_expert", "exp_counts")
PATTERN = "*[0-9].*"


def recognises(path: Path) -> bool:
    """Whether a file, or a folder's first one of a rank, holds nothing but such counts."""
    if path.is_dir():
        files = sorted(file for file in path.glob(PATTERN) if file.is_file())
        return bool(files) and recognises(files[0])
    names = _names(path)
    return bool(names) and all(name.endswith(SUFFIXES) for name in names)


def read(paths: Sequence[Path], hints: Hints) -> RoutingStatistics:
    """Add the counts of all ranks.

    Raises
    ------
    ValueError
        If a rank's file is missing, or files are of other layers or experts.
    """
    total: NDArray[np.int64] | None = None
    for path in by_rank(paths, PATTERN):
        with naming(path):
            load = _load(_arrays(path))
            if hints.num_experts not in (None, load.shape[2]):
                raise ValueError(f"counts must be [{hints.num_experts}], got [{load.shape[2]}]")
            # Checks that they are whole counts, of a size that can be added.
            load = RoutingStatistics.from_load(load).window_load
            if total is not None and total.shape != load.shape:
                raise ValueError(
                    f"counts must be {list(total.shape)} [windows, layers, experts] like those "
                    f"of the ranks before, got {list(load.shape)}"
                )
            total = added(total, load)
    return RoutingStatistics.from_load(np.empty((0, 0, 0)) if total is None else total)


def _names(path: Path) -> list[str]:
    """Names of the arrays of a file; none where it has no names."""
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


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    names = _names(path)
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


def _load(arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Order counts by the layers in their names, [W,L,E]."""
    rows: dict[int, NDArray[Any]] = {}
    first: NDArray[Any] | None = None
    for name, array in arrays.items():
        found = NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"names must be as model.layers.0.mlp.tokens_per_expert, got {name:.60}"
            )
        if int(found[1]) in rows:
            raise ValueError(f"layer {found[1]} must be there once, got {name:.60} too")
        row = array[None] if array.ndim == 1 else array
        first = row if first is None else first
        if row.ndim != 2 or row.shape != first.shape or 0 in row.shape:
            raise ValueError(
                f"{name:.60} must be counts [experts] like the other layers', got "
                f"{array.dtype} {list(array.shape)}"
            )
        rows[int(found[1])] = row
    if not rows:
        raise ValueError("must hold counts of at least one layer, got none")
    return np.stack([rows[layer] for layer in sorted(rows)], axis=1)
