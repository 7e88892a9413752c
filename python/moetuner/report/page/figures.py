"""Write charts as files, for papers and slides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from moetuner.report.page import read_asset
from moetuner.report.page.charts import Chart

Format = Literal["svg", "png"]

EXTRA = "figures need kaleido: pip install 'moetuner[figures]'"
BROWSER = (
    "figures are drawn by Chrome or Chromium, and none is installed: plotly_get_chrome fetches "
    "one, or BROWSER_PATH names yours"
)
WIDTH, SCALE = 1080, 2


def check_figures() -> None:
    """Raise ImportError, which names the extra or the browser, unless figures can be drawn."""
    if find_spec("kaleido") is None:
        raise ImportError(EXTRA)
    from choreographer.browsers.chromium import Chromium

    if not os.environ.get("BROWSER_PATH") and Chromium.find_browser(skip_local=False) is None:
        raise ImportError(BROWSER)


def write_figures(
    folder: Path, charts: Sequence[Chart], formats: tuple[Format, ...] = ("svg", "png")
) -> int:
    """Write the first variant of every chart, in light colours; return the number of files.

    Files are named after their charts. Heat maps of an SVG are images in it.
    """
    check_figures()
    import plotly.graph_objects as draw
    import plotly.io

    folder.mkdir(parents=True, exist_ok=True)
    colours = dict(re.findall(r"(--[a-z]+): (#\w+)", read_asset("page.css").split("}", 1)[0]))
    back = {"paper_bgcolor": colours["--back"], "plot_bgcolor": colours["--back"]}
    figures, files, heights = [], [], []
    for chart in charts:
        spec = _replace_colours(next(iter(chart.variants.values())), colours)
        figure = draw.Figure(data=spec["data"], layout={**spec["layout"], **back})
        figure.update_layout(template="none")
        for kind in formats:
            figures.append(figure)
            files.append(folder / f"{chart.key}.{kind}")
            heights.append(chart.height)
    scale = [1 if file.suffix == ".svg" else SCALE for file in files]
    width = [WIDTH] * len(files)
    plotly.io.write_images(figures, files, width=width, height=heights, scale=scale)
    return len(files)


def _replace_colours(value: Any, colours: dict[str, str]) -> Any:
    """Return a chart's values with colours of the light scheme for names of the style sheet."""
    if isinstance(value, str):
        named = re.fullmatch(r"var\((--[a-z]+)\)", value)
        return value if named is None else colours[named[1]]
    if isinstance(value, dict):
        return {key: _replace_colours(entry, colours) for key, entry in value.items()}
    if isinstance(value, list):
        return [_replace_colours(entry, colours) for entry in value]
    return value
