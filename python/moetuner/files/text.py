"""Texts of others (names, paths, contents of files) on their way to a terminal."""

from __future__ import annotations

import json
import re
from typing import Any

from moetuner._checks import shown

LONGEST = 300
LONGEST_NAME = 60
# Of a line that a command prints: a name may have spaces.
LONGEST_LINE = 4000
# Without a space in between: a path may have many letters, a name or a list has no use for them.
LONG_WORD = re.compile(r"\S{241,}")


def parse_json(content: bytes | str, *, allow_nan: bool = False) -> dict[str, Any]:
    """Read an object of JSON as its standard has it: every key once, and no NaN.

    Python writes NaN, so what engines write with it may have some in unused fields.
    Of two values of a key readers would take different ones.
    """
    try:
        refuse = None if allow_nan else _refuse
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        fields = json.loads(text, object_pairs_hook=_once, parse_constant=refuse)
    except RecursionError:
        raise ValueError("must be JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"must be JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"must be a JSON object, got {type(fields).__name__}")
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for at, key in enumerate(keys) if key in keys[:at])
        raise ValueError(f"key {shown(twice)} must be there once")
    return fields


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


# Reads a value where others follow it, by the same rules.
DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse)


def printable(text: str, longest: int = LONGEST) -> str:
    """Return text as one line without control characters, cut where it is longer than ``longest``.

    Escape sequences would be obeyed by a terminal, and line ends would break an error's one line.
    """
    shown = line(" ".join(text.split()))
    return shown if len(shown) <= longest else shown[:longest] + "..."


def line(text: str) -> str:
    """Return a line as it may be shown, with the middle of very long words and lines left out."""
    return name(LONG_WORD.sub(lambda word: name(word[0]), text), LONGEST_LINE)


def name(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a name as it fits into a line: the beginning and the end of a long one."""
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return clean(text)


def clean(text: str) -> str:
    """Return text with a question mark for everything that is no visible character or space."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)
