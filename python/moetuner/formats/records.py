"""Read JSON objects of other programs: one, a list of them, events, or one per line.

Text is decoded as Latin-1: all fields that readers use are ASCII, and a file may then be split at
any byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetuner.files import size_of
from moetuner.files.text import DECODER

LONGEST = 1 << 29
CHUNK = 1 << 22
MARK = "\xef\xbb\xbf"
# Text between objects; streaming servers write the fields of server-sent events there.
BETWEEN = re.compile(r"(?:[\s,]|data:|\[DONE\]|(?:event|id|retry)?:[^\n]*\n)*")


def looks_like_json(start: bytes) -> bool:
    """Return whether text begins like an object, a list or an event."""
    start = start[:4096].removeprefix(MARK.encode("latin-1")).lstrip()
    return start.startswith((b"{", b"[", b"data:"))


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a file, each with its name in messages; memory holds one at a time."""
    size_of(path)
    with path.open("rb") as file:
        buffer = file.read(max(CHUNK, 64)).decode("latin-1").removeprefix(MARK).lstrip()
        is_list = buffer.startswith("[")
        at, number, chunk = int(is_list), 0, CHUNK
        while True:
            at = BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
            where = f"response {number}"
            if is_list and buffer.startswith("]", at):
                return
            try:
                fields, end = DECODER.raw_decode(buffer, at)
            except RecursionError:
                raise ValueError(f"{where}: must be JSON: nested too deeply") from None
            except ValueError as error:
                text = file.read(chunk).decode("latin-1")
                if not text and not is_list and at == len(buffer):
                    return
                if not text or len(buffer) - at > LONGEST:
                    raise ValueError(f"{where}: must be JSON: {error}") from None
                buffer, at, chunk = buffer[at:] + text, 0, min(2 * chunk, LONGEST)
                continue
            if not isinstance(fields, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(fields).__name__}")
            yield where, fields
            number, at, chunk = number + 1, end, CHUNK
