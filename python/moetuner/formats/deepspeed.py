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

from moetuner.files import naming
from moetuner.formats.arrays import names_in, read_arrays
from moetuner.formats.counts import added
from moetuner.formats.hints import Hints
from moetuner.formats.sources import by_rank
from moetuner.statistics import RoutingStatistics

NAME = re.compile(r"(?:.*\D)?(\d{1,5})\D*\.?(?:tokens_per_expert|exp_counts)", re.ASCII)
SUFFIXES = ("tokens_per_expert", "exp_counts")
PATTERN = "*[0-9].*"


def recognises(path: Path) -> bool:
    """Whether a file, or a folder's first one of a rank, holds nothing but such counts."""
    if path.is_dir():
        files = sorted(file for file in path.glob(PATTERN) if file.is_file())
        return bool(files) and recognises(files[0])
    names = names_in(path)
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
            load = _load(read_arrays(path, names_in(path)))
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


def _load(arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Order counts by the layers in their names, [W,L,E]."""
    rows: dict[int, NDArray[Any]] = {}
    for name, array in arrays.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"names must be as model.layers.0.mlp.tokens_per_expert, got {name:.60}"
            )
        layer = int(match[1])
        if layer in rows:
            raise ValueError(f"layer {match[1]} must be there once, got {name:.60} too")
        rows[layer] = array[None] if array.ndim == 1 else array
        shape = rows[layer].shape
        if len(shape) != 2 or shape != next(iter(rows.values())).shape or 0 in shape:
            raise ValueError(
                f"{name:.60} must be counts [experts] like the other layers', got "
                f"{array.dtype} {list(array.shape)}"
            )
    if not rows:
        raise ValueError("must hold counts of at least one layer, got none")
    return np.stack([rows[layer] for layer in sorted(rows)], axis=1)
