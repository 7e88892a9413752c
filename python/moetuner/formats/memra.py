"""Read and write memra's map of experts to two cards.

The map, ``memra-ep-map-v1`` (``ep_map.rs``), has the rank of every expert of a layer: none on both
cards. Its loaders take two ranks with as many experts each, every layer with experts, and rank 0
as the one where tokens arrive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moetuner._checks import DEVICE_LIMIT, LAYER_LIMIT, experts_in, shown, whole_number
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout
from moetuner.formats.records import looks_like_json
from moetuner.placement import EMPTY, Placement

FORMAT = "memra-ep-map-v1"


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write the map; layers are numbered with the dense ones that ``hints`` names."""
    numbers = hints.moe_numbers(placement.layers)
    rows = zip(numbers, placement.device_of.tolist(), strict=True)
    content = {
        "format": FORMAT,
        "strategy": "moetuner",
        "ranks": placement.devices,
        "entry_rank": 0,
        "expert_count": placement.num_experts,
        "traces": [],
        "params": {},
        "layers": [{"layer": number, "assignment": row, "stats": {}} for number, row in rows],
    }
    # As memra's own tool writes it.
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def recognises_map(file: Opened) -> bool:
    """Return whether a file is such a map."""
    start = file.head[:4096]
    return looks_like_json(start) and f'"{FORMAT}"'.encode() in start


def read_map(file: Opened, _: Hints) -> Layout:
    """Read the map: experts of a rank in rising order, -1 where a rank has fewer than others."""
    fields = parse_json(file.read_whole())
    if fields.get("format") != FORMAT:
        raise ValueError(f"format must be {FORMAT}")
    experts = experts_in(fields.get("expert_count"))
    ranks = whole_number("ranks", fields.get("ranks"), highest=min(experts, DEVICE_LIMIT))
    entry, layers = fields.get("entry_rank"), fields.get("layers")
    remarks = []
    if entry != 0:
        remarks.append(f"entry_rank must be 0 for its loaders, got {shown(entry)}")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"layers must be a list of layers, got {shown(layers)}")
    rows = dict(_row(layer, ranks, experts) for layer in layers)
    if len(rows) < len(layers):
        raise ValueError("layers must be there once each")
    numbers = tuple(sorted(rows))
    sizes = [np.bincount(rows[number], minlength=ranks) for number in numbers]
    width = max(int(size.max()) for size in sizes)
    if ranks * width > 64 * experts:
        raise ValueError(f"ranks must share {experts} experts about evenly, got one with {width}")
    slots = np.full((len(rows), ranks, width), EMPTY)
    for at, rank in np.ndindex(len(rows), ranks):
        on_rank = np.flatnonzero(np.equal(rows[numbers[at]], rank))
        slots[at, rank, : len(on_rank)] = on_rank
    return Layout.from_rows(
        slots.reshape(len(rows), -1),
        devices=ranks,
        num_experts=experts,
        layers=numbers,
        remarks=tuple(remarks),
    )


def _row(layer: Any, ranks: int, experts: int) -> tuple[int, list[int]]:
    """Return the number of a layer, and the rank of each of its experts."""
    fields = layer if isinstance(layer, dict) else {}
    number = whole_number("layer", fields.get("layer"), lowest=0, highest=LAYER_LIMIT - 1)
    row = fields.get("assignment")
    if not isinstance(row, list) or len(row) != experts:
        got = len(row) if isinstance(row, list) else shown(row)
        raise ValueError(f"layer {number}: assignment must have {experts} ranks, got {got}")
    for rank in row:
        if type(rank) is not int or not 0 <= rank < ranks:
            raise ValueError(f"layer {number}: ranks must be below {ranks}, got {shown(rank)}")
    return number, row
