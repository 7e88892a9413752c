"""Read and write the three arrays of DeepSeek's expert-parallel load balancer.

github.com/deepseek-ai/EPLB. Physical experts P are the slots of a layer, device by device: slot p
is on device ``p // (P / D)``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import array_in, instance
from moetuner.files import npz
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout
from moetuner.formats.records import looks_like_json
from moetuner.placement import EMPTY, Placement

MAP = "physical_to_logical_map"


def eplb_maps(placement: Placement) -> dict[str, NDArray[np.int64]]:
    """Return a placement [L,D,S] as the arrays of EPLB's ``rebalance_experts``, with P = D * S.

    Returns
    -------
    dict
        By EPLB's names, in its order: ``physical_to_logical_map``, the expert in every slot [L,P];
        ``logical_to_physical_map``, the slots of every expert in rising order [L,E,X], padded with
        -1 up to the most copies of any; ``logical_replica_count``, the copies of every expert
        [L,E].

    Raises
    ------
    ValueError
        If a slot is empty: engines fill every slot with an expert's weights.
    """
    instance("placement", placement, Placement)
    if (placement.slots == EMPTY).any():
        layer, device, slot = np.argwhere(placement.slots == EMPTY)[0]
        raise ValueError(
            f"layer {layer}, device {device}: slot {slot} is empty, and EPLB's arrays have no "
            "empty slots: placement.filled() fills them"
        )
    layers, experts = placement.layers, placement.num_experts
    logical = placement.slots.reshape(layers, -1).astype(np.int64)
    count = placement.replicas
    # Slots sorted by expert; an expert's copies are then one after the other, lower slots first.
    slot = np.argsort(logical, axis=1, kind="stable")
    expert = np.take_along_axis(logical, slot, axis=1)
    first = np.cumsum(count, axis=1) - count
    copy = np.arange(logical.shape[1]) - np.take_along_axis(first, expert, axis=1)
    physical = np.full((layers, experts, int(count.max())), -1, dtype=np.int64)
    physical[np.arange(layers)[:, None], expert, copy] = slot
    return {MAP: logical, "logical_to_physical_map": physical, "logical_replica_count": count}


def write_map(placement: Placement, path: Path, _: Hints) -> None:
    """Write the arrays under EPLB's names, with further copies in slots that are empty."""
    arrays: dict[str, Any] = {**eplb_maps(placement.filled())}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def recognises_map(file: Opened) -> bool:
    """Return whether a file is an archive or JSON with EPLB's arrays, or JSON of its map alone."""
    start = file.head
    if looks_like_json(start):
        arrays = (b'"logical_replica_count"' in start, b'"logical_to_physical_map"' in start)
        return any(arrays) or re.match(rb"\s*\[\s*\[\s*-?\d", start) is not None
    if not start.startswith(b"PK"):
        return False
    return MAP in file.names


def read_map(file: Opened, _: Hints) -> Layout:
    """Read the map of an archive or of JSON; ignore the arrays that follow from it."""
    if file.head.startswith(b"PK"):
        arrays = npz.read_npz(file.path, (MAP, "logical_replica_count"))
    else:
        text = file.read_whole().decode("utf-8-sig").strip()
        # The map alone, as vLLM's proposed initial_expert_map_path has it (PR 49572).
        arrays = parse_json(f'{{"{MAP}": {text}}}' if text.startswith("[") else text)
    if MAP not in arrays:
        raise ValueError(f"must hold an array {MAP!r}")
    count = arrays.get("logical_replica_count")
    count = None if count is None else array_in("logical_replica_count", count)
    experts = None if count is None or count.ndim != 2 else count.shape[1]
    return Layout.from_rows(arrays[MAP], num_experts=experts)
