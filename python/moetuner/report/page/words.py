"""Words of a page: settings as people say them, and text that breaks where it may."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moetuner.files import text
from moetuner.files.cells import counted, digits, in_bytes, listed, percent
from moetuner.serving import phases
from moetuner.serving.engines import ENGINES

if TYPE_CHECKING:
    from markupsafe import Markup

OPTION = re.compile(r"(?<![^\s'\"(])--?[a-z][\w-]*")
# A word of a command: an option with what it takes, or one word.
WORD = re.compile(r"-\S+(?: (?!-)(?:'[^']*'|\S+))?|\S+")
# Names in a line.
NAMED = 6

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


def _slots(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def _arrival(value: Any) -> str:
    """Write the order of traffic, or the weight of mixed windows."""
    words = {"bursts": "as recorded", "mixed": "many sequences at once, mixed by chance"}
    return (
        words[value] if isinstance(value, str) else f"{percent(value)} mixed, the rest as recorded"
    )


def _model(value: Any) -> str:
    """Write the name of a cost model."""
    return _text(value.get("name") if isinstance(value, Mapping) else value)


def _initial(value: Any) -> str:
    """Write what runs: a method, or a placement."""
    words = {"contiguous": "experts in blocks, as engines load them", "given": "as given"}
    method, _, copies = _text(value).partition(":")
    name = {"eplb": "EPLB", "round_robin": "round robin"}.get(method, method)
    if method == "eplb" and copies:
        return f"{name} with {copies} redundant experts"
    return words.get(method, name)


def _phases(value: Mapping[Any, float]) -> str:
    """Write the shares of the windows that a placement is for."""
    shares = {None if key in (None, "None") else int(key): share for key, share in value.items()}
    return phases.words(shares)


def _groups(value: Any) -> str:
    """Write how groups are weighed."""
    if isinstance(value, Mapping):
        return listed([f"{_text(name)} x {weight:g}" for name, weight in value.items()], NAMED)
    return {"minimax": "for the worst group"}.get(str(value), str(value))


def _rules(value: Sequence[Any]) -> str:
    return counted(len(value), "rule")


# Settings in the order of the page: what they are called there, and how a value is written.
SETTINGS: dict[str, tuple[str, Write]] = {
    "engine": ("Engine", lambda value: ENGINES[value].title if value in ENGINES else str(value)),
    "devices": ("Devices", _number),
    "devices_per_node": ("Devices of a node", _number),
    "topology": ("Machine", _text),
    "slots_per_device": ("Slots of a device in a layer", _slots),
    "extra_slots": ("Copies over all layers", _number),
    "fill_slots": ("Empty slots", _chosen(true="filled with copies", false="allowed")),
    "initial": ("Running placement", _initial),
    "baseline": ("Compared with", _initial),
    "placement": ("Proposed placement", _text),
    "objective": (
        "Made small",
        _chosen(
            time="predicted time of a layer", balance="imbalance", traffic="traffic between devices"
        ),
    ),
    "cost_model": ("Times predicted for", _model),
    "expert_bytes": ("Size of an expert", in_bytes),
    "regime": (
        "After a layer, tokens",
        _chosen(dispatch="go home", follow="go on to the next expert"),
    ),
    "split": (
        "A token's copy of an expert",
        _chosen(
            even="is chosen by a hash",
            nearest="is the nearest",
            round_robin="takes turns",
            lp="is what a linear programme says",
        ),
    ),
    "waterfill": (
        "Given to devices that wait",
        lambda value: f"the shared expert's tokens, each {digits(value)} of a routed one's work",
    ),
    "arrival": ("Order of tokens", _arrival),
    "window": ("Window", _counted("token")),
    "windows": (
        "Windows",
        lambda value: ", ".join("as recorded" if n is None else f"{n:,} tokens" for n in value),
    ),
    "phases": ("Placed for", _phases),
    "prefill_share": ("Share of time in prefill", percent),
    "risk": (
        "Windows that count",
        lambda value: "all" if value == "mean" else f"the worst {percent(1 - float(value))}",
    ),
    "groups": ("Groups", _groups),
    "max_imbalance": ("Cap of the imbalance", digits),
    "pinned": ("Experts kept on a device", _rules),
    "forbidden": ("Experts kept off a device", _rules),
    "survive": ("A copy is left after the loss of", lambda value: f"a {value}"),
    "copies": ("Slots for copies that were tried", _slots),
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
UNTOLD = ("threads",)


def settings_in_words(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the names and values of settings that were made."""
    told = {key: value for key, value in settings.items() if key not in UNTOLD}
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
    return _marked(OPTION, prose, "option")


def as_command(line: str) -> Markup:
    """Return a command that breaks between its words: within one only where it fills a line."""
    return _marked(WORD, line, "word")


def _marked(part: re.Pattern[str], line: str, kind: str) -> Markup:
    """Mark parts of a line as of a kind, and options in them."""
    from markupsafe import Markup, escape

    pieces, end = [], 0
    for found in part.finditer(line):
        inner = escape(found[0]) if kind == "option" else unbroken(found[0])
        marked = Markup('<span class="{}">{}</span>').format(kind, inner)
        pieces += [escape(line[end : found.start()]), marked]
        end = found.end()
    return Markup("").join([*pieces, escape(line[end:])])
