"""Settings: fields of a dataclass with their options, help, checks and texts."""

from __future__ import annotations

import inspect
import re
from dataclasses import Field, field, fields
from typing import Any

from moetuner._checks import one_of

# Groups of settings in the help.
MACHINE, GOAL, ENGINE, OTHER = "The machine", "The goal", "The engine", "Other"


def setting(default: Any, group: str = GOAL, default_text: str = "", **metadata: Any) -> Any:
    """Return a field of a dataclass that an option can set; the class's docstring has its help.

    Parameters
    ----------
    default
        Its default value.
    group, default_text
        Its group in the help, and the default in words, unless the docstring says it.
    metadata
        How an option gives the value, one of: ``choices``; ``read``, a function of the text, which
        raises ValueError for a wrong one and whose docstring says what it reads; ``above``, a limit
        that a number must exceed; ``within``, the ends of a range of integers. A setting without
        one of them is a flag.

        About the option: ``flag``, its name, by default the field's; ``metavar``; ``help``, by
        default the docstring's; ``multiple``, whether it may be repeated; ``usual``, a value that
        means the same as none.

        About the value: ``check``, a function of name and value that raises for a wrong one, by
        default for one that is not in ``choices``; ``label``, its name on a page; ``words``, its
        text on a page, by value or as a function; ``to_json`` and ``from_json``, its form in a
        placement's file; ``by_engine``, whether an engine decides it.
    """
    return field(
        default=default, metadata={"group": group, "default_text": default_text, **metadata}
    )


def reuse_setting(kind: Any, name: str) -> Any:
    """Return a field that is declared in another dataclass, so that both are the same setting."""
    declared = kind.__dataclass_fields__[name]
    return field(default=declared.default, metadata=declared.metadata)


def check_settings(values: Any) -> None:
    """Raise for a field of a dataclass whose value breaks the rule of its setting."""
    for declared in fields(values):
        check_setting(declared, getattr(values, declared.name))


def check_setting(declared: Field[Any], value: object) -> None:
    """Raise for a value that breaks the rule of a setting; a default of None is allowed."""
    if value is None and declared.default is None:
        return
    check, choices = declared.metadata.get("check"), declared.metadata.get("choices")
    if check is not None:
        check(declared.name, value)
    elif choices is not None:
        one_of(declared.name, value, choices)


# Metadata of a setting that describe its option.
OPTION_KEYS = (
    "group",
    "choices",
    "read",
    "above",
    "within",
    "usual",
    "metavar",
    "flag",
    "help",
    "multiple",
)


def list_settings(*kinds: Any) -> dict[str, dict[str, Any]]:
    """Return the metadata of options, and their help, by the names of dataclasses' settings.

    A setting that several dataclasses declare has the help of the last.
    """
    settings: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        texts = read_parameters(kind)
        for declared in fields(kind):
            name, metadata = declared.name, declared.metadata
            if not metadata or (name in settings and name not in texts):
                continue
            option = {key: metadata[key] for key in OPTION_KEYS if key in metadata}
            if "within" in option:
                option["default"] = declared.default
            default, text = metadata["default_text"], option.get("help", texts.get(name, ""))
            option["help"] = text + (f"  [default: {default}]" if default else "")
            settings[name] = option
    return settings


def read_parameters(kind: Any) -> dict[str, str]:
    """Read the texts of parameters, by name, from a docstring, without markup and shapes."""
    texts: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Parameters\n----------\n")
    for line in section.partition("\n\n")[0].splitlines():
        if not line.startswith(" "):
            names = line.split(", ")
            texts |= dict.fromkeys(names, "")
            continue
        for name in names:
            texts[name] = f"{texts[name]} {line.strip()}".strip()
    markup = re.compile(r'``"?|"?``| \[[A-Z](,[A-Z])*\]')
    return {name: markup.sub("", text) for name, text in texts.items()}


def read_count(text: str) -> int:
    """Read a number from 0."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(text)
    return int(text)
