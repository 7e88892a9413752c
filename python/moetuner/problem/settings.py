"""Settings of a problem as text: slots, caps, risk, groups and pins of options and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moetuner._texts import clean
from moetuner.files.cells import counted, listed
from moetuner.problem.pins import Pin
from moetuner.serving.settings import read_count

# Groups that a line names at most.
NAMED = 6


def read_slots(text: str) -> int | tuple[int, ...]:
    """Read a number from 1, or one for every device as in 8,8,10,10."""
    counts = tuple(map(read_count, text.split(",")))
    if counts == (0,):
        raise ValueError(text)
    return counts if len(counts) > 1 else counts[0]


def read_cap(text: str) -> float:
    """Read a number from 1, or inf for no cap."""
    cap = float(text)
    if math.isnan(cap) or cap < 1:
        raise ValueError(text)
    return cap


def read_risk(text: str) -> str | float:
    """Read mean, or a level from 0 to below 1."""
    return text if text == "mean" else float(text)  # the problem checks the level


def read_groups(text: str) -> str | dict[str, float]:
    """Read minimax, or NAME=WEIGHT,...."""
    if text == "minimax":
        return text
    pairs = [pair.rpartition("=") for pair in text.split(",")]  # names may hold "=", too
    if not all(name for name, _, _ in pairs):
        raise ValueError(text)
    return {name: float(weight) for name, _, weight in pairs}


def write_groups(value: Any) -> str:
    """Write the weights of groups, or that the worst group counts."""
    if isinstance(value, Mapping):
        return listed([f"{clean(str(name))} x {weight:g}" for name, weight in value.items()], NAMED)
    return {"minimax": "for the worst group"}.get(str(value), str(value))


def read_pin(text: str) -> Pin:
    """Read LAYER:EXPERT:DEVICE in numbers, or "*" for all layers."""
    layer, expert, device = text.split(":")
    return (None if layer == "*" else read_count(layer), read_count(expert), read_count(device))


# Declaration of an option for pins or bans.
PIN: dict[str, Any] = {
    "read": read_pin,
    "metavar": "LAYER:EXPERT:DEVICE",
    "multiple": True,
    "words": lambda value: counted(len(value), "rule"),
    "default_text": "none; may be repeated",
}
