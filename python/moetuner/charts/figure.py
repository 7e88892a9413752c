"""Make plotly's figures of charts: for notebooks, files and documents."""

from __future__ import annotations

import re
from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from moetuner.charts import Chart

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Scheme = Literal["light", "dark"]

EXTRA = "a plot needs plotly: pip install 'moetuner[report]'"


def make_figure(chart: Chart, scheme: Scheme = "light") -> Figure:
    """Return the first variant of a chart as plotly's figure, in the colours of a scheme."""
    if find_spec("plotly") is None:
        raise ImportError(EXTRA)
    import plotly.graph_objects as draw

    colours = read_colours(scheme)
    spec = _replace_colours(next(iter(chart.variants.values())), colours)
    figure = draw.Figure(data=spec["data"], layout=spec["layout"])
    back = colours["--back"]
    figure.update_layout(template="none", paper_bgcolor=back, plot_bgcolor=back)
    return figure


def plot(chart: Chart) -> Figure:
    """Return a chart as plotly's figure with its height, as a notebook shows it."""
    return make_figure(chart).update_layout(height=chart.height)


def read_style() -> str:
    """Read the style sheet with the colours of both schemes."""
    return (resources.files("moetuner") / "charts" / "colours.css").read_text(encoding="utf-8")


def read_colours(scheme: Scheme) -> dict[str, str]:
    """Return the colours of a scheme by their names in the style sheet."""
    blocks = [dict(re.findall(r"(--[a-z]+): (#\w+)", block)) for block in read_style().split("}")]
    light, dark = blocks[:2]
    return light if scheme == "light" else light | dark


def _replace_colours(value: Any, colours: dict[str, str]) -> Any:
    """Return a chart's values with the colours of a scheme for their names."""
    if isinstance(value, str):
        named = re.fullmatch(r"var\((--[a-z]+)\)", value)
        return value if named is None else colours[named[1]]
    if isinstance(value, dict):
        return {key: _replace_colours(entry, colours) for key, entry in value.items()}
    if isinstance(value, list):
        return [_replace_colours(entry, colours) for entry in value]
    return value
