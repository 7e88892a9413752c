"""The numpy formats .npy and .npz, read without pickle and without trusting declared sizes."""

from __future__ import annotations

import errno
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, size_of
from moetuner.files.safetensors import TensorInFile, read, size_holding

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 1 << 16

# An archive that says it holds more than both of these is taken for a decompression bomb. Recorded
# routing shrinks to about a half.
EXPANDED_LIMIT = 1 << 28
RATIO_LIMIT = 100


def read_npy_header(file: IO[bytes]) -> tuple[TensorInFile, bool]:
    """Read the header of an .npy file: the array's place, and whether it is in Fortran order.

    The header is a Python literal in a fixed form. It is matched, not evaluated: a damaged one
    would make the interpreter print warnings.
    """
    start = file.read(8)
    if start[:6] != MAGIC or len(start) < 8:
        raise ValueError(f"must start with the .npy magic {MAGIC!r}, got {start[:6]!r}")
    if start[6] not in (1, 2):
        raise ValueError(f".npy version must be 1 or 2, got {start[6]}")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > HEADER_LIMIT:
        raise ValueError(f".npy header must have at most {HEADER_LIMIT} bytes, got {length}")
    text = file.read(length)
    if len(text) < length:
        raise ValueError(f".npy header must have {length} bytes, got {len(text)}")
    values = []
    for key, value in (
        ("descr", r"""['"]([<>|=]?[?biufcUSO]\d{0,6})['"]"""),
        ("fortran_order", r"(True|False)"),
        ("shape", r"\(([\d\s,]{0,400})\)"),
    ):
        match = re.search(rf"""['"]{key}['"]\s*:\s*{value}""", text.decode("latin-1"))
        if match is None:
            raise ValueError(
                f".npy header must have a plain {key}, got {text[:80].decode('latin-1')!r}"
            )
        values.append(match[1])
    descr, order, shape = values
    try:
        dtype = np.dtype(descr)
    except TypeError:
        raise ValueError(f".npy descr must be an element type, got {descr!r}") from None
    if dtype.hasobject:
        raise ValueError(
            "array must be plain numbers or texts, got Python objects (pickle is never loaded)"
        )
    sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
    if any(size >= 1 << 60 for size in sizes):
        raise ValueError(f".npy shape must be sizes of an array, got {list(sizes)}")
    return TensorInFile(dtype, sizes, 8 + width + length), order == "True"


def read_npy(path: Path) -> NDArray[Any]:
    """Read the array of an .npy file."""
    with path.open("rb") as file:
        place, fortran = read_npy_header(file)
    size_holding(path, place)
    if not fortran:
        return read(path, place)
    return read(path, replace(place, shape=place.shape[::-1])).transpose()


def names_in_npz(path: Path) -> set[str]:
    """Return the names of an archive's arrays; none is read."""
    with opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def shapes_in_npz(path: Path) -> dict[str, TensorInFile]:
    """Return types and sizes of an archive's arrays, by their headers."""
    arrays = {}
    with naming(path), opened(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                arrays[info.filename.removesuffix(".npy")] = read_npy_header(file)[0]
    return arrays


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Read those of these arrays that an archive has; others are not looked at."""
    size = size_of(path)
    with naming(path), opened(path) as archive:
        members = {
            name: info
            for info in archive.infolist()
            if (name := info.filename.removesuffix(".npy")) in names
        }
        expanded = sum(info.file_size for info in members.values())
        if expanded > max(EXPANDED_LIMIT, RATIO_LIMIT * size):
            raise ValueError(
                f".npz must not expand more than {RATIO_LIMIT} times, "
                f"got {expanded} bytes from {size}"
            )
        return {name: _read_member(archive, info) for name, info in members.items()}


@contextmanager
def opened(path: Path, what: str = ".npz") -> Iterator[zipfile.ZipFile]:
    """Open an archive; what zipfile raises of a damaged one becomes a ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        # RuntimeError: an encrypted member. NotImplementedError: a compression unknown to zipfile.
        raise ValueError(f"damaged {what}: {error}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"damaged {what}: it points outside itself") from None


def plain(arrays: dict[str, NDArray[Any]], name: str, kinds: str, axes: int, rule: str) -> Any:
    """Return the value of a small array as Python has it; None if it is not there.

    ``kinds`` are numpy's letters of the types that it may have, ``axes`` its dimensions, ``rule``
    what it must be, for messages.
    """
    array = arrays.get(name)
    if array is None:
        return None
    if array.ndim != axes or (array.size and array.dtype.kind not in kinds):
        raise ValueError(f"{name} must be {rule}, got {array.dtype} {list(array.shape)}")
    return array.tolist()


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The others take memory that the archive's sizes do not show.
        raise ValueError(f"{info.filename}: compression must be none or deflate")
    # A read of a stated size expands no further than that; archive.read() would, if the size is a
    # lie.
    with archive.open(info) as file, naming(info.filename):
        return array_in_npy(file.read(info.file_size))


def array_in_npy(data: bytes) -> NDArray[Any]:
    """Return the array of an .npy file in memory."""
    tensor, fortran = read_npy_header(io.BytesIO(data))
    if tensor.nbytes != len(data) - tensor.offset:
        raise ValueError(
            f"{tensor.dtype} {list(tensor.shape)} must have {tensor.nbytes} bytes, got "
            f"{len(data) - tensor.offset}"
        )
    flat = np.frombuffer(data, dtype=tensor.dtype, offset=tensor.offset)
    return flat.reshape(tensor.shape, order="F" if fortran else "C")
