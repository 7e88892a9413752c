"""Texts for people: names, paths and contents of files on their way to a terminal.

The command line shows errors with these before numpy is loaded, so nothing here needs it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 300
LONGEST_NAME = 60
# Of a line that a command prints: a name may have spaces.
LONGEST_LINE = 4000
# Without a space in between: a path may have many letters, a name or a list has no use for them.
LONG_WORD = re.compile(r"\S{241,}")


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


def suggestion(value: object, choices: Iterable[str]) -> str:
    """Return a question that names the nearest choice, in any case; empty if none comes near."""
    if not isinstance(value, str):
        return ""
    names, begun = {choice.lower(): choice for choice in choices}, value.lower()
    # Letters in another order, which difflib takes for far.
    similar = [name for name in names if sorted(name) == sorted(begun)]
    similar += difflib.get_close_matches(begun, names, n=1)
    similar += [name for name in names if begun and name.startswith(begun)]
    return f". Did you mean {names[similar[0]]}?" if similar else ""
