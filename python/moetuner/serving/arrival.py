"""Arrival: the order in which traffic comes, as recorded, or mixed by continuous batching."""

from __future__ import annotations

from typing import Literal

from moetuner._checks import ArgumentError, is_number, shown

Arrival = Literal["bursts", "mixed"] | float


def share_mixed(arrival: object) -> float:
    """Check an arrival; return the weight of mixed windows, from 0 (bursts) to 1."""
    share = {"bursts": 0.0, "mixed": 1.0}.get(arrival) if isinstance(arrival, str) else arrival
    if not (is_number(share) and 0 <= share <= 1):
        raise ArgumentError(
            f"arrival must be 'bursts', 'mixed', or a weight from 0 to 1, got {shown(arrival)}",
            "arrival",
        )
    return float(share)


def read_arrival(text: str) -> str | float:
    """Read bursts, mixed, or the weight of mixed from 0 to 1."""
    arrival: str | float = text if text in ("bursts", "mixed") else float(text)
    share_mixed(arrival)
    return arrival
