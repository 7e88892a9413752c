"""Texts of others (names, paths, contents of files) on their way to a terminal."""

from __future__ import annotations

import re

LONGEST = 300
LONGEST_NAME = 60
# Of a line that a command prints: a name may have spaces.
LONGEST_LINE = 4000
# Without a space in between: a path may have many letters, a name or a list has no use for them.
LONG_WORD = re.compile(r"\S{241,}")


def printable(text: str, most: int = LONGEST) -> str:
    """Return text as one line without control characters, cut where it is longer than ``most``.

    Escape sequences would be obeyed by a terminal, and line ends would break an error's one line.
    """
    shown = line(" ".join(text.split()))
    return shown if len(shown) <= most else shown[:most] + "..."


def line(text: str) -> str:
    """Return a line as it may be shown, with the middle of very long words and lines left out."""
    return name(LONG_WORD.sub(lambda word: name(word[0]), text), LONGEST_LINE)


def name(text: str, most: int = LONGEST_NAME) -> str:
    """Return a name as it fits into a line: the beginning and the end of a long one."""
    if len(text) > most:
        half = (most - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return clean(text)


def clean(text: str) -> str:
    """Return text with a question mark for everything that is no visible character or space."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)
