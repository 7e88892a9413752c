"""What a subcommand says: tables and sentences for people, or JSON for scripts."""

from __future__ import annotations

import json
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from moetuner._texts import line, name, printable
from moetuner.cli import streams
from moetuner.cli.options import OutFile, option
from moetuner.files import descriptor_of, replacing
from moetuner.files.cells import finite
from moetuner.report.findings import TERMINAL, Finding
from moetuner.report.words import say
from moetuner.serving.recipes import Recipe
from moetuner.solver import Progress

# Tables, and all that goes to a file or another program, are not fitted to any screen.
UNLIMITED = 1000
STANDARD_OUTPUT = 1
# What stays on the line of what follows it.
JOINED = re.compile(r"(--[a-z][a-z-]*(?= [^ ])|\d(?= (?:%|us\b|ms\b|s\b|[kMGT]?B\b))) ")
# Colours of answers on a terminal; NO_COLOR takes them away.
COLOURS = {"worth a trial": "green", "not now": "bright_black", "not enough evidence": "yellow"}
COLOURS |= {"not left": "green", "served": "yellow", "worse": "red"}


@dataclass
class Output:
    """Standard output of a subcommand, and the file that ``finish`` writes.

    Parameters
    ----------
    json_file
        Write all results as JSON; "-" writes them to standard output, and nothing else.
    quiet
        Write no progress and no remarks to standard error, only errors.
    """

    json_file: Path | None = option(OutFile(standard_output=True), "FILE")
    quiet: bool = option(is_flag=True, default=False, short="-q")

    def __post_init__(self) -> None:
        json_file = self.json_file
        # Other text between the braces would make it no JSON.
        self.is_json = json_file is not None and (
            str(json_file) == "-" or descriptor_of(json_file) == STANDARD_OUTPUT
        )
        self._console = Console(highlight=False, markup=False, emoji=False)
        # Where colours are forced into a pipe, the width is still nobody's.
        is_terminal = self._console.is_terminal and sys.stdout.isatty()
        self._width = self._console.width if is_terminal else UNLIMITED
        self._console.width = UNLIMITED

    def say(self, *texts: str) -> None:
        """Print lines, wrapped on a terminal; control characters in them are escaped.

        Lines that begin with a space are commands to copy or laid out already, and stay whole.
        """
        for row in "\n".join(texts).split("\n") if texts and not self.is_json else ():
            self._console.print(self._fitted(row), soft_wrap=True)

    def tell(self, *findings: Finding) -> None:
        """Print findings, a sentence each."""
        self.say(*(say(finding, TERMINAL) for finding in findings))

    def next_commands(self, recipes: Iterable[Recipe]) -> None:
        """Print commands to copy, each below what it is for, which heads the first."""
        for number, recipe in enumerate(recipes):
            if not number:
                self.say(f"Next: {recipe.why}".rstrip())
            elif recipe.why:
                self.say(f"  # {recipe.why}")
            self.say(f"  {recipe.command}")

    def verdict(self, headline: Finding, text: str = "") -> None:
        """Print a headline, or a text that begins with its answer, in the answer's colour."""
        if not self.is_json:
            answer = headline.forces or ""
            shown = Text(self._fitted(text or say(headline, TERMINAL)))
            shown.stylize(COLOURS.get(answer, ""), 0, len(answer) if text else len(shown))
            self._console.print(shown, soft_wrap=True)

    def _fitted(self, row: str) -> str:
        row = line(row)
        if self._width == UNLIMITED or not row or row[0] == " ":
            return row
        hanging = "  " if row.startswith(("- ", "! ")) else ""
        rules: Any = {"break_long_words": False, "break_on_hyphens": False}
        # Lines have no control characters: one joins an option to its value, a number to its unit.
        joined = JOINED.sub("\\1\x1f", row)
        filled = textwrap.fill(joined, self._width, subsequent_indent=hanging, **rules)
        return filled.replace("\x1f", " ")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print aligned columns: the first to the left, numbers to the right.

        They are closer on a terminal that is too narrow otherwise.
        """
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i, title in enumerate(head):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(name, row))
        if self._console.measure(table).maximum > self._width:
            table.padding = (0, 1, 0, 0)
        if not self.is_json:
            self._console.print(table, soft_wrap=True)

    def finish(self, contents: dict[str, Any]) -> None:
        """Write the JSON, if it is wanted; docs/json.md has its keys."""
        if self.json_file is None:
            return
        schema = {"schema": f"moetuner.{click.get_current_context().command.name}/1"}
        text = json.dumps(finite(schema | contents), indent=2, allow_nan=False)
        if str(self.json_file) == "-":
            click.echo(text)
        else:
            with replacing(self.json_file) as temporary:
                temporary.write_text(text + "\n")


def is_quiet() -> bool:
    """Return whether the running command has been told to write no progress and no remarks."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("quiet"))


# What takes longer is shown: on a terminal as a bar, in a log as a line, of whichever work, once
# the last line is so old.
FIRST_S, INTERVAL_S = 1.0, 10.0
BEAT_S = 0.5


class TimeLeft(ProgressColumn):
    """The share that is done and the time left; the time so far where no end is known."""

    def render(self, task: Task) -> Text:
        """Write both."""
        share = task.completed if task.total else None
        return Text(
            write_time_left(task.elapsed or 0.0, share, task.fields["at"], task.fields["what"])
        )


def write_time_left(seconds: float, share: float | None, at: float, what: str) -> str:
    """Write the share of work that was done ``at`` some seconds, and the time left at that pace.

    Without a share, write the time so far.
    """
    if not share:
        return f"{seconds:.0f} s"
    return (
        f"{100 * share:.0f} %{what and f' {what}'}, about {max(at / share - seconds, 0):.0f} s left"
    )


class Report:
    """Shows how far work is, once it has taken a second; a callback for ``solve``."""

    def __init__(self, label: str, time_limit: float | None) -> None:
        self.label, self.time_limit = printable(label), time_limit
        self._console = Console(stderr=True, highlight=False, markup=False)
        label_column, text_column = (
            TextColumn(f"{{task.{name}}}", markup=False, table_column=Column(no_wrap=True))
            for name in ("description", "fields[text]")
        )
        columns = (label_column, BarColumn(20), TimeLeft(Column(no_wrap=True)), text_column)
        quiet: Any = {"redirect_stdout": False, "redirect_stderr": False, "transient": True}
        self._bar = Bar(*columns, console=self._console, **quiet)
        self._task = self._bar.add_task(self.label, total=None, text="", at=0.0, what="")
        self._began = time.monotonic()
        self._is_quiet = is_quiet()
        # Text, share, what of, after so many seconds, and when that was told.
        self._told: tuple[str, float | None, str, float, float] = ("", None, "", 0.0, self._began)

    def begin(self) -> None:
        """Show that work goes on."""
        if self._console.is_interactive and not self._is_quiet:
            self._bar.start()

    def end(self) -> None:
        """Take the bar away; a log would get an empty line."""
        if self._console.is_interactive:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show a line of a solve; with a time limit the share of it that is gone."""
        limit = self.time_limit
        share = min(progress.seconds / limit, 1.0) if limit else None
        self.show(_line(progress), share, progress.seconds)

    def show(
        self, text: str, share: float | None = None, seconds: float | None = None, what: str = ""
    ) -> None:
        """Show what is being done, and the share ``of`` something that is done, if it is known."""
        now = time.monotonic()
        seconds = now - self._began if seconds is None else seconds
        if self._console.is_interactive:
            total = None if share is None else 1.0
            fields: Any = {"text": printable(text), "at": seconds, "what": what}
            self._bar.update(self._task, total=total, completed=share or 0.0, **fields)
            if now - self._began >= FIRST_S:
                self.begin()
        else:
            self._told = (text, share, what, seconds, now)
            self._tell(now)

    def beat(self) -> None:
        """Say in a log that work goes on, where it has said nothing for a while."""
        if not self._console.is_interactive:
            self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        """Write what was told last, and the time that is left now, if it is time for a line."""
        last = self._began if streams.last_line_time is None else streams.last_line_time
        if self._is_quiet or now - last < INTERVAL_S:
            return
        text, share, what, at, told = self._told
        parts = (f"{self.label}: {write_time_left(at + now - told, share, at, what)}", text)
        streams.last_line_time = now
        self._console.print(f"moetuner: {', '.join(filter(None, parts))}", soft_wrap=True)


@contextmanager
def working(label: str, *, time_limit: float | None = None) -> Iterator[Report]:
    """Show what is being done while it takes long."""
    report, is_over = Report(label, time_limit), threading.Event()

    def watch() -> None:
        if not is_over.wait(FIRST_S):
            report.begin()
            report.beat()
        while not is_over.wait(BEAT_S):
            report.beat()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield report
    finally:
        is_over.set()
        watcher.join()
        report.end()


def show_steps(report: Report, weights: Sequence[float]) -> Callable[[str], None]:
    """Return a callback that shows each step, and what share of all these weights is before it."""
    before = iter(accumulate(weights, initial=0.0))
    last = sum(weights[:-1])
    return lambda text: report.show(text, min(next(before, last), last) / sum(weights))


def show_shares(report: Report, what: str, then: str) -> Callable[[float], None]:
    """Return a callback that shows the share of work that is done, and ``then`` what is left."""

    def show(share: float) -> None:
        if share < 1:
            report.show("", share, what=what)
        else:
            report.show(then)

    return show


def _line(progress: Progress) -> str:
    gap = None if progress.gap is None else 100 * progress.gap
    values = {
        "best {:.6g} (seen)": progress.objective,
        "bound {:.6g}": progress.bound,
        "gap {:.1f} %": gap,
    }
    texts = [text.format(value) for text, value in values.items() if value is not None]
    return ", ".join([progress.phase, *texts])
