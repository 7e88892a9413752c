"""Recipes: commands to run next, with their purpose."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A command, and its purpose; it is text only where it is printed.

    Parameters
    ----------
    words
        The program and its arguments, as it gets them.
    why
        Its purpose, or what to know before; "" if the command says it.
    variables
        Variables of the environment that it needs.
    """

    words: tuple[str, ...]
    why: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def fill(cls, words: Iterable[str], why: str = "", **values: Any) -> Recipe:
        """Make the recipe of words such as ``"{model}"``, which are filled with values.

        Words in front of the program set variables, as ``"MAP={file}"`` does.
        """
        variables: dict[str, str] = {}
        program: list[str] = []
        for word in words:
            name, is_set, text = word.partition("=")
            if is_set and not program:
                variables[name] = text.format(**values)
            else:
                program.append(word.format(**values))
        return cls(tuple(program), why, variables)

    @property
    def command(self) -> str:
        """The line of a shell, to copy."""
        variables = [f"{name}={shlex.quote(text)}" for name, text in self.variables.items()]
        return " ".join([*variables, shlex.join(self.words)])

    def __str__(self) -> str:
        """Write both in a line of a shell, as JSON has them."""
        return f"{self.command}  # {self.why}" if self.why else self.command
