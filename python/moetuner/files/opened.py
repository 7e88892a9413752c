"""An opened input: what a file says of itself, each fact read once and handed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from moetuner._checks import path_in
from moetuner.files import naming, npz, read_whole, safetensors, size_of

Kind = Literal["safetensors", "npz", "npy", "jsonl"]

# Bytes of the head of a file, by which readers recognise it: of text, such as JSON with long
# values, and of arrays, of which many files may be open. Most placements are no longer.
HEAD, HEAD_OF_ARRAYS = 1 << 20, 1 << 17
SHORTEST_SAFETENSORS = 8
# First bytes of compressed files, and what unpacks them.
PACKED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"\xfd7zXZ": "unxz"}


@dataclass(frozen=True)
class Opened:
    """A file or a folder that is read; what was asked of it is not read again.

    Nothing is read before it is asked for, and errors are raised then. A value is good for one
    reading: it does not see that its file changes.

    Parameters
    ----------
    path
        The file or folder.
    """

    path: Path

    @cached_property
    def head(self) -> bytes:
        """The first bytes of a file; none of a folder."""
        if not self.path.is_file():
            return b""
        with self.path.open("rb") as file:
            start = file.read(HEAD_OF_ARRAYS)
            return start if b"\0" in start else start + file.read(HEAD - len(start))

    @cached_property
    def kind(self) -> Kind:
        """Format by the first bytes; the name does not matter.

        A safetensors file begins with the length of its header. Text read as such a length is
        beyond any file's size, so JSON lines are never taken for it.
        """
        path, size, start = self.path, size_of(self.path), self.head[:64]
        if not start:
            raise ValueError(f"{path}: must not be empty, got 0 bytes")
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return "npz"
        if start.startswith(npz.MAGIC):
            return "npy"
        header = int.from_bytes(start[:SHORTEST_SAFETENSORS], "little")
        if start[SHORTEST_SAFETENSORS:][:1] == b"{" and header <= size - SHORTEST_SAFETENSORS:
            return "safetensors"
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
            return "jsonl"
        for magic, program in PACKED.items():
            if start.startswith(magic):
                raise ValueError(f"{path}: must not be compressed: unpack it with {program} first")
        rule = (
            "must be safetensors, .npz, .npy or JSON lines, CSV or Parquet as docs/quickstart.md "
            "has them, or what an engine records"
        )
        raise ValueError(
            f"{path}: {rule}; its first bytes fit none of them, or its header is cut off"
        )

    @cached_property
    def header(self) -> safetensors.Header:
        """The header of a safetensors file."""
        return safetensors.read_header(self.path)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the arrays of an ``.npz``."""
        with naming(self.path), npz.open_archive(self.path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())

    def read_whole(self) -> bytes:
        """Read all bytes of a small file; those of its head are there already."""
        is_read = "head" in vars(self) and 0 < len(self.head) == size_of(self.path)
        return self.head if is_read else read_whole(self.path)

    @cached_property
    def members(self) -> dict[Path, Opened]:
        """Files of a folder by which it was recognised."""
        return {}


def opened(source: object) -> Opened:
    """Return what is opened already, or a path, checked and opened."""
    return source if isinstance(source, Opened) else Opened(path_in(source))
