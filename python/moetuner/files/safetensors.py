"""The safetensors format: where each tensor lies in a file, and writing tensors piece by piece.

The library of that name maps a file or holds it whole. Here a trace is read and written in shards,
and a file that is cut off while it is open is an error message, not a signal: so only the header is
read, and every size it declares is checked against the file before anything is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import naming, size_of
from moetuner.files.text import parse_json

DTYPES = {
    "BOOL": np.dtype("?"),
    **{
        f"{kind.upper()}{8 * size}": np.dtype(f"<{kind}{size}")
        for kind in "iu"
        for size in (1, 2, 4, 8)
    },
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# A trace's header has a few hundred bytes; that of the largest checkpoint a few million.
HEADER_LIMIT = 1 << 24


@dataclass(frozen=True)
class TensorInFile:
    """The place of an array in a file: its type, shape and first byte."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The header of a file: metadata, entries of tensors by name, and the first byte after it."""

    metadata: dict[str, str]
    entries: dict[str, Any]
    data: int

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def tensor(self, name: str) -> TensorInFile:
        """Return the place of a tensor, checked."""
        if name not in self.entries:
            raise ValueError(f"must hold a tensor {name!r}, got {sorted(self.entries)[:8]}")
        entry = self.entries[name]
        code, shape = entry.get("dtype"), entry.get("shape")
        begin, end = entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"{name}: dtype must be one of {', '.join(DTYPES)}, got {code!r}")
        if not isinstance(shape, list) or not all(is_size(size) for size in shape):
            raise ValueError(f"{name}: shape must be a list of sizes, got {shown(shape)}")
        tensor = TensorInFile(DTYPES[code], tuple(shape), self.data + begin)
        if tensor.nbytes != end - begin:
            raise ValueError(
                f"{name}: {code} {shape} must have {tensor.nbytes} bytes, got {end - begin}"
            )
        return tensor


def read_header(path: Path) -> Header:
    """Read and check the header; no tensor is touched."""
    with naming(path):
        size = size_of(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise ValueError(
                    f"safetensors header must have at most {max(0, min(size - 8, HEADER_LIMIT))} "
                    f"bytes, got {length} in a file of {size}"
                )
            text = file.read(length)
        with naming("safetensors header"):
            fields = parse_json(text)
        metadata = fields.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("safetensors metadata must be texts")
        last = 0
        for name, entry in fields.items():
            extent = entry.get("data_offsets") if isinstance(entry, dict) else None
            if not (isinstance(extent, list) and len(extent) == 2 and all(map(is_size, extent))):
                raise ValueError(f"{name}: data_offsets must be two sizes, got {shown(extent)}")
            last = max(last, *extent)
        if 8 + length + last != size:
            raise ValueError(
                f"file must have {8 + length + last} bytes, as its header says, got {size}"
            )
        return Header(metadata, fields, 8 + length)


def size_holding(path: Path, tensor: TensorInFile) -> int:
    """Return the size of a file that an array must be in."""
    size, end = size_of(path), tensor.offset + tensor.nbytes
    if end > size:
        raise ValueError(f"file must have {end} bytes, got {size}")
    return size


def read(path: Path, tensor: TensorInFile) -> NDArray[Any]:
    """Read one whole tensor into memory, in native byte order."""
    return read_all(path, {"": tensor})[""]


def read_all(path: Path, tensors: Mapping[str, TensorInFile]) -> dict[str, NDArray[Any]]:
    """Read whole tensors into memory by name, in native byte order."""
    arrays: dict[str, NDArray[Any]] = {}
    if not tensors:
        return arrays
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            with naming(path):
                size_holding(path, tensor)  # before memory is asked for
            file.seek(tensor.offset)
            data = file.read(tensor.nbytes)
            if len(data) < tensor.nbytes:
                raise ValueError(f"{path}: file shrank while it was read")
            array = np.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)
            arrays[name] = array.astype(tensor.dtype.newbyteorder("="), copy=False)
    return arrays


Pieces = tuple["np.dtype[Any]", tuple[int, ...], Iterable[NDArray[Any]]]


def whole(array: NDArray[Any]) -> Pieces:
    """Return an array as the one piece of its tensor."""
    return array.dtype, array.shape, (array,)


def write(path: Path, tensors: Mapping[str, Pieces], metadata: Mapping[str, str]) -> None:
    """Write tensors, each in pieces that follow one another along the first axis.

    ``path`` is a temporary one of ``replacing``. The widest types come first, so that all tensors
    are aligned.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        code = CODES[dtype.newbyteorder("<")]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, (dtype, _, pieces) in tensors.items():
            little = dtype.newbyteorder("<")
            for piece in pieces:
                file.write(np.ascontiguousarray(piece, dtype=little).data)
            expected = 8 + len(header) + entries[name]["data_offsets"][1]
            if file.tell() != expected:
                raise ValueError(f"{name}: pieces must fill its shape")


def is_size(value: object) -> bool:
    """Return whether a value of a file is a whole number that may be a size or a place."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
