"""Read the workloads of vllm-ascend's balancer; read and write its expert map.

A policy gets ``expert_workload`` [L,D,S] (FlashLB: [W,L,D,S]), tokens by slot, and
``current_expert_table`` [L,D,S], the expert in each of them
(``eplb/core/policy/policy_abstract.py`` of 0.26.0rc1). This module reads an ``.npz`` or ``.pt``
with both by these names; a workload (``.npy``, ``.pt``) of slots, where the map that ran is known;
or a workload of experts [L,E], as ``examples/eplb/eplb_strategy.py`` takes it.

``expert_map_path`` names a JSON file of MoE layers only, every device's experts in slot order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files.cells import and_more
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats import pickled
from moetuner.formats.arrays import list_names, read_arrays
from moetuner.formats.counts import counts_in, sum_by_expert
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout
from moetuner.formats.sources import read_each
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics

LOADS = ("expert_workload", "moe_load", "workload")
TABLES = ("current_expert_table", "expert_table", "table")


def recognises(file: Opened) -> bool:
    """Return whether a file is a workload with its table, or a bare tensor."""
    load, table = _names(file) if file.head.startswith(b"PK") else (None, None)
    return load is not None and (table is not None or pickled.is_pickled(file))


def _names(file: Opened) -> tuple[str | None, str | None]:
    """Return the names of workload and table in a file; a bare array has the name ""."""
    names = list_names(file)
    load = next((name for name in (*LOADS, "") if name in names), None)
    table = next((name for name in TABLES if name in names), None)
    return load, table


def read(files: Sequence[Opened], hints: Hints) -> RoutingStatistics:
    """Read workloads; those of slots need a table in their file, or the map that ran."""

    def read_one(file: Opened) -> RoutingStatistics:
        load, table = _names(file)
        if load is None:
            raise ValueError(f"must hold {LOADS[0]!r}")
        arrays = read_arrays(file, [name for name in (load, table) if name is not None])
        counts, slots = counts_in("workload", arrays[load]), hints.running
        if table is not None:
            if arrays[table].dtype.kind not in "iu":
                raise ValueError(f"table must be integers, got {shown(arrays[table])}")
            slots = arrays[table].astype(np.int64)
        if counts.ndim != 2:
            counts = _by_expert(counts, slots, hints.num_experts)
        hints.check_experts(counts.shape[-1])
        return RoutingStatistics.from_load(counts)

    return RoutingStatistics.sum(read_each(files, read_one))


def _by_expert(
    load: NDArray[np.int64], table: NDArray[np.int64] | None, experts: int | None
) -> NDArray[np.int64]:
    """Add the tokens of slots [W,L,D,S] or [L,D,S] by expert [W,L,E]."""
    if load.ndim not in (3, 4) or 0 in load.shape:
        raise ValueError(
            "workload must be [layers, experts], [layers, ranks, slots] or "
            f"[stages, layers, ranks, slots], got {list(load.shape)}"
        )
    if table is None:
        raise ValueError(
            f"workload counts slots: {TABLES[0]} is needed in the file, or the expert map that ran "
            "(convert --running)"
        )
    layers, ranks, slots = load.shape[-3:]
    if table.shape not in ((layers, ranks, slots), (layers, ranks * slots)):
        raise ValueError(
            f"table must be {[layers, ranks, slots]} like the workload, got {list(table.shape)}"
        )
    stages = load.reshape(-1, layers, ranks * slots)
    return sum_by_expert(stages, table.reshape(layers, -1), experts)


def write_map(placement: Placement, path: Path, _: Hints) -> None:
    """Write the expert map."""
    layers = []
    for number, devices in enumerate(placement.slots.tolist()):
        lists = [{"device_id": at, "device_expert": experts} for at, experts in enumerate(devices)]
        layers.append({"layer_id": number, "device_count": len(lists), "device_list": lists})
    fields = {"moe_layer_count": placement.layers, "layer_list": layers}
    path.write_text(json.dumps(fields) + "\n")


def recognises_map(file: Opened) -> bool:
    """Return whether a file is such a map."""
    return b'"moe_layer_count"' in file.head[:4096]


def read_map(file: Opened, _: Hints) -> Layout:
    """Read the expert map in the order of the file, as the engine does, which ignores ids.

    The layout's ``remarks`` name layers and devices whose ``layer_id`` or ``device_id`` differs
    from their place.
    """
    layers = _members("the file", parse_json(file.read_whole()), "layer_list", "moe_layer_count")
    rows, devices, remarks = [], 0, _misplaced("layer_list", layers, "layer_id")
    for at, layer in enumerate(layers):
        where = f"layer {at}"
        members = _members(where, layer, "device_list", "device_count")
        lists = [
            _members(f"{where}, device {number}", device, "device_expert")
            for number, device in enumerate(members)
        ]
        remarks += _misplaced(f"{where}: device_list", members, "device_id")
        devices = devices or len(members)
        if len(members) != devices or len(set(map(len, lists))) != 1:
            raise ValueError(
                f"{where}: must have {devices} devices with as many experts each, got "
                f"{[len(experts) for experts in lists][:16]}"
            )
        rows.append(list(chain(*lists)))
    return Layout.from_rows(rows, devices=devices, remarks=tuple(remarks))


def _members(where: str, fields: object, key: str, count: str = "") -> list[Any]:
    """Return a list of an object; raise unless its length is that of field ``count``."""
    members = fields.get(key) if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or not isinstance(members, list):
        raise ValueError(f"{where}: {key} must be a list, got {shown(members)}")
    if count and (type(fields.get(count)) is not int or fields[count] != len(members)):
        raise ValueError(
            f"{where}: {count} must be {len(members)}, the length of {key}, "
            f"got {shown(fields.get(count))}"
        )
    return members


def _misplaced(where: str, members: list[Any], key: str) -> list[str]:
    """Return a remark on the first member whose number differs from its place, if there is one."""
    numbers = [member.get(key, at) for at, member in enumerate(members) if isinstance(member, dict)]
    wrong = [at for at, number in enumerate(numbers) if number != at]
    if not wrong:
        return []
    at = wrong[0]
    return [
        f"{where}: entry {at} has {key} {numbers[at]!r:.40}{and_more(len(wrong))}: vllm-ascend "
        "takes entries in the order of the file, whatever their numbers"
    ]
