"""Standard output and error of the command line, which may be closed, full, or read by nobody."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# When a log last got a line, of whichever work, or the program began; None if neither is known.
last_line_time: float | None = None


class Stream(io.FileIO):
    """A standard stream that never fails: work goes on, and ``failure`` is told in the end."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write, or drop what can be written no more."""
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


@contextmanager
def standard_streams() -> Iterator[Stream | None]:
    """Let standard output and error take everything; yield the output, if it is a descriptor's.

    Where one of the three descriptors is closed, a file that is opened later would get its number,
    and what is printed would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    before = sys.stdout, sys.stderr
    output = None
    if sys.stdout is sys.__stdout__:
        output, sys.stdout = _opened(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        _, sys.stderr = _opened(sys.stderr, 2)
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _opened(old: TextIO | None, number: int) -> tuple[Stream, TextIO]:
    """Open a descriptor as text in the encoding of the stream before; None is a closed one."""
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
