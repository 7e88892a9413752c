"""Progress on standard error: a live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from moetuner.files.text import printable
from moetuner.solver.result import Progress

# Where nobody watches: the first line after a second, the next ones rarely.
FIRST_S = 1.0
INTERVAL_S = 10.0


@contextmanager
def working(label: str) -> Iterator[Callable[[Progress], None]]:
    """Say what is being done while it takes long; gives what ``solve`` reports its progress to."""
    label = printable(label)
    console = Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        with console.status(label) as status:
            yield lambda progress: status.update(f"{label}: {_line(progress)}")
        return

    def say(text: str) -> None:
        console.print(f"moetuner: {text}", soft_wrap=True)

    timer = threading.Timer(FIRST_S, say, [f"{label} ..."])
    timer.daemon = True
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= INTERVAL_S:
            last = time.monotonic()
            say(f"{label}: {_line(progress)}")

    timer.start()
    try:
        yield report
    finally:
        timer.cancel()


def _line(progress: Progress) -> str:
    parts = [f"{progress.seconds:.1f} s", progress.phase]
    if progress.objective is not None:
        parts.append(f"objective {progress.objective:.4f}")
    if progress.bound is not None:
        parts.append(f"bound {progress.bound:.4f}")
    return ", ".join(parts)
