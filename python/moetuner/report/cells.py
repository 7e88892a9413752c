"""Numbers as they stand in tables and sentences."""

from __future__ import annotations


def many(count: int, what: str) -> str:
    """Write how many there are of something, one or more."""
    return f"{count:,} {what}" + "s" * (count != 1)


def number(value: float | None, decimals: int) -> str:
    """Write a number, or a dash for what is not known."""
    return "-" if value is None else f"{value:.{decimals}f}"


def percent(value: float | None) -> str:
    """Write a share."""
    return "-" if value is None else f"{100 * value:.1f} %"


def signed(value: float | None) -> str:
    """Write a share with its sign."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f} %"
