"""The numpy formats .npy and .npz, read without pickle and without trusting declared sizes."""

from __future__ import annotations

import errno
import io
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import naming, size_of
from moetuner.files.safetensors import TensorInFile, is_size, read, size_holding

MAGIC = b"\x93NUMPY"
HEADER_LIMIT = 1 << 16
HEADERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}

# An archive is refused as a decompression bomb if it claims to hold more bytes than this, and more
# times its own size than the ratio. Recorded routing shrinks to about a half.
EXPANDED_LIMIT = 1 << 28
RATIO_LIMIT = 100


def read_npy_header(file: IO[bytes]) -> tuple[TensorInFile, bool]:
    """Read the header of an .npy file: the array's place, and whether it is in Fortran order."""
    try:
        version = np.lib.format.read_magic(file)[0]
        if version not in HEADERS:
            raise ValueError(f"version must be 1 or 2, got {version}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the interpreter, of a damaged literal
            sizes, fortran, dtype = HEADERS[version](file, HEADER_LIMIT)
    except (ValueError, TypeError, SyntaxError, TokenError, MemoryError, RecursionError) as error:
        raise ValueError(f".npy header must be an array's: {error}") from None
    if dtype.hasobject:
        raise ValueError(
            "array must be plain numbers or texts, got Python objects (pickle is never loaded)"
        )
    if not all(map(is_size, sizes)):
        raise ValueError(f".npy shape must be sizes of an array, got {shown(sizes)}")
    return TensorInFile(dtype, sizes, file.tell()), fortran


def read_npy(path: Path, rows: int | None = None) -> NDArray[Any]:
    """Read the array of an .npy file, or its first rows."""
    with path.open("rb") as file:
        place, fortran = read_npy_header(file)
    size_holding(path, place)
    if fortran and len(place.shape) > 1:
        return read(path, replace(place, shape=place.shape[::-1])).transpose()[:rows]
    first = (len(range(size)[:rows]) for size in place.shape[:1])
    return read(path, replace(place, shape=(*first, *place.shape[1:])))


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays of these names that an archive has; others are not read."""
    size = size_of(path)
    with naming(path), open_archive(path) as archive:
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
def open_archive(path: Path, what: str = ".npz") -> Iterator[zipfile.ZipFile]:
    """Open an archive; errors of zipfile for a damaged one become ValueErrors."""
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
    if flat.dtype.kind == "U" and flat.nbytes:
        highest = int(flat.view(np.dtype("u4").newbyteorder(flat.dtype.byteorder)).max())
        if highest > sys.maxunicode:
            raise ValueError(f"texts must be of Unicode characters, got code {highest}")
    return flat.reshape(tensor.shape, order="F" if fortran else "C")
