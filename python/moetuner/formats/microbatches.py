"""Ids of microbatches that ranks recorded layer by layer, joined to a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.trace import RoutingTrace

# Ids [t,K] by layer of every microbatch: of a step, which of the rank's in that step, and the rank.
Microbatches = dict[tuple[int, int, int], dict[int, NDArray[Any]]]


def trace_of_microbatches(where: Path, batches: Microbatches, experts: int) -> RoutingTrace:
    """Join microbatches in the order of time, and of ranks within it.

    Parameters
    ----------
    where
        The file or folder, for messages.
    batches
        What was recorded, which is taken out of the table as it is joined.
    experts
        Experts per layer.

    Returns
    -------
    RoutingTrace
        Every microbatch a sequence, every rank a group.

    Raises
    ------
    ValueError
        If a microbatch lacks a layer, or a rank the last steps.
    """
    numbers = sorted(set().union(*batches.values()))
    keys = sorted(batches)
    for key in keys:
        layers = batches[key]
        here = f"{where}: step {key[0]}, rank {key[2]}"
        missing = sorted(set(numbers) - layers.keys())
        if missing:
            raise ValueError(
                f"{here}: must have ids of each of layers {few(numbers)}, got none of layer "
                f"{missing[0]}: a file is cut off or missing"
            )
        sizes = {layers[layer].shape for layer in numbers}
        if len(sizes) > 1:
            raise ValueError(f"{here}: layers must have the same tokens, got {sorted(sizes)}")
    last = {rank: step for step, _, rank in keys}
    short, long = min(last, key=lambda r: (last[r], r)), max(last, key=lambda r: last[r])
    if last[short] != last[long]:
        raise ValueError(
            f"{where}: rank {short} must have steps to {last[long]} like rank {long}, "
            f"got {last[short]} as its last: the file is cut off"
        )
    rows = [np.stack([batches[key].pop(layer) for layer in numbers], axis=1) for key in keys]
    if len({row.shape[1:] for row in rows}) > 1:
        raise ValueError(f"{where}: all ids must have the same top-k, got several")
    tokens = [len(row) for row in rows]
    ranks = sorted(last)
    group = [ranks.index(rank) for _, _, rank in keys]
    return RoutingTrace.from_arrays(
        np.concatenate(rows),
        num_experts=experts,
        sequence=np.repeat(np.arange(len(keys)), tokens),
        group=np.repeat(np.asarray(group, dtype=np.int16), tokens),
        group_names=[f"rank {rank}" for rank in ranks],
    )


def few(numbers: Sequence[int]) -> str:
    """Return the first of some numbers as text."""
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
