"""JSON of others: one value, a list of them or one per line, read value by value.

Text is taken as Latin-1: everything that is wanted of it is ASCII, and a file may be cut into parts
at any byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moetuner.files import size_of
from moetuner.files.text import DECODER, parse_json

LONGEST = 1 << 29
CHUNK = 1 << 22
HEAD = 1 << 20
MARK = "\xef\xbb\xbf"
# Server-sent events, as streaming servers write them.
EVENT = "data:"
BETWEEN = ("event:", ":", "id:", "retry:")


@dataclass(frozen=True)
class Record:
    """An object of a file, and which it is, for messages."""

    fields: dict[str, Any]
    where: str

    @classmethod
    def of(cls, fields: object, where: str) -> Record:
        """Check that a value is an object."""
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(fields).__name__}")
        return cls(fields, where)


def head(path: Path, size: int = HEAD) -> bytes:
    """Read the beginning of a file; empty for a folder."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(size)


def looks_like_json(start: bytes) -> bool:
    """Whether text begins as an object, a list or an event does."""
    start = start[:4096].removeprefix(MARK.encode("latin-1")).lstrip()
    return start.startswith((b"{", b"[", EVENT.encode()))


def records(path: Path) -> Iterator[Record]:
    """Read the objects of a file in order: a list, lines, events, or one after another.

    Raises
    ------
    ValueError
        If it is no JSON, is cut off, or has a value that is no object.
    """
    size_of(path)
    with path.open("rb") as file:
        beginning = file.read(64).decode("latin-1")
        if beginning.removeprefix(MARK).lstrip()[:1] == "[":
            yield from _sequence(file, beginning.index("[") + 1, "]")
            return
        file.seek(0)
        number = start = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"line {number}"
            if len(line) > LONGEST:
                raise ValueError(f"{where}: must have at most {LONGEST} bytes")
            text = line.decode("latin-1")
            bare = text
            if text[:1] != "{":  # no copy is made of a long line that needs none
                bare = text.removeprefix(MARK).lstrip().removeprefix(EVENT).strip()
            if bare and bare != "[DONE]" and not bare.startswith(BETWEEN):
                try:
                    fields = parse_json(bare)
                except ValueError as error:
                    if bare[:1] != "{" or text.lstrip().startswith(EVENT):
                        raise ValueError(f"{where}: {error}") from None
                    # A value over several lines, or several on one, as shells put them together.
                    yield from _sequence(file, start + text.index("{"), "", where)
                    return
                yield Record.of(fields, where)
            start += len(line)


def _sequence(file: BinaryIO, start: int, closing: str, line: str = "") -> Iterator[Record]:
    """Read objects one after another, as many bytes at once as the longest of them needs.

    They end with ``closing``, or with the file where that is empty; ``line`` names the first.
    """
    between = " \t\r\n," if closing else " \t\r\n"
    file.seek(start)
    buffer = file.read(CHUNK).decode("latin-1")
    at, number, chunk = 0, 0, CHUNK
    while True:
        while at < len(buffer) and buffer[at] in between:
            at += 1
        where = line if line and not number else f"response {number}"
        if closing and buffer[at : at + 1] == closing:
            return
        if not closing and at == len(buffer):
            buffer, at = file.read(CHUNK).decode("latin-1"), 0
            if not buffer:
                return
            continue
        try:
            fields, end = DECODER.raw_decode(buffer, at)
        except RecursionError:
            raise ValueError(f"{where}: must be JSON: nested too deeply") from None
        except ValueError as error:
            more = file.read(chunk).decode("latin-1")
            if not more or len(buffer) - at > LONGEST:
                raise ValueError(f"{where}: must be JSON: {error}") from None
            buffer, at = buffer[at:] + more, 0
            chunk = min(2 * chunk, LONGEST)
            continue
        yield Record.of(fields, where)
        number, at, chunk = number + 1, end, CHUNK
