"""Settings of a problem as text: what options, their help and JSON are made of."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import field, fields
from typing import Any

from moetuner.evaluation.arrival import share_mixed
from moetuner.problem.phases import prefill
from moetuner.problem.pins import Pin

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


def read_prefill_share(text: str) -> dict[int, float]:
    """Read a number from 0 to 1."""
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(text)
    return prefill(share)


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
PIN: dict[str, Any] = {"read": read_pin, "metavar": "LAYER:EXPERT:DEVICE", "multiple": True}
PIN["default_text"] = "none; may be repeated"
