"""Handle Ctrl-C, SIGTERM and lack of memory on the command line, from the first import on.

A library leaves signals to its user. But imports take a third of a second before a command's code
runs, and an interrupt in that time would print a traceback. So in a process of the command line,
and only there, signals end the process quietly until ``raising_interrupts`` takes over.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

# Signal that interrupted the running command.
_signal: int | None = None
# Time at which this process, if it is the command line, began to import it.
_began: float | None = None


def end_quietly() -> None:
    """Let signals end the process while the command line is being imported; else do nothing."""
    global _began
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    # The command, or "python -m moetuner".
    if not f"/{started}".endswith(("/moetuner", "/moetuner/__main__.py")):
        return
    _began = time.monotonic()
    sys.excepthook = _say_briefly
    with suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            # A signal that is ignored, as under nohup, stays ignored.
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, _exit_at_once)


@contextmanager
def raising_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for the first SIGINT or SIGTERM.

    A second SIGTERM, as a process group may get, is ignored: it would interrupt the writing of the
    best placement so far. A second Ctrl-C raises again, for users who do not want to wait.
    """
    global _signal
    _signal = None
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    # A signal that is ignored, or that another handler takes, stays so.
    ours = (_exit_at_once, signal.SIG_DFL, signal.default_int_handler)
    replaced = [number for number in numbers if before[number] in ours]
    with suppress(ValueError):  # not the main thread
        for number in replaced:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        with suppress(ValueError):
            for number in replaced:
                handler = before[number]
                signal.signal(number, signal.SIG_DFL if handler is _exit_at_once else handler)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let signals end the process while a command is being imported.

    Python drops a KeyboardInterrupt in some parts of an import, and a module that is half imported
    cannot be imported again.
    """
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is _interrupt]
    if _began is None:  # the process belongs to another program, and must not end
        numbers = []
    for number in numbers:
        signal.signal(number, _exit_at_once)
    yield
    for number in numbers:
        signal.signal(number, _interrupt)


def exit_status() -> int | None:
    """Return the exit status of a command that a signal interrupted; None without one."""
    return None if _signal is None else 128 + _signal


def start_time() -> float:
    """Return the time at which the command line began; the time now in another process."""
    return time.monotonic() if _began is None else _began


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _signal
    if _signal is None or number == signal.SIGINT:
        _signal = _signal or number
        raise KeyboardInterrupt


def _say_briefly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Write one line if imports found no memory; show other errors as Python does."""
    if issubclass(kind, MemoryError):
        os.write(2, b"moetuner: error: out of memory\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"moetuner: error: interrupted\n")
    os._exit(128 + number)


end_quietly()
