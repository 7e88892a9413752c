"""Read the unpacked sizes of a Parquet file's pages from their headers.

The footer has sizes too, but a reader unpacks what the header of each page says, even if the footer
says less. Headers are in Thrift's compact protocol; their fields are in ``parquet.thrift`` of the
format's specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

# Bytes of a header that are read at first, and at most, as in Arrow.
FIRST, LONGEST = 1 << 12, 1 << 24
# Most levels of nested structures; real headers have three.
DEEPEST = 8
# An encoding in which a value repeats the start of the one before: few bytes may be long texts.
DELTA_BYTE_ARRAY = 7

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
SIZE, STORED, DICTIONARY, VALUES = 2, 3, 7, 1
# Field number of the encoding in a header of data (5), of a dictionary (7) and of data in version 2
# (8); the number of values is always field 1.
ENCODING = {5: 2, DICTIONARY: 2, 8: 4}


class Page(NamedTuple):
    """A page: its unpacked bytes, its values (none of a dictionary), and how they are encoded."""

    unpacked: int
    values: int
    encoding: int


def read_page_headers(file: BinaryIO, begin: int, end: int) -> Iterator[Page]:
    """Read the page headers from one offset in a file to another."""
    while begin < end:
        fields, length = _header(file, begin)
        kind = next((number for number in ENCODING if number in fields), DICTIONARY)
        sizes = fields.get(kind, {})
        if not isinstance(sizes, dict):
            raise ValueError("damaged file: the header of a page is none")
        numbers = (fields.get(SIZE, 0), sizes.get(VALUES, 0), sizes.get(ENCODING[kind], 0))
        stored = fields.get(STORED, 0)
        if not all(isinstance(number, int) and number >= 0 for number in (*numbers, stored)):
            raise ValueError("damaged file: a page has a size that is none")
        unpacked, values, encoding = numbers
        yield Page(unpacked, 0 if kind == DICTIONARY else values, encoding)
        begin += length + stored


def _header(file: BinaryIO, begin: int) -> tuple[dict[int, Any], int]:
    """Read the header at an offset; return its fields by number, and its length."""
    length = FIRST
    while True:
        file.seek(begin)
        data = file.read(length)
        reader = _Compact(data)
        try:
            return reader.struct(), reader.at
        except IndexError:
            if len(data) < length or length >= LONGEST:
                raise ValueError("damaged file: the header of a page is cut off") from None
            length *= 16


class _Compact:
    """A reader of Thrift's compact protocol; raises IndexError at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read the fields of a structure by their numbers."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._integer()
            fields[number] = self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int, *, in_list: bool = False) -> Any:
        if kind in (TRUE, FALSE):
            return self._byte() == TRUE if in_list else kind == TRUE
        if kind == BYTE:
            return self._byte()
        if BYTE < kind < DOUBLE:
            return self._integer()
        if kind == DOUBLE:
            return self._skip(8)
        if kind == BINARY:
            return self._skip(self._varint())
        if depth >= DEEPEST:
            raise ValueError("damaged file: the header of a page is too deep")
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (LIST, SET):
            head = self._byte()
            length = self._varint() if head >> 4 == 15 else head >> 4
            return self._skip_each(length, [head & 15], depth)
        if kind == MAP:
            length = self._varint()
            kinds = self._byte() if length else 0
            return self._skip_each(length, [kinds >> 4, kinds & 15], depth)
        raise ValueError(f"damaged file: a page's header has a field of unknown kind {kind}")

    def _skip_each(self, length: int, kinds: list[int], depth: int) -> None:
        for _ in range(length):
            for kind in kinds:
                self._value(kind, depth + 1, in_list=True)

    def _skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.data):
            raise IndexError

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("damaged file: a page's header has an integer without end")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
