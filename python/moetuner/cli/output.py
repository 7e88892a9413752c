"""Print the results of a subcommand: tables and sentences for people, JSON for scripts."""

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
from moetuner.cli.options import option
from moetuner.cli.options.kinds import OutFile
from moetuner.files import descriptor_of, replacing
from moetuner.files.cells import finite
from moetuner.report.findings import TERMINAL, Finding
from moetuner.report.words import say
from moetuner.serving.recipes import Recipe
from moetuner.solver import Progress

# Width of tables, and of all output to a file or another program, which fit no screen.
UNLIMITED = 1000
STANDARD_OUTPUT = 1
# A space that must not be broken: between an option and its value, or a number and its unit.
JOINED = re.compile(r"(--[a-z][a-z-]*(?= [^ ])|\d(?= (?:%|us\b|ms\b|s\b|[kMGT]?B\b))) ")
# Colours of answers on a terminal; NO_COLOR switches them off.
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
        # Colours may be forced into a pipe, which has no width.
        is_terminal = self._console.is_terminal and sys.stdout.isatty()
        self._width = self._console.width if is_terminal else UNLIMITED
        self._console.width = UNLIMITED

    def say(self, *texts: str) -> None:
        """Print lines, wrapped on a terminal; control characters in them are escaped.

        Lines that begin with a space are commands to copy, or laid out already: they stay whole.
        """
        if not texts or self.is_json:
            return
        for row in "\n".join(texts).split("\n"):
            self._console.print(self._fitted(row), soft_wrap=True)

    def tell(self, *findings: Finding) -> None:
        """Print each finding as a sentence."""
        self.say(*(say(finding, TERMINAL) for finding in findings))

    def next_commands(self, recipes: Iterable[Recipe]) -> None:
        """Print commands to copy, each below its purpose."""
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
        # Lines have no control characters, so one of them can stand for a space that stays.
        joined = JOINED.sub("\\1\x1f", row)
        filled = textwrap.fill(joined, self._width, subsequent_indent=hanging, **rules)
        return filled.replace("\x1f", " ")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print aligned columns: the first to the left, numbers to the right.

        On a narrow terminal there is less space between columns.
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
        """Write the JSON if --json asks for it; docs/json.md has its keys."""
        if self.json_file is None:
            return
        schema = f"moetuner.{click.get_current_context().command.name}/1"
        contents = {"schema": schema, **contents}
        if str(self.json_file) == "-":
            click.echo(_as_text(contents, indent=2))
        else:
            write_json(self.json_file, contents, indent=2)


def write_json(path: Path, contents: dict[str, Any], indent: int | None = None) -> None:
    """Write JSON; the file appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(_as_text(contents, indent) + "\n")


def _as_text(contents: dict[str, Any], indent: int | None) -> str:
    return json.dumps(finite(contents), indent=indent, allow_nan=False)


def is_quiet() -> bool:
    """Return whether the running command was called with --quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("quiet"))


# Seconds after which work is shown as a bar on a terminal.
FIRST_S = 1.0
# Seconds between two lines of a log.
INTERVAL_S = 10.0
# Seconds between two looks at the clock.
BEAT_S = 0.5


class TimeLeft(ProgressColumn):
    """The share of work done and the time left; the time so far if the share is not known."""

    def render(self, task: Task) -> Text:
        """Write the share and the time left."""
        share = task.completed if task.total else None
        return Text(
            write_time_left(task.elapsed or 0.0, share, task.fields["at"], task.fields["what"])
        )


def write_time_left(seconds: float, share: float | None, at: float, what: str) -> str:
    """Write the share of work done and the time left; without a share, the time so far.

    The share was measured ``at`` some seconds from the start, and now ``seconds`` have passed.
    """
    if not share:
        return f"{seconds:.0f} s"
    percentage = f"{100 * share:.0f} %"
    work_done = f"{percentage} {what}" if what else percentage
    return f"{work_done}, about {max(at / share - seconds, 0):.0f} s left"


class Report:
    """Show the progress of work that takes more than a second; a callback for ``solve``."""

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
        # Last progress: text, share, what it is a share of, after how many seconds, and when.
        self._last: tuple[str, float | None, str, float, float] = ("", None, "", 0.0, self._began)

    def begin(self) -> None:
        """Show the bar on a terminal."""
        if self._console.is_interactive and not self._is_quiet:
            self._bar.start()

    def end(self) -> None:
        """Remove the bar; in a log this would write an empty line."""
        if self._console.is_interactive:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show a solve's progress; with a time limit, its share is that of the time limit."""
        limit = self.time_limit
        share = min(progress.seconds / limit, 1.0) if limit else None
        self.show(_line(progress), share, progress.seconds)

    def show(
        self, text: str, share: float | None = None, seconds: float | None = None, what: str = ""
    ) -> None:
        """Show a text, and the share of ``what`` that is done, if it is known."""
        now = time.monotonic()
        seconds = now - self._began if seconds is None else seconds
        if self._console.is_interactive:
            total = None if share is None else 1.0
            fields: Any = {"text": printable(text), "at": seconds, "what": what}
            self._bar.update(self._task, total=total, completed=share or 0.0, **fields)
            if now - self._began >= FIRST_S:
                self.begin()
        else:
            self._last = (text, share, what, seconds, now)
            self._write_log_line(now)

    def beat(self) -> None:
        """Write a line to a log that has had none for a while."""
        if not self._console.is_interactive:
            self._write_log_line(time.monotonic())

    def _write_log_line(self, now: float) -> None:
        """Write the last progress and the time left now, if a line is due."""
        last = self._began if streams.last_line_time is None else streams.last_line_time
        if self._is_quiet or now - last < INTERVAL_S:
            return
        text, share, what, at, shown_at = self._last
        time_left = write_time_left(at + now - shown_at, share, at, what)
        parts = (f"{self.label}: {time_left}", text)
        streams.last_line_time = now
        self._console.print(f"moetuner: {', '.join(filter(None, parts))}", soft_wrap=True)


@contextmanager
def working(label: str, *, time_limit: float | None = None) -> Iterator[Report]:
    """Show a label, and progress, while the work in the block takes long."""
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
    """Return a callback that shows a step, and the share of weights of the steps before it."""
    before = iter(accumulate(weights, initial=0.0))
    last = sum(weights[:-1])
    return lambda text: report.show(text, min(next(before, last), last) / sum(weights))


def show_shares(report: Report, what: str, then: str) -> Callable[[float], None]:
    """Return a callback that shows the share of work done; when all is, the label ``then``."""

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
