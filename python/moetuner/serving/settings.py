"""Settings: fields of a dataclass that text can give, with their options, help and checks."""

from __future__ import annotations

import inspect
import re
from dataclasses import Field, field, fields
from typing import Any

from moetuner._checks import one_of

# Groups of the help that settings are in.
MACHINE, GOAL, ENGINE, OTHER = "The machine", "The goal", "The engine", "Other"


def setting(default: Any, group: str = GOAL, default_text: str = "", **metadata: Any) -> Any:
    """Return a field of a dataclass that text can give; its help is what the docstring says of it.

    Parameters
    ----------
    default
        Its value if it is not given.
    group, default_text
        Group of the help that it is in, and what is taken without it, unless the docstring says so.
    metadata
        How text gives it: ``choices``, or ``read``, which gives its value, or raises ValueError,
        and says in its docstring what it reads, or ``above``, for a number above it, or ``within``,
        for a whole number from one to another, whose option has its default; without it is a flag.
        ``metavar``, ``flag``, its option, by default its name, ``help``, by default what the
        docstring says, and ``multiple``, if the option may be given several times, and ``usual``, a
        value that is as good as none. ``check``, which takes its name and value and raises for a
        wrong one; by default it must be one of ``choices``. ``label`` and ``words``, what a page
        calls it, and how it writes a value: words by value, or a function.
        ``to_json`` and ``from_json``, how a placement's file holds a value. ``by_engine``, if an
        engine decides it.
    """
    return field(
        default=default, metadata={"group": group, "default_text": default_text, **metadata}
    )


def reuse_setting(kind: Any, name: str) -> Any:
    """Return the field of another dataclass that is the same setting: declared there alone."""
    declared = kind.__dataclass_fields__[name]
    return field(default=declared.default, metadata=declared.metadata)


def check_settings(values: Any) -> None:
    """Raise for a field of a dataclass whose value breaks the rule of its setting."""
    for own in fields(values):
        check_setting(own, getattr(values, own.name))


def check_setting(declared: Field[Any], value: object) -> None:
    """Raise for a value that breaks the rule of a setting; None stands for a default of None."""
    if value is None and declared.default is None:
        return
    check, choices = declared.metadata.get("check"), declared.metadata.get("choices")
    if check is not None:
        check(declared.name, value)
    elif choices is not None:
        one_of(declared.name, value, choices)


# What says how a text gives a setting, of all that is declared of it.
OPTION_KEYS = (
    *("group", "choices", "read", "above", "within"),
    *("usual", "metavar", "flag", "help", "multiple"),
)


def list_settings(*kinds: Any) -> dict[str, dict[str, Any]]:
    """Return of the settings among dataclasses' fields, by name, how options give them, and help.

    The help of a setting that several declare is that of the last.
    """
    settings: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        texts = read_parameters(kind)
        for own in fields(kind):
            if not own.metadata or (own.name in settings and own.name not in texts):
                continue
            entry = {key: own.metadata[key] for key in OPTION_KEYS if key in own.metadata}
            if "within" in entry:
                entry["default"] = own.default
            default, text = own.metadata["default_text"], entry.get("help", texts.get(own.name, ""))
            entry["help"] = text + (f"  [default: {default}]" if default else "")
            settings[own.name] = entry
    return settings


def read_parameters(kind: Any) -> dict[str, str]:
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
