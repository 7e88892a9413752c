"""Standard output and error, also if they are closed or full, or have no reader."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Time of the last line to a log, or of the start of the program; None if neither is known.
last_line_time: float | None = None


class Stream(io.FileIO):
    """A standard stream that never fails: work goes on, and ``failure`` is reported at the end."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write data; after a failure, drop them."""
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


@contextmanager
def standard_streams() -> Iterator[Stream | None]:
    """Replace standard output and error by streams that never fail; yield the output's.

    Closed descriptors are opened: otherwise a file that is opened later would get the number of
    standard output, and its lines would be written into that file. None is yielded if another
    program has replaced standard output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    before = sys.stdout, sys.stderr
    output = None
    if sys.stdout is sys.__stdout__:
        output, sys.stdout = _open(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        _, sys.stderr = _open(sys.stderr, 2)
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open(old: TextIO | None, number: int) -> tuple[Stream, TextIO]:
    """Open a descriptor as a text stream, in the encoding of ``old`` if that is not None."""
    raw = Stream(number, "w", closefd=False)
    text = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(old, "encoding", "utf-8"),
        # Paths that are not UTF-8, and other alphabets on an ASCII terminal.
        errors="backslashreplace",
        line_buffering=number == 2 or raw.isatty(),
        write_through=getattr(old, "write_through", False),
    )
    return raw, text
