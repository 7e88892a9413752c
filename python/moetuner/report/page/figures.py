"""write_figures(): charts as files, for papers and slides."""

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
    """Raise ImportError unless figures can be drawn, naming the extra or the browser."""
    if find_spec("kaleido") is None:
        raise ImportError(EXTRA)
    from choreographer.browsers.chromium import Chromium

    if not os.environ.get("BROWSER_PATH") and Chromium.find_browser(skip_local=False) is None:
        raise ImportError(BROWSER)


def write_figures(
    folder: Path, charts: Sequence[Chart], formats: tuple[Format, ...] = ("svg", "png")
) -> int:
    """Write every chart as it first stands on the page, in light colours; return how many files.

    They are named after their charts. Heat maps of an SVG are images in it.
    """
    check_figures()
    import plotly.graph_objects as draw
    import plotly.io

    folder.mkdir(parents=True, exist_ok=True)
    colours = dict(re.findall(r"(--[a-z]+): (#\w+)", read_asset("page.css").split("}", 1)[0]))
    back = {"paper_bgcolor": colours["--back"], "plot_bgcolor": colours["--back"]}
    figures, files, heights = [], [], []
    for chart in charts:
        spec = _coloured(next(iter(chart.variants.values())), colours)
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


def _coloured(value: Any, colours: dict[str, str]) -> Any:
    """Replace names of the style sheet's colours by what they are in its light scheme."""
    if isinstance(value, str):
        named = re.fullmatch(r"var\((--[a-z]+)\)", value)
        return value if named is None else colours[named[1]]
    if isinstance(value, dict):
        return {key: _coloured(each, colours) for key, each in value.items()}
    if isinstance(value, list):
        return [_coloured(each, colours) for each in value]
    return value
