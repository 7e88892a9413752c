"""Write settings of a page in words, and mark text where a browser may not break it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from moetuner import _texts
from moetuner.files.cells import counted, digits, in_bytes, percent
from moetuner.problem import Problem
from moetuner.serving import Serving
from moetuner.serving.engines import ENGINES
from moetuner.serving.running import Running

if TYPE_CHECKING:
    from markupsafe import Markup

OPTION = re.compile(r"(?<![^\s'\"(])--?[a-z][\w-]*")
# A word of a command: an option with its value, or one word.
WORD = re.compile(r"-\S+(?: (?!-)(?:'[^']*'|\S+))?|\S+")
Write = Callable[[Any], str]


def _worded(**words: str) -> Write:
    """Return what writes a value by its words."""
    return lambda value: words.get(str(value).lower(), str(value))


def _counted(noun: str) -> Write:
    """Return what writes a number with a noun."""
    return lambda value: counted(value, noun) if isinstance(value, int) else str(value)


def _text(value: Any) -> str:
    return _texts.clean(str(value))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else digits(value)


def _node_sizes(value: Any) -> str:
    return _number(value) if isinstance(value, int) else ", ".join(map(_number, value))


def _initial(value: Any) -> str:
    """Write the method that computed the running placement, or that it was given."""
    words = {
        "contiguous": "experts in blocks, as engines load them",
        "round_robin": "round robin",
        "eplb": "EPLB",
        "given": "as given",
    }
    text = _text(value)
    running = Running.parse(text) if Running.is_name(text) else Running(text)
    copies = f" with {running.redundant} redundant experts" if running.redundant else ""
    return f"{words.get(running.method, running.method)}{copies}"


def _list_declared(*kinds: Any) -> dict[str, tuple[str, Write]]:
    """Return the labels of fields of dataclasses, and functions that write their values."""
    rows: dict[str, tuple[str, Write]] = {}
    for kind in kinds:
        for field in fields(kind):
            if "label" in field.metadata:
                words = field.metadata["words"]
                write = words if callable(words) else _worded(**words)
                rows[field.name] = field.metadata["label"], write
    return rows


# Settings in the order of the page: their labels, and functions that write their values.
SETTINGS: dict[str, tuple[str, Write]] = {
    "engine": ("Engine", lambda value: ENGINES[value].title if value in ENGINES else str(value)),
    "devices": ("Devices", _number),
    "devices_per_node": ("Devices of a node", _node_sizes),
    "topology": ("Machine", _text),
    **_list_declared(Serving, Problem),
    "initial": ("Running placement", _initial),
    "baseline": ("Compared with", _initial),
    "placement": ("Proposed placement", _text),
    "expert_bytes": ("Size of an expert", in_bytes),
    "kv_bytes": ("KV cache of a token", in_bytes),
    "device_memory": ("Memory of a device", in_bytes),
    "step_ms": (
        "A step takes",
        lambda value: ", ".join("unknown" if ms is None else f"{ms:g} ms" for ms in value),
    ),
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
        _worded(true="traffic that was held out", false="traffic that it was computed from"),
    ),
    "in_order": (
        "Recorded",
        _worded(true="in the order of serving", false="one group after the other"),
    ),
    "splits": ("Halves taken by chance", lambda value: counted(value, "time")),
    "time_limit": ("Time limit", lambda value: f"{digits(value)} s"),
    "effort": ("Search", _worded(brief="brief", default="as usual", thorough="thorough")),
    "seed": ("Random seed", str),
}
# Settings that change no answer are not shown.
NOT_SHOWN = ("threads",)


def write_settings(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the labels and the written values of settings that are set."""
    shown = {key: value for key, value in settings.items() if key not in NOT_SHOWN}
    order = [*SETTINGS, *(key for key in shown if key not in SETTINGS)]
    rows = []
    for key in order:
        value = shown.get(key)
        is_set = isinstance(value, bool) or key == "seed" or bool(value)
        if value is None or not is_set:
            continue
        name, write = SETTINGS.get(key, (key.replace("_", " "), str))
        rows.append((name, write(value)))
    return tuple((name, words) for name, words in rows if words)


def unbroken(prose: str) -> Markup:
    """Return text as HTML in which a browser does not break options at their dashes."""
    return _mark(OPTION, prose, "option")


def as_command(line: str) -> Markup:
    """Return a command as HTML that breaks between words, and within one that fills a line."""
    return _mark(WORD, line, "word")


def _mark(pattern: re.Pattern[str], line: str, kind: str) -> Markup:
    """Return a line as HTML whose matches of a pattern have a class, ``kind``."""
    from markupsafe import Markup, escape

    pieces, end = [], 0
    for match in pattern.finditer(line):
        inner = escape(match[0]) if kind == "option" else unbroken(match[0])
        marked = Markup('<span class="{}">{}</span>').format(kind, inner)
        pieces += [escape(line[end : match.start()]), marked]
        end = match.end()
    return Markup("").join([*pieces, escape(line[end:])])
