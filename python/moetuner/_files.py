"""Files: written whole or not at all, told apart by content, named in their errors."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Kind = Literal["safetensors", "npz", "npy", "jsonl"]

SHORTEST_SAFETENSORS = 8
LONGEST_MESSAGE = 300


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that replaces it on success and vanishes on failure."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; give the mode that an ordinary new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the path in front of what is wrong with the file's content, in one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, EOFError) as error:
        prefix = f"{path}: "
        text = " ".join(str(error).removeprefix(prefix).split()) or type(error).__name__
        # Some of it may be the content of the file, of any length and with any control character.
        printable = "".join(character if character.isprintable() else "?" for character in text)
        shown = (
            printable if len(printable) <= LONGEST_MESSAGE else printable[:LONGEST_MESSAGE] + "..."
        )
        raise ValueError(prefix + shown) from None


def size_of(path: Path) -> int:
    """Size of a regular file; a pipe or a device would block, or could not be read twice."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path}: must be a file, got a directory")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: must be a regular file")
    return found.st_size


def kind_of(path: Path) -> Kind:
    """Format of a file by its first bytes; the name does not matter.

    A safetensors file begins with the length of its header. Text read as such a length is beyond
    any file's size, so JSON lines are never taken for it.

    Raises
    ------
    ValueError
        If the content is none of the formats that moetuner reads.
    """
    size = size_of(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path}: must not be empty, got 0 bytes")
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    header = int.from_bytes(start[:SHORTEST_SAFETENSORS], "little")
    if start[SHORTEST_SAFETENSORS:][:1] == b"{" and header <= size - SHORTEST_SAFETENSORS:
        return "safetensors"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return "jsonl"
    rule = "must be safetensors, .npz, .npy or JSON lines"
    raise ValueError(f"{path}: {rule}; its first bytes fit none of them, or its header is cut off")
