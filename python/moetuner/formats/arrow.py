"""Parquet and Arrow files, read batch by batch with pyarrow, an extra of this package.

A row is a token: a column ``experts`` of lists [L][K], or a column of ids [K] for every layer,
whose name ends in its number (``layer_3``), with ``sequence`` and ``group`` if they are known. Or a
row is one choice, with columns ``token``, ``layer`` and ``expert`` as in CSV.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import experts_in
from moetuner.files import size_of
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.records import head
from moetuner.formats.rows import LABELS, Add, Source, read_tables

PARQUET, ARROW = b"PAR1", b"ARROW1\0\0"
BATCH = 1 << 16
LONGEST_LABEL = 1 << 12
# A choice of an expert has a bit or more, and few files are packed better: what has more values
# for each byte, or unpacks to more bytes, is taken for a decompression bomb.
FREE_VALUES, VALUES_PER_BYTE = 1 << 20, 16
FREE_BYTES, UNPACKED_PER_BYTE = 1 << 26, 100


def recognises(path: Path) -> bool:
    """Whether a file is Parquet or an Arrow file (Feather 2)."""
    start = head(path, len(ARROW))
    return start.startswith(PARQUET) or start == ARROW


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read one table, or several of the same columns one after the other."""
    return read_tables(paths, hints, _opened)


@contextmanager
def _opened(path: Path) -> Iterator[Source]:
    """Open a file."""
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
                about = pyarrow.parquet.read_metadata(file)
                schema = about.schema.to_arrow_schema()
                texts = [name for name in LABELS if name in schema.names]
                reader = pyarrow.parquet.ParquetFile(file, metadata=about, read_dictionary=texts)
            else:
                reader = pyarrow.ipc.open_file(file)
                schema = reader.schema
            if len(set(schema.names)) < len(schema.names):
                raise ValueError("columns must have different names")
            experts = (schema.metadata or {}).get(b"num_experts")
            experts = None if experts is None else experts_in(int(experts))
            batches = _parquet_batches if is_parquet else _arrow_batches

            def add_to(names: Sequence[str], add: Add) -> None:
                for batch in batches(reader, file, size, list(names)):
                    # Offsets that point outside would be followed.
                    batch.validate(full=True)
                    add({name: _values(name, batch.column(name)) for name in names})

            yield Source(list(schema.names), experts, add_to)
    except pyarrow.ArrowException as error:
        raise ValueError(f"damaged file: {error}") from None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a place beyond all files
            raise
        raise ValueError(f"damaged file: {error}") from None


def _parquet_batches(reader: Any, _: Any, size: int, names: list[str]) -> Iterator[Any]:
    """Read the columns of these names."""
    about = reader.metadata
    values, unpacked = about.num_rows, 0
    for number in range(about.num_row_groups):
        group = about.row_group(number)
        columns = [group.column(at) for at in range(group.num_columns)]
        mine = [of for of in columns if of.path_in_schema.split(".list.")[0] in names]
        unpacked += sum(of.total_uncompressed_size for of in mine)
        values = max(values, sum(of.num_values for of in mine))
    _check_size(size, values, unpacked)
    yield from reader.iter_batches(BATCH, columns=names)


def _arrow_batches(reader: Any, file: Any, size: int, names: list[str]) -> Iterator[Any]:
    """Read the columns of these names."""
    rows = 0
    _check_size(size, 0, _unpacked_bytes(file, size))
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number).select(names)
        rows += batch.num_rows
        _check_size(size, rows, 0)
        yield batch


def _check_size(size: int, values: int, unpacked: int) -> None:
    """Refuse what unpacks to far more than routing would: a decompression bomb."""
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


def _unpacked_bytes(file: Any, size: int) -> int:
    """Add up what the compressed buffers of an Arrow file say that they unpack to.

    The footer says where its batches are, each begins with its list of buffers, and each of these
    with its unpacked size (``File.fbs`` and ``Message.fbs`` of Arrow, tables of flatbuffers).
    """
    file.seek(size - 10)
    length = int.from_bytes(file.read(4), "little", signed=True)
    if not 0 < length <= size - 10:
        raise ValueError(f"damaged file: its footer has {length} bytes")
    file.seek(size - 10 - length)
    data = file.read(length)
    total = looked_at = 0
    try:
        footer = _Flat(data)
        for field in (2, 3):  # dictionaries, batches
            for at in footer.structs(footer.root, field, 24):
                begin, about = struct.unpack_from("<qi", footer.data, at)
                looked_at += max(about, 0)
                if looked_at > size:
                    raise ValueError("damaged file: its batches overlap")
                file.seek(max(begin, 0))
                text = file.read(max(about, 0))
                # Before Arrow 0.15 there was only the length in front.
                message = _Flat(text[8:] if text.startswith(b"\xff\xff\xff\xff") else text[4:])
                batch = message.table(message.root, 2)
                if field == 2 and batch is not None:
                    batch = message.table(batch, 1)
                if batch is None or message.table(batch, 3) is None:
                    continue  # not compressed
                for place in message.structs(batch, 2, 16):
                    offset, stored = struct.unpack_from("<qq", message.data, place)
                    file.seek(max(begin + about + offset, 0))
                    unpacked = int.from_bytes(file.read(8), "little", signed=True)
                    total += max(unpacked, 0) if stored > 0 else 0
    except struct.error:
        raise ValueError("damaged file: its footer points outside itself") from None
    return total


class _Flat:
    """Tables of flatbuffers, as far as sizes need them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.root = struct.unpack_from("<I", data)[0]

    def table(self, table: int, number: int) -> int | None:
        """Return where a table or a list in a table is; None if it has its default."""
        back = struct.unpack_from("<i", self.data, table)[0]
        end = struct.unpack_from("<H", self.data, table - back)[0]
        if 4 + 2 * number >= end:
            return None
        at = table + struct.unpack_from("<H", self.data, table - back + 4 + 2 * number)[0]
        return None if at == table else at + int(struct.unpack_from("<I", self.data, at)[0])

    def structs(self, table: int, number: int, size: int) -> range:
        """Return where the structs of a list are."""
        at = self.table(table, number)
        if at is None:
            return range(0)
        count = struct.unpack_from("<I", self.data, at)[0]
        return range(at + 4, min(at + 4 + count * size, len(self.data)), size)


def _values(name: str, column: Any) -> Any:
    """Return labels [T], numbers [T], or ids [T,K] or [T,L,K] of lists."""
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
    if not str(column.type).startswith(
        ("int", "uint") if sizes[1:] else ("int", "uint", "float", "double")
    ):
        raise ValueError(f"{name} must be integers, got {column.type}")
    array: NDArray[Any] = column.to_numpy(zero_copy_only=False).reshape(sizes)
    return array


def _labels(column: Any) -> Any:
    """Return texts or integers of a column, each kind once in memory."""
    import pyarrow

    if column.null_count:
        raise ValueError("columns must have no empty values")
    is_dictionary = pyarrow.types.is_dictionary(column.type)
    kind = column.type.value_type if is_dictionary else column.type
    if not str(kind).startswith(("int", "uint", "string", "large_string")):
        raise ValueError(f"sequence and group must be integers or texts, got {kind}")
    if is_dictionary:
        codes, place = np.unique(column.indices.to_numpy(), return_inverse=True)
        texts = np.empty(len(codes), dtype=object)
        texts[:] = [column.dictionary[int(code)].as_py() for code in codes]
        return texts[place].tolist()
    if str(kind) == "string_view":
        # Many views may be of the same bytes: their lengths, the first of four numbers each.
        views = np.frombuffer(column.buffers()[1], dtype=np.int32)[::4]
        if views.max(initial=0) > LONGEST_LABEL:
            raise ValueError(f"labels must have at most {LONGEST_LABEL} letters")
    return column.to_pylist()
