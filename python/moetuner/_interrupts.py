"""Ctrl-C and SIGTERM on the command line, from the first import on.

A library leaves signals to its user. But the command line is imported for most of a second before
its own code runs, and an interrupt then would print a traceback. So where this process is the
command line, and only there, signals end it quietly until ``main`` takes over.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import FrameType

_terminated = False


def quiet_start() -> None:
    """End at once on signals while the command line is being imported; elsewhere do nothing."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    # While "python -m moetuner" looks for the module, its name is not yet in place.
    as_module = started == "-m" and ("-m", "moetuner") in pairwise(sys.orig_argv)
    if not (Path(started).name == "moetuner" or as_module):
        return
    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            # One that is ignored, as under nohup, stays so.
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, _end)


@contextmanager
def heard() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM as for Ctrl-C.

    Only for the first one: the second would break off the writing of the best so far.
    """
    global _terminated
    _terminated = False
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _stop}
    taken = [number for number in handlers if signal.getsignal(number) in (_end, signal.SIG_DFL)]
    with suppress(ValueError):  # not the main thread
        for number in taken:
            signal.signal(number, handlers[number])
    try:
        yield
    finally:
        with suppress(ValueError):
            for number in taken:
                signal.signal(number, signal.SIG_DFL)


def status() -> int | None:
    """Return the exit status of a process that was told to terminate; None if it was not."""
    return 128 + signal.SIGTERM if _terminated else None


def _stop(number: int, frame: FrameType | None) -> None:
    global _terminated
    if not _terminated:
        _terminated = True
        raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"moetuner: error: interrupted\n")
    os._exit(128 + number)


quiet_start()
