"""The numpy formats .npy and .npz, read without pickle and without trusting declared sizes."""

from __future__ import annotations

import errno
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, size_of
from moetuner.files.safetensors import TensorInFile

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
    found = {
        key: re.search(rf"""['"]{key}['"]\s*:\s*{value}""", text.decode("latin-1"))
        for key, value in (
            ("descr", r"""['"]([<>|=]?[?biufcUSO]\d{0,6})['"]"""),
            ("fortran_order", r"(True|False)"),
            ("shape", r"\(([\d\s,]{0,400})\)"),
        )
    }
    for key, match in found.items():
        if match is None:
            raise ValueError(
                f".npy header must have a plain {key}, got {text[:80].decode('latin-1')!r}"
            )
    descr, order, shape = (match[1] for match in found.values() if match)
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


def names_in_npz(path: Path) -> set[str]:
    """Return the names of an archive's arrays; none is read."""
    with _opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def shapes_in_npz(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Types and sizes of an archive's arrays, by their headers.

    Raises
    ------
    ValueError
        If the archive is cut off or damaged, or a member is no array.
    """
    found = {}
    with naming(path), _opened(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                stored, _ = read_npy_header(file)
            found[info.filename.removesuffix(".npy")] = (stored.dtype, stored.shape)
    return found


def read_npz(path: Path, wanted: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Read those of the wanted arrays that an archive has; others are not looked at."""
    size = size_of(path)
    with naming(path), _opened(path) as archive:
        members = {
            info.filename.removesuffix(".npy"): info
            for info in archive.infolist()
            if info.filename.removesuffix(".npy") in wanted
        }
        expanded = sum(info.file_size for info in members.values())
        if expanded > max(EXPANDED_LIMIT, RATIO_LIMIT * size):
            raise ValueError(
                f".npz must not expand more than {RATIO_LIMIT} times, "
                f"got {expanded} bytes from {size}"
            )
        return {name: _read_member(archive, info) for name, info in members.items()}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
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
        raise ValueError(f"damaged .npz: {error}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError("damaged .npz: it points outside itself") from None


def text(arrays: dict[str, NDArray[Any]], name: str) -> str | None:
    """Return the value of a scalar text, if it is there."""
    array = arrays.get(name)
    if array is None:
        return None
    if array.shape != () or array.dtype.kind != "U":
        raise ValueError(f"{name} must be one text, got {array.dtype} {list(array.shape)}")
    return str(array[()])


def integer(arrays: dict[str, NDArray[Any]], name: str) -> int | None:
    """Return the value of a scalar integer, if it is there."""
    array = arrays.get(name)
    if array is None:
        return None
    if array.shape != () or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be one integer, got {array.dtype} {list(array.shape)}")
    return int(array[()])


def texts(arrays: dict[str, NDArray[Any]], name: str) -> list[str] | None:
    """Return values of a list of texts, if it is there."""
    array = arrays.get(name)
    if array is None:
        return None
    if array.ndim != 1 or (array.dtype.kind != "U" and array.size):
        raise ValueError(f"{name} must be texts [n], got {array.dtype} {list(array.shape)}")
    return [str(value) for value in array]


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # The others take memory that the archive's sizes do not show.
        raise ValueError(f"{info.filename}: compression must be none or deflate")
    # A read of a stated size expands no further than that; archive.read() would, if the size is a
    # lie.
    with archive.open(info) as file:
        data = file.read(info.file_size)
    tensor, fortran = read_npy_header(io.BytesIO(data))
    if tensor.nbytes != len(data) - tensor.offset:
        raise ValueError(
            f"{info.filename}: {tensor.dtype} {list(tensor.shape)} must have {tensor.nbytes} "
            f"bytes, got {len(data) - tensor.offset}"
        )
    flat = np.frombuffer(data, dtype=tensor.dtype, offset=tensor.offset)
    return flat.reshape(tensor.shape, order="F" if fortran else "C")
