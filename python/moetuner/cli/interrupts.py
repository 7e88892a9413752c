"""Ctrl-C, SIGTERM and want of memory on the command line, from the first import on.

A library leaves signals to its user. But a command is imported for a third of a second before its
own code runs, and an interrupt then would print a traceback. So where this process is the command
line, and only there, signals end it quietly until ``raising_interrupts`` takes over.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

# Signal that has interrupted the command that runs.
_signal: int | None = None
# When this process, if it is the command line, began to import it.
_began: float | None = None


def end_quietly() -> None:
    """End at once on signals while the command line is being imported; elsewhere do nothing."""
    global _began
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    # The command, or "python -m moetuner".
    if not f"/{started}".endswith(("/moetuner", "/moetuner/__main__.py")):
        return
    _began = time.monotonic()
    sys.excepthook = _say_briefly
    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            # One that is ignored, as under nohup, stays so.
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, _exit_at_once)


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for the first SIGINT or SIGTERM.

    A second SIGTERM, as sent to a whole group, is ignored: it would break off the writing of the
    best so far. A second Ctrl-C raises once more, for who does not want to wait for it.
    """
    global _signal
    _signal = None
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    # One that is ignored, or somebody else's, stays so.
    ours = (_exit_at_once, signal.SIG_DFL, signal.default_int_handler)
    taken = [number for number in numbers if before[number] in ours]
    with suppress(ValueError):  # not the main thread
        for number in taken:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        with suppress(ValueError):
            for number in taken:
                own = before[number]
                signal.signal(number, signal.SIG_DFL if own is _exit_at_once else own)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End at once on signals that ``raising_interrupts`` takes, while a command is being imported.

    Some of what Python calls during an import drops a KeyboardInterrupt, and what is half imported
    cannot be imported again.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is _interrupt]
    if _began is None:  # another's process, which may not end
        numbers = []
    for number in numbers:
        signal.signal(number, _exit_at_once)
    yield
    for number in numbers:
        signal.signal(number, _interrupt)


def exit_status() -> int | None:
    """Return the exit status of a command that a signal interrupted; None where none did."""
    return None if _signal is None else 128 + _signal


def start_time() -> float:
    """Return when the command line began, with what it imports; now in another's process."""
    return time.monotonic() if _began is None else _began


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _signal
    if _signal is None or number == signal.SIGINT:
        _signal = _signal or number
        raise KeyboardInterrupt


def _say_briefly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say in one line that not even imports found memory; show all else as Python does."""
    if issubclass(kind, MemoryError):
        os.write(2, b"moetuner: error: out of memory\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"moetuner: error: interrupted\n")
    os._exit(128 + number)


end_quietly()
