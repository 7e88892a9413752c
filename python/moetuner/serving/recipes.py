"""Recipes: command lines to run next, with their purpose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A command line, and its purpose.

    Parameters
    ----------
    command
        The line, to copy.
    why
        Its purpose, or what to know before; "" if the line says it.
    """

    command: str
    why: str = ""

    def __str__(self) -> str:
        """Write both in a line of a shell, as JSON has them."""
        return f"{self.command}  # {self.why}" if self.why else self.command
