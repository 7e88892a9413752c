"""Texts for a terminal: names, paths and contents of files, made printable.

The command line writes errors with these before numpy is loaded, so this module does not use it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 300
LONGEST_NAME = 60
# Largest length of a printed line, whose names may have spaces.
LONGEST_LINE = 4000
# A word that is too long to show: longer than the paths of most files.
LONG_WORD = re.compile(r"\S{241,}")


def printable(text: str, longest: int = LONGEST) -> str:
    """Return text as one line without control characters, cut after ``longest`` letters.

    A terminal would obey escape sequences, and an error must stay one line.
    """
    shown = line(" ".join(text.split()))
    return shown if len(shown) <= longest else shown[:longest] + "..."


def line(text: str) -> str:
    """Return a printable line, without the middle of very long words and lines."""
    return name(LONG_WORD.sub(lambda word: name(word[0]), text), LONGEST_LINE)


def name(text: str, longest: int = LONGEST_NAME) -> str:
    """Return a printable name; a long one is its beginning and its end."""
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return clean(text)


def clean(text: str) -> str:
    """Return text with a question mark in place of unprintable characters."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def suggestion(value: object, choices: Iterable[str]) -> str:
    """Return a question that names the most similar choice; empty if none is similar."""
    if not isinstance(value, str):
        return ""
    names, text = {choice.lower(): choice for choice in choices}, value.lower()
    # difflib finds letters in another order not similar.
    similar = [name for name in names if sorted(name) == sorted(text)]
    similar += difflib.get_close_matches(text, names, n=1)
    similar += [name for name in names if text and name.startswith(text)]
    return f". Did you mean {names[similar[0]]}?" if similar else ""
