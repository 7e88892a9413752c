"""Write charts as files, for papers and slides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from moetuner.charts import Chart
from moetuner.charts.figure import make_figure

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
    import plotly.io

    folder.mkdir(parents=True, exist_ok=True)
    figures, files, heights = [], [], []
    for chart in charts:
        figure = make_figure(chart)
        for kind in formats:
            figures.append(figure)
            files.append(folder / f"{chart.key}.{kind}")
            heights.append(chart.height)
    scale = [1 if file.suffix == ".svg" else SCALE for file in files]
    width = [WIDTH] * len(files)
    plotly.io.write_images(figures, files, width=width, height=heights, scale=scale)
    return len(files)
