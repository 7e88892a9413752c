"""Words of a page: settings as people say them, and text that breaks where it may."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moetuner.files import text
from moetuner.files.cells import counted, digits, in_bytes, percent
from moetuner.problem import Problem
from moetuner.serving import Serving
from moetuner.serving.engines import ENGINES

if TYPE_CHECKING:
    from markupsafe import Markup

OPTION = re.compile(r"(?<![^\s'\"(])--?[a-z][\w-]*")
# A word of a command: an option with what it takes, or one word.
WORD = re.compile(r"-\S+(?: (?!-)(?:'[^']*'|\S+))?|\S+")
Write = Callable[[Any], str]


def _chosen(**words: str) -> Write:
    """Write one of a few values by its words."""
    return lambda value: words.get(str(value).lower(), str(value))


def _counted(noun: str) -> Write:
    return lambda value: counted(value, noun) if isinstance(value, int) else str(value)


def _text(value: Any) -> str:
    return text.clean(str(value))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else digits(value)


def _initial(value: Any) -> str:
    """Write what runs: a method, or a placement."""
    words = {"contiguous": "experts in blocks, as engines load them", "given": "as given"}
    method, _, copies = _text(value).partition(":")
    name = {"eplb": "EPLB", "round_robin": "round robin"}.get(method, method)
    if method == "eplb" and copies:
        return f"{name} with {copies} redundant experts"
    return words.get(method, name)


def _list_declared(*kinds: Any) -> dict[str, tuple[str, Write]]:
    """Return what settings of dataclasses are called, and how their values are written."""
    rows: dict[str, tuple[str, Write]] = {}
    for own in (own for kind in kinds for own in fields(kind) if "label" in own.metadata):
        words = own.metadata["words"]
        rows[own.name] = own.metadata["label"], words if callable(words) else _chosen(**words)
    return rows


# Settings in the order of the page: what they are called there, and how a value is written.
SETTINGS: dict[str, tuple[str, Write]] = {
    "engine": ("Engine", lambda value: ENGINES[value].title if value in ENGINES else str(value)),
    "devices": ("Devices", _number),
    "devices_per_node": ("Devices of a node", _number),
    "topology": ("Machine", _text),
    **_list_declared(Serving, Problem),
    "initial": ("Running placement", _initial),
    "baseline": ("Compared with", _initial),
    "placement": ("Proposed placement", _text),
    "expert_bytes": ("Size of an expert", in_bytes),
    "window": ("Window", _counted("token")),
    "windows": (
        "Windows",
        lambda value: ", ".join("as recorded" if n is None else f"{n:,} tokens" for n in value),
    ),
    "prefill_share": ("Share of time in prefill", percent),
    "copies": ("Slots for copies that were tried", lambda value: ", ".join(map(str, value))),
    "price": ("Smallest gain worth a change", percent),
    "move_budget": ("May move", _number),
    "move_cost": ("Cost of a byte that moves", digits),
    "holdout": ("Held out to judge on", percent),
    "held_out": (
        "Judged on",
        _chosen(true="traffic that was held out", false="traffic that it was computed from"),
    ),
    "in_order": (
        "Recorded",
        _chosen(true="in the order of serving", false="one group after the other"),
    ),
    "splits": ("Halves taken by chance", lambda value: counted(value, "time")),
    "time_limit": ("Time limit", lambda value: f"{digits(value)} s"),
    "effort": ("Search", _chosen(brief="brief", default="as usual", thorough="thorough")),
    "seed": ("Random seed", str),
}
# What changes no answer is not told.
NOT_SHOWN = ("threads",)


def write_settings(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the names and values of settings that were made."""
    told = {key: value for key, value in settings.items() if key not in NOT_SHOWN}
    order = [*SETTINGS, *(key for key in told if key not in SETTINGS)]
    rows = []
    for key in order:
        value = told.get(key)
        is_set = isinstance(value, bool) or key == "seed" or bool(value)
        if value is None or not is_set:
            continue
        name, write = SETTINGS.get(key, (key.replace("_", " "), str))
        rows.append((name, write(value)))
    return tuple((name, words) for name, words in rows if words)


def unbroken(prose: str) -> Markup:
    """Return text whose options a browser does not break at their dashes."""
    return _mark(OPTION, prose, "option")


def as_command(line: str) -> Markup:
    """Return a command that breaks between its words: within one only where it fills a line."""
    return _mark(WORD, line, "word")


def _mark(part: re.Pattern[str], line: str, kind: str) -> Markup:
    """Mark parts of a line as of a kind, and options in them."""
    from markupsafe import Markup, escape

    pieces, end = [], 0
    for found in part.finditer(line):
        inner = escape(found[0]) if kind == "option" else unbroken(found[0])
        marked = Markup('<span class="{}">{}</span>').format(kind, inner)
        pieces += [escape(line[end : found.start()]), marked]
        end = found.end()
    return Markup("").join([*pieces, escape(line[end:])])
