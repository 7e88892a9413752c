"""Read Parquet and Arrow files batch by batch with pyarrow, an extra of this package.

A row is a token, with a column ``experts`` of lists [L][K] and perhaps ``sequence`` and ``group``.
Or a row is one choice, with columns ``token``, ``layer`` and ``expert`` as in CSV.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import experts_in
from moetuner.files import size_of
from moetuner.files.opened import Opened
from moetuner.formats.pages import DELTA_BYTE_ARRAY, Page, read_page_headers
from moetuner.formats.rows import LABELS, Add, Columns, OpenTable, add_rows, read_tables

PARQUET, ARROW = b"PAR1", b"ARROW1\0\0"
BATCH = 1 << 16
LONGEST_LABEL = 1 << 12
# A choice of an expert has at least a bit, and few files are packed better. A file with more values
# per byte, or more unpacked bytes per byte, is refused as a decompression bomb.
FREE_VALUES, VALUES_PER_BYTE = 1 << 20, 16
FREE_BYTES, UNPACKED_PER_BYTE = 1 << 26, 100


def recognises(file: Opened) -> bool:
    """Return whether a file is Parquet or an Arrow file (Feather 2)."""
    start = file.head[: len(ARROW)]
    return start.startswith(PARQUET) or start == ARROW


@contextmanager
def open_table(path: Path) -> Iterator[OpenTable]:
    """Open a file as a table."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "Parquet and Arrow files need pyarrow: pip install 'moetuner[parquet]'"
        ) from None
    size = size_of(path)
    try:
        with path.open("rb") as file:
            is_parquet = file.read(4) == PARQUET
            file.seek(0)
            if is_parquet:
                metadata = pyarrow.parquet.read_metadata(file)
                schema = metadata.schema.to_arrow_schema()
                texts = [name for name in LABELS if name in schema.names]
                reader = pyarrow.parquet.ParquetFile(file, metadata=metadata, read_dictionary=texts)
            else:
                # Behind its first bytes a file is a stream, which has no places to point outside.
                file.seek(len(ARROW))
                messages = pyarrow.ipc.MessageReader.open_stream(file)
                _check_size(size, 0, sum(map(_unpacked_bytes, messages)))
                file.seek(len(ARROW))
                reader = pyarrow.ipc.open_stream(file)
                schema = reader.schema
            if len(set(schema.names)) < len(schema.names):
                raise ValueError("columns must have different names")
            experts = (schema.metadata or {}).get(b"num_experts")
            experts = None if experts is None else experts_in(int(experts))
            batches = _parquet_batches if is_parquet else _arrow_batches

            def add_to(names: Sequence[str], add: Add) -> None:
                first = 0
                for batch in batches(reader, file, size, list(names)):
                    # Offsets that point outside would be followed.
                    batch.validate(full=True)

                    def columns_of(begin: int, end: int, batch: Any = batch) -> Columns:
                        rows = batch.slice(begin, end - begin)
                        return {name: _values(name, rows.column(name)) for name in names}

                    add_rows(add, columns_of, batch.num_rows, f"row {first}")
                    first += batch.num_rows

            yield OpenTable(list(schema.names), experts, add_to)
    except (pyarrow.ArrowException, MemoryError) as error:
        raise ValueError(f"damaged file: {error}") from None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a place beyond all files
            raise
        raise ValueError(f"damaged file: {error}") from None


read = partial(read_tables, open_table)


def _parquet_batches(reader: Any, file: BinaryIO, size: int, names: list[str]) -> Iterator[Any]:
    """Read columns of a Parquet file in batches."""
    metadata = reader.metadata
    values, unpacked = metadata.num_rows, 0
    for number in range(metadata.num_row_groups):
        group, group_values = metadata.row_group(number), 0
        for column in map(group.column, range(group.num_columns)):
            # Lists have names inside, which differ from writer to writer.
            if column.path_in_schema.split(".", 1)[0] not in names:
                continue
            for page in _pages(file, column, size):
                unpacked += page.unpacked
                group_values += page.values
        values = max(values, group_values)
        _check_size(size, values, unpacked)
    yield from reader.iter_batches(BATCH, columns=names)


def _pages(file: BinaryIO, column: Any, size: int) -> Iterator[Page]:
    """Read the page headers of a column, at the place that the footer gives."""
    begin = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < begin:
        begin = column.dictionary_page_offset
    for page in read_page_headers(file, begin, min(begin + column.total_compressed_size, size)):
        if page.encoding == DELTA_BYTE_ARRAY:
            raise ValueError(
                f"column {column.path_in_schema} must have another encoding than DELTA_BYTE_ARRAY: "
                "write it plain or with a dictionary"
            )
        yield page


def _arrow_batches(reader: Any, _: BinaryIO, size: int, names: list[str]) -> Iterator[Any]:
    """Read columns of an Arrow file in batches."""
    rows = 0
    for batch in reader:
        rows += batch.num_rows
        _check_size(size, rows, 0)
        yield batch.select(names)


def _check_size(size: int, values: int, unpacked: int) -> None:
    """Raise if a file unpacks to far more than routing would: a decompression bomb."""
    if values > max(FREE_VALUES, VALUES_PER_BYTE * size):
        raise ValueError(
            f"must have at most {VALUES_PER_BYTE} values a byte, got {values} in {size} bytes: "
            "write it without compression"
        )
    if unpacked > max(FREE_BYTES, UNPACKED_PER_BYTE * size):
        raise ValueError(
            f"must not unpack to more than {UNPACKED_PER_BYTE} times its size, got {unpacked} "
            f"bytes from {size}: write it without compression"
        )


def _unpacked_bytes(message: Any) -> int:
    """Return the sum of the unpacked sizes of the compressed buffers of a batch.

    Each buffer begins with its unpacked size. The offsets of buffers are in the message's tables of
    flatbuffers (``Message.fbs`` of Arrow), which pyarrow has checked.
    """
    data = message.metadata.to_pybytes()
    batch = _field(data, struct.unpack_from("<I", data)[0], 2)
    if message.type == "dictionary":
        batch = _field(data, batch, 1)
    is_compressed = message.type != "schema" and _field(data, batch, 3)
    buffers = _field(data, batch, 2) if is_compressed else 0
    if not buffers:
        return 0
    end = buffers + 4 + 16 * struct.unpack_from("<I", data, buffers)[0]
    places = struct.iter_unpack("<qq", data[buffers + 4 : end])
    begins = [message.body.slice(at, 8) for at, stored in places if stored > 0 <= at]
    sizes = (int.from_bytes(begin.to_pybytes(), "little", signed=True) for begin in begins)
    return sum(max(size, 0) for size in sizes)


def _field(data: bytes, table: int, number: int) -> int:
    """Return the offset of a table or list in a flatbuffers table; 0 if it has none."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, fields)[0]:
        return 0
    at = struct.unpack_from("<H", data, fields + 4 + 2 * number)[0]
    return int(at and table + at + struct.unpack_from("<I", data, table + at)[0])


def _values(name: str, column: Any) -> Any:
    """Return a column as labels [T], numbers [T], or ids [T,K] or [T,L,K] of lists."""
    if name in LABELS:
        return _labels(column)
    sizes = [len(column)]
    while str(column.type).startswith(("list", "large_list", "fixed_size_list")):
        if column.null_count:
            raise ValueError(f"{name} must have no empty lists")
        values = column.flatten()
        size, rest = divmod(len(values), len(column)) if len(column) else (0, 0)
        lengths = None if str(column.type).startswith("fixed") else column.value_lengths()
        if rest or (lengths is not None and (lengths.to_numpy() != size).any()):
            raise ValueError(f"{name} must have lists of one length")
        sizes.append(size)
        column = values
    if column.null_count:
        raise ValueError(f"{name} must have no empty values")
    # Ids are integers; numbers may be written as floats.
    types = ("int", "uint") if sizes[1:] else ("int", "uint", "float", "double")
    if not str(column.type).startswith(types):
        raise ValueError(f"{name} must be integers, got {column.type}")
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False).reshape(sizes)
    return array


def _labels(column: Any) -> Any:
    """Return the texts or integers of a column; equal texts of a dictionary share memory."""
    if column.null_count:
        raise ValueError("columns must have no empty values")
    is_dictionary = hasattr(column, "dictionary")
    kind = str(column.type.value_type if is_dictionary else column.type)
    if not kind.startswith(("int", "uint", "string", "large_string")):
        raise ValueError(f"sequence and group must be integers or texts, got {kind}")
    if is_dictionary:
        texts = column.dictionary.to_pylist()
        return [texts[code] for code in column.indices.to_pylist()]
    if kind == "string_view":
        # Many views may be of the same bytes: their lengths, the first of four numbers each.
        views = np.frombuffer(column.buffers()[1], dtype=np.int32)[::4]
        if views.max(initial=0) > LONGEST_LABEL:
            raise ValueError(f"labels must have at most {LONGEST_LABEL} letters")
    return column.to_pylist()
