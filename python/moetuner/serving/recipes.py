"""Recipes: what somebody runs next, before it is text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A command line, and what it is for.

    Parameters
    ----------
    command
        The line, to be copied.
    why
        What it is for, or has to be known before; "" where the line says it.
    """

    command: str
    why: str = ""

    def __str__(self) -> str:
        """Write both in a line that a shell takes, as JSON has them."""
        return f"{self.command}  # {self.why}" if self.why else self.command
