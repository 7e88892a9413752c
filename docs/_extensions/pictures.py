"""Draw the pictures of the documents from the bundled trace: ``make pictures``.

Each picture is written in light and in dark colours, and what it shows as JSON beside it. A test
computes all of them again and compares, so none is older than the package.
"""

import base64
import json
from pathlib import Path

import numpy as np
import plotly.graph_objects
import plotly.io

import moetuner as mt
from moetuner.charts.figure import read_colours
from moetuner.cost import cost_model_of

FOLDER = Path(__file__).parents[1] / "pictures"
SIZES = {"placements": (1000, 560), "devices": (1000, 380), "losses": (1000, 520)}
SIZES["cards"] = (1000, 230)
# README shows it, on phones too.
SIZES["wait"] = (640, 360)
# Tokens of a step that reads prompts, and the layer that is shown of it.
STEP, LAYER = 8192, 1


def compute_pictures():
    """Return plotly's figures by name: what the documents show."""
    trace = mt.RoutingTrace.load(Path(mt.__file__).parent / "data" / "small-moe.safetensors")
    seen, unseen = mt.hold_out(trace)
    machine = mt.Topology(devices=8)
    problem = mt.Problem(seen, machine, slots_per_device=3, objective="balance")
    result = mt.solve(problem)
    surviving = mt.solve(
        mt.Problem(seen, machine, slots_per_device=4, objective="balance", survive="device")
    )
    before, after = (
        mt.evaluate(answer.placement, unseen, machine) for answer in (result, surviving)
    )
    cards = mt.Problem(seen, mt.Topology(devices=2), objective="traffic", max_imbalance=1.4)
    blocks, together = (
        mt.evaluate(mt.solve(cards, method).placement, unseen) for method in ("contiguous", "joint")
    )
    return {
        "placements": result.plot(problem),
        "devices": result.plot(problem, layer=1),
        "losses": after.plot_losses(before=before),
        "cards": together.plot_visits(before=blocks),
        "wait": draw_wait(seen, unseen, machine),
    }


def draw_wait(seen, unseen, machine):
    """Return how long each GPU works in a layer of a step, before and after, as bars.

    The step is the first one of the unseen texts. All GPUs wait for the busiest one.
    """
    colours = read_colours("light")
    model = cost_model_of(unseen)
    placed = mt.solve(mt.Problem(seen, machine)).placement
    blocks = mt.solve(mt.Problem(seen, machine), "contiguous").placement
    experts = np.concatenate([*unseen.shards()])
    load = np.bincount(experts[:STEP, LAYER].ravel(), minlength=unseen.num_experts)
    figure = plotly.graph_objects.Figure()
    gap = 2
    for number, (name, placement) in enumerate({"before": blocks, "after": placed}.items()):
        us = model.compute_us(load[placement.slots[LAYER]].sum(axis=1))
        x = np.arange(len(us)) + number * (len(us) + gap)
        busiest = us == us.max()
        fill = np.where(busiest, colours["--running"], colours["--proposed"])
        figure.add_bar(x=x, y=us, marker_color=fill.tolist(), showlegend=False)
        figure.add_shape(
            type="line",
            x0=x[0] - 0.5,
            x1=x[-1] + 0.5,
            y0=us.max(),
            y1=us.max(),
            line={"color": colours["--text"], "width": 2},
        )
        figure.add_annotation(
            x=x.mean(),
            y=us.max(),
            yshift=16,
            text=f"{name}: all wait {us.max():.0f} us",
            showarrow=False,
            font={"size": 22, "color": colours["--text"]},
        )
    ticks = np.arange(len(us))
    back = colours["--back"]
    figure.update_layout(
        template="none",
        paper_bgcolor=back,
        plot_bgcolor=back,
        bargap=0.15,
        margin={"l": 60, "r": 10, "t": 40, "b": 60},
        font={"size": 20, "color": colours["--text"]},
        xaxis={
            "tickvals": np.concatenate([ticks, ticks + len(us) + gap]).tolist(),
            "ticktext": [str(tick) for tick in ticks] * 2,
            "title": {"text": "GPU"},
            "showgrid": False,
        },
        yaxis={"title": {"text": "us of a layer"}, "rangemode": "tozero", "showgrid": False},
    )
    return figure


def describe(figure):
    """Return what a figure shows, with numbers as lists in place of bytes."""
    return unpack(json.loads(figure.to_json()))


def unpack(value):
    """Return JSON with lists of four digits in place of packed arrays."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), np.dtype(value["dtype"]))
        return [float(f"{number:.4g}") for number in array.tolist()]
    if isinstance(value, dict):
        return {key: unpack(entry) for key, entry in value.items()}
    return [unpack(entry) for entry in value] if isinstance(value, list) else value


def recolour(figure, scheme):
    """Return a figure, which has light colours, in those of a scheme."""
    light, dark = (read_colours(name) for name in ("light", "dark"))
    text = figure.to_json()
    for name, colour in light.items() if scheme == "dark" else ():
        text = text.replace(f'"{colour}"', f'"{dark[name]}"')
    return plotly.io.from_json(text)


def write_pictures():
    """Write all pictures, and what they show."""
    FOLDER.mkdir(exist_ok=True)
    for name, figure in compute_pictures().items():
        width, height = SIZES[name]
        text = json.dumps(describe(figure), indent=None, sort_keys=True, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        for scheme in ("light", "dark"):
            path = FOLDER / f"{name}-{scheme}.svg"
            shown = recolour(figure, scheme)
            plotly.io.write_image(shown, path, width=width, height=height)
            print("wrote", path.relative_to(FOLDER.parents[1]))  # noqa: T201


if __name__ == "__main__":
    write_pictures()
