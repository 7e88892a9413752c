"""Options for a page of results and its charts, which are written at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from moetuner.charts import Chart
from moetuner.cli.options import option
from moetuner.cli.options.kinds import OutFile
from moetuner.cli.options.traffic import Source
from moetuner.cli.output import Output, working
from moetuner.report.page import check_libraries, write_page
from moetuner.report.page.data import Origin, PageData
from moetuner.report.page.figures import check_figures, write_figures
from moetuner.report.page.panels import make_panels


def needs_report(
    context: click.Context, parameter: click.Parameter, value: Path | None
) -> Path | None:
    """Raise before any work if libraries for a page, or its charts, are missing."""
    try:
        if value is not None:
            check_libraries()
            if parameter.name == "figures":
                check_figures()
    except ImportError as error:
        raise click.UsageError(f"{error}.") from None
    return value


figures_option = partial(
    option, click.Path(file_okay=False, writable=True, path_type=Path), "DIR", callback=needs_report
)


@dataclass(frozen=True)
class Pages:
    """The page to write and the folder of its charts, if options name them.

    Parameters
    ----------
    report_file
        Write a page of results that opens offline.
    figures
        Write the charts of the page as SVG and PNG; needs Chrome or Chromium.
    """

    report_file: Path | None = option(OutFile(".html"), "FILE.html", callback=needs_report)
    figures: Path | None = figures_option()

    @property
    def wanted(self) -> bool:
        """True if options ask for a page or its charts."""
        return self.report_file is not None or self.figures is not None

    def write(self, output: Output, make: Callable[[], PageData]) -> None:
        """Write page and charts; make no data if neither is wanted."""
        if not self.wanted:
            return
        with working("making the report"):
            data = make()
            if self.report_file is not None:
                write_page(self.report_file, data)
        if self.report_file is not None:
            output.say(f"wrote {self.report_file}")
        if self.figures is not None:
            charts = [chart for panel in make_panels(data) for chart in panel.charts]
            draw_into(self.figures, charts, output)


def draw_into(folder: Path, charts: Sequence[Chart], output: Output) -> None:
    """Write charts into a folder, and print their number."""
    with working("drawing figures"):
        number = write_figures(folder, charts)
    output.say(f"wrote {number} figures into {folder}/")


def make_origin(source: Source) -> Origin:
    """Return the origin of a page's numbers: INPUT and the typed command."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if words[0] in ("__main__.py", "-c"):
        words[0] = "moetuner"
    line, *notes = source.lines
    command = shlex.join(words)
    return Origin(line, source.input_files, command, tuple(notes))
