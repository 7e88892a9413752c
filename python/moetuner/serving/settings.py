"""Settings: fields of a dataclass that text can give, with their options, help and checks."""

from __future__ import annotations

import inspect
import re
from dataclasses import field, fields
from typing import Any

# Groups of the help that settings are in.
MACHINE, GOAL, ENGINE = "The machine", "The goal", "The engine"


def setting(default: Any, group: str, default_text: str = "", **metadata: Any) -> Any:
    """Return a field of a dataclass that text can give; its help is what the docstring says of it.

    Parameters
    ----------
    default
        Its value if it is not given.
    group, default_text
        Group of the help that it is in, and what is taken without it, unless the docstring says so.
    how
        ``choices``, or ``read``, which gives its value, or raises ValueError, and says in its
        docstring what it reads; without both it is a flag. ``metavar``, ``flag``, its option, by
        default its name, ``help``, by default what the docstring says, and ``multiple``, if the
        option may be given several times.
    """
    return field(
        default=default, metadata={"group": group, "default_text": default_text, **metadata}
    )


def settings_of(kind: Any) -> dict[str, dict[str, Any]]:
    """Return of the settings among a dataclass's fields, by name, how they are given, and help."""
    texts = parameters_of(kind)
    settings = {own.name: dict(own.metadata) for own in fields(kind) if own.metadata}
    for name, entry in settings.items():
        default = entry.pop("default_text")
        text = entry.get("help", texts.get(name, ""))
        entry["help"] = text + (f"  [default: {default}]" if default else "")
    return settings


def parameters_of(kind: Any) -> dict[str, str]:
    """Return what a docstring says of parameters, by name, without markup and shapes."""
    texts: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Parameters\n----------\n")
    for line in section.partition("\n\n")[0].splitlines():
        if not line.startswith(" "):
            names = line.split(", ")
        for name in names:
            texts[name] = f"{texts[name]} {line.strip()}".strip() if line.startswith(" ") else ""
    markup = re.compile(r'``"?|"?``| \[[A-Z](,[A-Z])*\]')
    return {name: markup.sub("", text) for name, text in texts.items()}


def read_count(text: str) -> int:
    """Read a number from 0."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(text)
    return int(text)
