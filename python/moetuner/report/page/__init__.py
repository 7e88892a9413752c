"""Write results on one page that opens offline, for people who decide.

The page loads nothing: its content security policy forbids every request. Data and plotly's script
are embedded, compressed, and unpacked by the browser.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetuner._checks import path_in
from moetuner._core import __version__
from moetuner.charts.figure import read_style
from moetuner.evaluation import Evaluation
from moetuner.files import replacing
from moetuner.files.cells import finite
from moetuner.report.advice.values import Advice
from moetuner.report.page.data import PageData
from moetuner.report.page.making import make_results_data
from moetuner.report.page.panels import make_panels
from moetuner.report.page.words import as_command, unbroken

if TYPE_CHECKING:
    from jinja2 import Template

EXTRA = "a report needs plotly and jinja2: pip install 'moetuner[report]'"


def check_libraries() -> None:
    """Raise ImportError, which names the extra, unless the libraries of a page are installed."""
    for library in ("plotly", "jinja2"):
        if find_spec(library) is None:
            raise ImportError(EXTRA)


def write_page(path: Path, data: PageData) -> None:
    """Write a page atomically; it has the same bytes for the same results."""
    page = render(data)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_report(
    path: str | Path,
    results: Advice | tuple[Evaluation, Evaluation],
    *,
    names: tuple[str, str] = ("before", "after"),
) -> None:
    """Write results on one page that opens offline, as ``moetuner evaluate --report`` does.

    Parameters
    ----------
    path
        HTML file, which is written atomically.
    results
        An advice, or evaluations of two placements on the same traffic.
    names
        Names of the two placements; an advice has its own.

    Raises
    ------
    ImportError
        If plotly or jinja2 is not installed: ``pip install 'moetuner[report]'``.
    ValueError
        If the evaluations are not of the same traffic, or were pickled.

    Examples
    --------
    >>> import moetuner as mt
    >>> import numpy as np
    >>> from pathlib import Path
    >>> traffic = mt.RoutingStatistics.from_load(np.tile([[8000, 4000, 2000, 2000]], (10, 1, 1)))
    >>> placements = mt.Placement([[[0, 1], [2, 3]]]), mt.Placement([[[0, 2], [1, 3]]])
    >>> before, after = (mt.evaluate(placement, traffic) for placement in placements)
    >>> mt.write_report("page.html", (before, after), names=("blocks", "better"))
    >>> "better has 16.5 % less predicted MoE layer time" in Path("page.html").read_text()
    True
    """
    write_page(path_in(path), make_results_data(results, names))


def render(data: PageData) -> str:
    """Return the page as HTML."""
    check_libraries()
    from markupsafe import Markup

    panels, script, plotly = make_panels(data), read_asset("page.js"), _read_plotly()
    charts = {
        chart.key: {
            "variants": [{"name": name, **spec} for name, spec in chart.variants.items()],
            "selects": chart.selects,
            "height": chart.height,
            "stacked": chart.stacked,
        }
        for panel in panels
        for chart in panel.charts
    }
    contents = {"moetuner": __version__, **_leave_out_matrices(data.contents)}
    return _compile_template().render(
        page=data,
        panels=panels,
        version=__version__,
        style=Markup(read_style() + read_asset("page.css")),
        script=Markup(script),
        hashes=[_hash(script), plotly[0]],
        plotly=plotly[1],
        charts=_compress(_write_json(charts)),
        contents=_compress(_write_json(contents, indent=1)),
        has_charts=bool(charts),
    )


@cache
def _compile_template() -> Template:
    """Return the page's template, compiled."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"unbroken": unbroken, "as_command": as_command}
    return environment.from_string(read_asset("page.html"))


@cache
def _read_plotly() -> tuple[str, str]:
    """Return the hash of plotly's script, and the script compressed."""
    file = resources.files("plotly") / "package_data" / "plotly.min.js"
    script = file.read_text(encoding="utf-8")
    return _hash(script), _compress(script.encode())


def _hash(script: str) -> str:
    """Return the hash by which a content security policy allows a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _compress(content: bytes) -> str:
    """Compress bytes, as text for the page."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _leave_out_matrices(contents: Any) -> Any:
    """Return contents without matrices of groups, which would be most of the page."""
    if not isinstance(contents, dict):
        return contents
    rest = {key: _leave_out_matrices(value) for key, value in contents.items()}
    by_group = rest.get("by_group")
    # An evaluation has a map of evaluations there, an advice a list of gains.
    if isinstance(by_group, dict):
        for evaluation in by_group.values():
            evaluation.pop("traffic", None)
    return rest


def _write_json(value: Any, indent: int | None = None) -> bytes:
    """Write JSON, with null for numbers that JSON does not have."""
    compact = None if indent else (",", ":")
    return json.dumps(finite(value), allow_nan=False, indent=indent, separators=compact).encode()


def read_asset(name: str) -> str:
    """Read a template, a script or a style sheet of the page."""
    return (resources.files("moetuner") / "report" / "page" / name).read_text(encoding="utf-8")
