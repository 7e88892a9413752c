"""Choose the number of slots for copies by what it gains and what its memory is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moetuner.cost.memory import Memory
from moetuner.report.advice.values import Advice, Copies
from moetuner.report.findings import Finding

# Fewer copies are chosen if their gain in predicted time is at most so much below the best.
NEAR_BEST = 0.005
# Share of the gain of the best number that the number must have which is left to the user.
MOST_OF_GAIN = 0.8
# Share of layers that need copies above which layers without need are not mentioned.
MOST_LAYERS = 0.75


class Choice(NamedTuple):
    """Slots for copies of a device and layer.

    Parameters
    ----------
    chosen
        Those of the proposed placement.
    fewer
        Those of the best placement that takes no more memory than the running one; None where that
        one is proposed.
    larger
        More than the proposed ones, which gain more in the mean over phases, but not in each, or
        not what their memory is worth; None where none do.
    """

    chosen: int
    fewer: int | None = None
    larger: int | None = None


def choose_copies(
    rows: Sequence[Copies],
    running: int,
    *,
    price: float,
    prefill_share: float | None = None,
    parts: Mapping[int | None, float] | None = None,
    requested: int | None = None,
) -> Choice:
    """Return the slots for copies that pay.

    A number of slots pays where what it gains over fewer slots, in the phase that gains least, is
    more than the share of the KV cache that it takes: a cache that is smaller by a tenth serves up
    to a tenth fewer requests at once. Where the share of prefill is known, the gain of both phases
    together counts; without it neither phase may pay for the other.

    The memory of ``running`` slots costs nothing, and ``price`` is the gain that memory of unknown
    worth must bring. ``parts`` is the share of a step that the MoE layers take, by window; 1 where
    unknown. Slots that were ``requested`` are proposed, whatever they cost.
    """
    rows = sorted(rows, key=lambda row: row.per_device)
    by_slots = {row.per_device: row for row in rows}
    parts = parts or {}

    def compare(row: Copies, other: Copies) -> list[float]:
        gains = [
            parts.get(window, 1.0) * (row.mean(window) - other.mean(window))
            for window in sorted(row.gains, key=lambda window: window or 0)
        ]
        if prefill_share is None or len(gains) < 2:
            return gains
        decode, prefill = gains
        return [(1 - prefill_share) * decode + prefill_share * prefill]

    affordable = [row for row in rows if row.per_device <= running] or rows[:1]
    # The fewest slots that are nearly the best, and behind no fewer ones in any phase.
    start = affordable[0]
    for row in affordable[1:]:
        gains = compare(row, start)
        if min(gains) >= -NEAR_BEST and max(gains) > NEAR_BEST:
            start = row
    chosen = start
    for row in rows:
        if row.per_device > start.per_device and _fits(row):
            worth = price
            if row.cache_share is not None and chosen.cache_share is not None:
                worth = row.cache_share - chosen.cache_share
            if min(compare(row, chosen)) > worth + NEAR_BEST:
                chosen = row
    if requested in by_slots:
        chosen = by_slots[requested]
    fewer = start.per_device if chosen.per_device > running else None
    if fewer == chosen.per_device:
        fewer = None
    more = {
        row.per_device: float(np.mean(compare(row, chosen)))
        for row in rows
        if row.per_device > chosen.per_device and _fits(row)
    }
    larger = None
    if more and max(more.values()) > price:
        enough = MOST_OF_GAIN * max(more.values())
        larger = min(slots for slots, gain in more.items() if gain >= enough)
    return Choice(chosen.per_device, fewer, larger)


def _fits(row: Copies) -> bool:
    """Return whether the memory has room for the copies; True where that is unknown."""
    return row.cache_share is None or row.cache_share < 1


def find_copies(
    rows: Sequence[Copies],
    choice: Choice,
    layers: int,
    *,
    running: int = 0,
    memory: Memory | None = None,
) -> Finding:
    """Return the gains of the chosen slots for copies, of fewer and of more, with their memory."""
    by_slots = {row.per_device: row for row in rows}

    def describe(slots: int | None) -> dict[str, Any] | None:
        return None if slots is None else _describe_copies(by_slots[slots], running)

    too_large = [row.per_device for row in rows if not _fits(row)]
    numbers = {
        "chosen": describe(choice.chosen),
        "fewer": describe(choice.fewer),
        "larger": describe(choice.larger),
        "device_bytes": None if memory is None else memory.device,
        "too_large": min(too_large, default=None),
    }
    row = by_slots[choice.chosen if choice.larger is None else choice.larger]
    numbers["spare_layers"] = _describe_layers(row, layers)
    return Finding("copies", numbers)


def count_running_copies(advice: Advice) -> int:
    """Return the slots for copies of a device and layer under the running placement."""
    return max(advice.placements[0].slots_per_device - advice.problem.single_slots, 0)


def copies_matter(advice: Advice) -> bool:
    """Return whether copies are proposed, or more of them would gain; False for a single number."""
    if len(advice.copies) == 1:
        return False
    return bool(advice.chosen_copies) or advice.larger_copies is not None


def _describe_copies(copies: Copies, running: int) -> dict[str, Any]:
    gains = [{"window": window, "gain": copies.mean(window)} for window in copies.gains]
    more = max(copies.per_device - running, 0)
    size = copies.bytes_per_device
    return {
        "slots": copies.per_device,
        "more": more,
        "more_bytes": None if size is None else size * more / max(copies.per_device, 1),
        "cache_tokens": copies.cache_tokens,
        "cache_share": copies.cache_share,
        "gains": gains,
    }


def _describe_layers(copies: Copies, layers: int) -> dict[str, Any] | None:
    """Return how many layers need no copies, and their memory; None where these are few."""
    if copies.layers is None or not copies.per_device or copies.layers > MOST_LAYERS * layers:
        return None
    saved = copies.bytes_per_device
    if saved is not None:
        saved *= 1 - copies.layers / layers
    return {"number": layers - copies.layers, "layers": layers, "bytes_per_device": saved}
