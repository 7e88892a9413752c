"""What a subcommand says: tables and sentences for people, or JSON for scripts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetuner.cli.options import OutFile, option
from moetuner.files import descriptor_of, replacing
from moetuner.files.text import line, name, printable
from moetuner.report.cells import finite
from moetuner.solver import Progress

# Output that goes to a file or another program is not fitted to any screen.
UNLIMITED = 1000
STANDARD_OUTPUT = 1


@dataclass
class Output:
    """Standard output of a subcommand, and the file that ``finish`` writes.

    Parameters
    ----------
    json_file
        Write all results as JSON; "-" writes them to standard output, and nothing else.
    """

    json_file: Path | None = option(OutFile(standard_output=True), "FILE")

    def __post_init__(self) -> None:
        json_file = self.json_file
        # Other text between the braces would make it no JSON.
        self._quiet = json_file is not None and (
            str(json_file) == "-" or descriptor_of(json_file) == STANDARD_OUTPUT
        )
        self._console = Console(highlight=False, markup=False, emoji=False)
        if not self._console.is_terminal:
            self._console.width = UNLIMITED

    def say(self, *texts: str) -> None:
        """Print lines; control characters in them are escaped."""
        for row in "\n".join(texts).split("\n") if texts and not self._quiet else ():
            self._console.print(line(row), soft_wrap=True)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print aligned columns: the first to the left, numbers to the right."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i, title in enumerate(head):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(name, row))
        if not self._quiet:
            self._console.print(table)

    def finish(self, contents: dict[str, Any]) -> None:
        """Write the JSON, if it is wanted."""
        if self.json_file is None:
            return
        text = json.dumps(finite(contents), indent=2, allow_nan=False)
        if str(self.json_file) == "-":
            click.echo(text)
        else:
            with replacing(self.json_file) as temporary:
                temporary.write_text(text + "\n")


# A log gets the first line after a second, the next ones rarely.
FIRST_S = 1.0
INTERVAL_S = 10.0


@contextmanager
def working(label: str) -> Iterator[Callable[[Progress], None]]:
    """Show what is being done while it takes long; yield a progress callback for ``solve``."""
    label = printable(label)
    console = Console(stderr=True, highlight=False, markup=False)

    def text(progress: Progress) -> str:
        return f"{label}: {progress.seconds:.0f} s, {_line(progress)}"

    if console.is_terminal:
        with console.status(Text(label)) as status:
            yield lambda progress: status.update(Text(text(progress)))
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
            say(text(progress))

    timer.start()
    try:
        yield report
    finally:
        timer.cancel()


def timed(report: Callable[[Progress], None], text: Callable[[Any], str]) -> Callable[[Any], None]:
    """Return a callback that shows what ``text`` says of its value, and the time so far."""
    began = time.monotonic()
    return lambda value: report(Progress(time.monotonic() - began, text(value)))


def shares(report: Callable[[Progress], None], of: str) -> Callable[[float], None]:
    """Return a callback that shows the share of work that is done."""
    return timed(report, lambda share: f"{100 * share:.0f} % {of}")


def _line(progress: Progress) -> str:
    gap = None if progress.gap is None else 100 * progress.gap
    values = {
        "best {:.6g}": progress.objective,
        "bound {:.6g}": progress.bound,
        "gap {:.1f} %": gap,
    }
    texts = [text.format(value) for text, value in values.items() if value is not None]
    return ", ".join([progress.phase, *texts])
