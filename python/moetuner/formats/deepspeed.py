"""Read DeepSpeed's counts of tokens: buffers of AutoEP's layers, or ``exp_counts``.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files.opened import Opened
from moetuner.formats.arrays import Dump, list_names, read_by_step, read_ranks
from moetuner.formats.counts import sum_ranks
from moetuner.formats.hints import Hints
from moetuner.formats.sources import first_file, list_by_rank
from moetuner.statistics import RoutingStatistics

NAME = re.compile(r"(?:.*\D)?(?P<layer>\d{1,5})\D*\.?(?:tokens_per_expert|exp_counts)", re.ASCII)
SUFFIXES = ("tokens_per_expert", "exp_counts")
PATTERN = "*[0-9].*"


def recognises(file: Opened) -> bool:
    """Return whether a file, or the first of a folder, holds only such counts."""
    names = list_names(first_file(file, PATTERN))
    return bool(names) and all(name.endswith(SUFFIXES) for name in names)


def read(files: Sequence[Opened], hints: Hints) -> RoutingStatistics:
    """Read and add the counts of all ranks, which have the same layers."""
    like = "model.layers.0.mlp.tokens_per_expert"
    dumps = read_ranks(list_by_rank(files, PATTERN), lambda file: read_by_step(file, NAME, like))
    return RoutingStatistics.from_load(sum_ranks(dumps, hints, _stack))


def _stack(arrays: Dump) -> NDArray[Any]:
    """Return the counts of the layers of a file [W,L,E]."""
    rows = []
    for (_, layer), counts in arrays.items():
        rows.append(counts[None] if counts.ndim == 1 else counts)
        if rows[-1].ndim != 2 or rows[-1].shape != rows[0].shape or not rows[-1].size:
            raise ValueError(
                f"layer {layer} must be counts [experts] like the other layers', got "
                f"{counts.dtype} {list(counts.shape)}"
            )
    return np.stack(rows, axis=1)
