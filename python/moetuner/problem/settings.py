"""Settings of a problem as text: what options, their help and JSON are made of."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from moetuner.evaluation.arrival import share_mixed
from moetuner.problem.pins import Pin

# Groups of the help that settings are in.
MACHINE, GOAL, ENGINE = "The machine", "The goal", "The engine"


@dataclass(frozen=True)
class Setting:
    """How a field of a problem is given as text; its help is what the docstring says of it.

    Parameters
    ----------
    group
        Group of the help that it is in.
    default_text
        What is taken without it; empty if the docstring says it.
    choices
        Words that it may be.
    read
        Its value from text, ValueError if there is none, and in its docstring what it reads; a flag
        has neither this nor choices.
    metavar, option
        Its value in ``--help``, and its option; by default its name.
    repeatable
        Whether the option may be given several times.
    help
        The help, once it is read.
    """

    group: str
    default_text: str = ""
    choices: tuple[str, ...] = ()
    read: Callable[[str], Any] | None = None
    metavar: str | None = None
    option: str = ""
    repeatable: bool = False
    help: str = ""

    @property
    def rule(self) -> str:
        """What ``read`` accepts, to follow "must be"."""
        return (inspect.getdoc(self.read) or "").removeprefix("Read ").removesuffix(".")


def setting(default: Any, *arguments: Any, **others: Any) -> Any:
    """Return a field of a dataclass with a default, which is a ``Setting`` too."""
    return field(default=default, metadata={"setting": Setting(*arguments, **others)})


def settings_of(kind: Any) -> dict[str, Setting]:
    """Return the settings among the fields of a dataclass, by name, with their help."""
    texts, settings = parameters_of(kind), {}
    for of in fields(kind):
        if "setting" in of.metadata:
            row = of.metadata["setting"]
            default = f"  [default: {row.default_text}]" if row.default_text else ""
            settings[of.name] = replace(row, help=texts.get(of.name, "") + default)
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


def read_arrival(text: str) -> str | float:
    """Read bursts, mixed, or the weight of mixed from 0 to 1."""
    arrival: str | float = text if text in ("bursts", "mixed") else float(text)
    share_mixed(arrival)
    return arrival


def read_risk(text: str) -> str | float:
    """Read mean, or a level from 0 to below 1."""
    return text if text == "mean" else float(text)  # the problem checks the level


def read_groups(text: str) -> str | dict[str, float]:
    """Read minimax, or NAME=WEIGHT,...."""
    if text == "minimax":
        return text
    pairs = [part.rpartition("=") for part in text.split(",")]  # names may hold "=", too
    if not all(name for name, _, _ in pairs):
        raise ValueError(text)
    return {name: float(weight) for name, _, weight in pairs}


def read_pin(text: str) -> Pin:
    """Read LAYER:EXPERT:DEVICE in numbers, or "*" for all layers."""
    layer, expert, device = text.split(":")
    return (None if layer == "*" else read_count(layer), read_count(expert), read_count(device))


# What pins and bans have in common.
PIN: dict[str, Any] = {"read": read_pin, "metavar": "LAYER:EXPERT:DEVICE", "repeatable": True}
PIN["default_text"] = "none; may be repeated"
