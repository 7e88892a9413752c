"""Capacity: how many slots every device has in every layer."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import (
    CELL_LIMIT,
    SLOT_LIMIT,
    ArgumentError,
    check_slots,
    per_device,
    whole_number,
)
from moetuner.files.cells import and_more
from moetuner.placement import EMPTY, Placement
from moetuner.topology import Topology


def compute_capacity(
    load: NDArray[Any],
    topology: Topology,
    slots_per_device: int | Sequence[int] | None,
    extra_slots: int | None,
) -> NDArray[np.int64]:
    """Return the slots of every device [L,D]: those given, the topology's, or just enough."""
    layers, experts = load.shape
    devices = topology.devices
    if layers * experts * devices > CELL_LIMIT:
        raise ValueError(
            f"layers x experts x devices must be at most {CELL_LIMIT}, "
            f"got {layers} x {experts} x {devices}"
        )
    if extra_slots is not None:
        if slots_per_device is not None:
            raise ArgumentError(
                "slots_per_device and extra_slots cannot both be given: "
                "the slots of a device follow from the extra slots",
                "slots_per_device",
                "extra_slots",
            )
        return _spread_slots(load, devices, whole_number("extra_slots", extra_slots, lowest=0))
    if slots_per_device is None:
        slots_per_device = topology.slots_per_device
    if isinstance(slots_per_device, Sequence | np.ndarray):
        counts = per_device("slots_per_device", slots_per_device, devices)
        row = [
            whole_number(f"slots_per_device of device {device}", n, lowest=0, highest=SLOT_LIMIT)
            for device, n in enumerate(counts)
        ]
        if sum(row) < experts:
            raise ArgumentError(
                f"slots_per_device must add up to at least {experts}, a slot for each expert, "
                f"got {sum(row)}",
                "slots_per_device",
            )
    else:
        fewest = -(-experts // devices)
        slots = fewest if slots_per_device is None else slots_per_device
        slots = whole_number("slots_per_device", slots, highest=SLOT_LIMIT)
        if slots < fewest:
            raise ArgumentError(
                f"slots_per_device must be at least {fewest} for {experts} experts on "
                f"{devices} devices, got {slots}",
                "slots_per_device",
            )
        row = [slots] * devices
    check_slots(devices, max(row), layers)
    return np.tile(np.array(row, dtype=np.int64), (layers, 1))


def _spread_slots(load: NDArray[np.uint64], devices: int, extra: int) -> NDArray[np.int64]:
    """Return slots [L,D] with each extra slot in the layer whose heaviest copy it relieves most.

    A layer waits for its heaviest copy, which no packing can hide. So the benefit of a copy is the
    decrease of the largest load per copy; a heap has the layer with the largest benefit.
    """
    layers, experts = load.shape
    if extra > layers * experts * (devices - 1):
        raise ArgumentError(
            f"extra_slots must be at most {layers * experts * (devices - 1)}, where every device "
            f"has every expert, got {extra}",
            "extra_slots",
        )
    copies = np.ones((layers, experts), dtype=np.int64)
    extra_slots = np.zeros(layers, dtype=np.int64)
    weight = load.astype(np.float64)

    def find_next_copy(layer: int) -> tuple[float, int, int]:
        """Return the negative benefit of a layer's next copy, the layer, and the expert."""
        per_copy = np.where(copies[layer] < devices, weight[layer] / copies[layer], -1.0)
        expert = int(per_copy.argmax())
        benefit = weight[layer, expert] / (copies[layer, expert] * (copies[layer, expert] + 1))
        return (-benefit if per_copy[expert] >= 0 else 1.0, layer, expert)

    heap = [find_next_copy(layer) for layer in range(layers)]
    heapq.heapify(heap)
    for _ in range(extra):
        _, layer, expert = heap[0]
        copies[layer, expert] += 1
        extra_slots[layer] += 1
        heapq.heapreplace(heap, find_next_copy(layer))
    # Device after device over all layers, so that memory is even: no device has two slots more.
    slots = experts + extra_slots[:, None]
    before = (np.arange(devices) - (np.cumsum(slots, axis=0) - slots)) % devices
    capacity: NDArray[np.int64] = slots // devices + (before < slots % devices)
    return capacity


def even_slots(capacity: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    """Return the slots [L,D] that experts take if devices get equally many of them.

    Devices with less capacity [L,D] are full; the others share the remaining experts evenly.
    """
    limit = np.full((len(capacity), 1), -(-experts // capacity.shape[1]))
    while (short := np.minimum(capacity, limit).sum(axis=1) < experts).any():
        limit[short] += 1
    taken: NDArray[np.int64] = np.minimum(capacity, limit)
    return taken


def pad_slots(slots: NDArray[np.int32], capacity: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return slots [L,D,S], widened to a capacity [L,D]; experts come first, empty slots last."""
    widest = max(int(capacity.max()), int((slots != EMPTY).sum(axis=2).max()))
    padded = np.full((*capacity.shape, widest), EMPTY, dtype=np.int32)
    width = min(slots.shape[2], widest)
    # Full slots first: a device may have fewer than these are wide.
    order = np.argsort(slots == EMPTY, axis=2, kind="stable")
    padded[:, :, :width] = np.take_along_axis(slots, order, axis=2)[:, :, :width]
    return padded


def violations(placement: Placement, capacity: NDArray[np.int64], *, fill_slots: bool) -> list[str]:
    """Return a sentence on devices with more experts than slots, and one on empty slots."""
    lines, count = [], (placement.slots != EMPTY).sum(axis=2)
    over, short = np.argwhere(count > capacity), []
    if fill_slots:
        short = [*np.argwhere(count < capacity)]
    for at in map(tuple, over[:1]):
        lines.append(
            f"slots: layer {at[0]} has {count[at]} experts on device {at[1]}, which has "
            f"{capacity[at]} slots{and_more(len(over))}"
        )
    for at in map(tuple, short[:1]):
        empty = f"{capacity[at] - count[at]} empty slots on device {at[1]}"
        lines.append(f"fill_slots: layer {at[0]} has {empty}{and_more(len(short))}")
    return lines


def check_filling(
    capacity: NDArray[np.int64], forbidden: NDArray[np.bool_] | None, experts: int
) -> None:
    """Raise if a device has more slots than experts that may be there."""
    may_be = np.full(capacity.shape, experts)
    if forbidden is not None:
        may_be -= forbidden.sum(axis=1)
    for layer, device in np.argwhere(capacity > may_be):
        raise ArgumentError(
            f"fill_slots cannot fill the {capacity[layer, device]} slots of device {device} in "
            f"layer {layer}: of {experts} experts {may_be[layer, device]} may be there, each once",
            "fill_slots",
        )
