"""Write charts as files, for papers and slides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from moetuner.charts import Chart
from moetuner.charts.figure import make_figure

Format = Literal["svg", "png"]

EXTRA = "figures need kaleido: pip install 'moetuner[figures]'"
BROWSER = (
    "figures are drawn by Chrome or Chromium, and none is installed: plotly_get_chrome fetches "
    "one, or BROWSER_PATH names yours"
)
WIDTH, SCALE = 1080, 2
# How often the browser is asked for a figure.
ATTEMPTS = 2


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

    Files are named after their charts. Heat maps of an SVG are images in it. Raise OSError if the
    browser did not draw one of them.
    """
    check_figures()
    import kaleido

    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[dict[str, Any]] = []
    for chart in charts:
        figure = make_figure(chart)
        for kind in formats:
            scale = 1 if kind == "svg" else SCALE
            size = {"width": WIDTH, "height": chart.height, "scale": scale}
            path = folder / f"{chart.key}.{kind}"
            drawn.append({"fig": figure, "path": path, "opts": {"format": kind, **size}})
    missing = drawn
    # Kaleido returns what went wrong with a figure, and removes its file: on a machine that is busy
    # the browser misses one now and then.
    for _ in range(ATTEMPTS):
        # No chart has formulas, and kaleido would load MathJax from the network.
        kaleido.write_fig_from_object_sync(missing, kopts={"mathjax": False})
        missing = [each for each in missing if not each["path"].exists()]
        if not missing:
            return len(drawn)
    names = ", ".join(str(each["path"]) for each in missing)
    raise OSError(f"Chrome did not draw {names}; run the command again")
