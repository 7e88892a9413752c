"""Numbers as they stand in tables and sentences."""

from __future__ import annotations


def number(value: float | None, decimals: int) -> str:
    """Write a number, or a dash for what is not known."""
    return "-" if value is None else f"{value:.{decimals}f}"


def percent(value: float | None) -> str:
    """Write a share."""
    return "-" if value is None else f"{100 * value:.1f} %"


def signed(value: float | None) -> str:
    """Write a share with its sign."""
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:+.1f} %"


def counted(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
