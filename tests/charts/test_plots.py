"""Pictures of placements show the numbers that were computed, and refuse what they cannot show."""

import base64
import sys
from itertools import pairwise

import numpy as np
import pytest
from make import random_ids

import moetuner as mt
from moetuner.charts.placements import share_load

pytest.importorskip("plotly")

LOAD = np.array([[8, 4, 2, 2], [1, 1, 1, 5]])
BLOCKS = mt.Placement([[[0, 1], [2, 3]]] * 2)
COPIED = mt.Placement([[[0, 1, -1], [0, 2, 3]], [[3, 0, 1], [3, 2, -1]]])
TRACE = mt.RoutingTrace.from_arrays(random_ids(64, 2, 2, 4), num_experts=4)


def numbers(packed):
    """Return the array of what charts hand to plotly."""
    if not isinstance(packed, dict):
        return np.asarray(packed)
    array = np.frombuffer(base64.b64decode(packed["bdata"]), np.dtype(packed["dtype"]))
    shape = packed.get("shape")
    return array.reshape([int(size) for size in shape.split(",")]) if shape else array


def test_copies_share_the_load_of_their_expert():
    """A slot has the load of its expert by its copies, over the mean; empty slots have none."""
    served, copies = share_load(COPIED.slots, LOAD, COPIED.replicas)
    for place, expert in np.ndenumerate(COPIED.slots):
        layer = place[0]
        number = int((COPIED.slots[layer] == expert).sum())
        wanted = -1 if expert < 0 else LOAD[layer, expert] / LOAD[layer].mean() / number
        assert served[place] == pytest.approx(wanted)
        assert expert < 0 or copies[place] == number


def test_a_placement_is_drawn_with_its_experts_loads_and_copies():
    """The heat map has every expert's load in its cell, and a dot on each with copies."""
    figure = COPIED.plot(LOAD)
    heat, dots = figure.data
    served, _ = share_load(COPIED.slots, LOAD, COPIED.replicas)
    cells = numbers(heat.customdata)[..., 0]
    assert sorted(cells[0].tolist()) == sorted(COPIED.slots[0].ravel().tolist())
    for layer, cell in np.ndindex(cells.shape):
        if cells[layer, cell] >= 0:
            device = cell // 3
            slot = COPIED.slots[layer, device].tolist().index(cells[layer, cell])
            assert 2 ** numbers(heat.z)[layer, cell] == pytest.approx(served[layer, device, slot])
    dotted = {
        (int(y), int(cells[int(y), int(x)]))
        for x, y in zip(numbers(dots.x), numbers(dots.y), strict=True)
    }
    assert dotted == {(0, 0), (1, 3)}
    assert figure.layout.height > 100


def test_two_placements_are_drawn_below_each_other():
    """Both have a heat map on one scale of colours, a title and boxes around slow devices."""
    figure = COPIED.plot(LOAD, before=BLOCKS)
    above, *_, below, _ = figure.data
    assert (above.yaxis, below.yaxis) == ("y", "y2")
    assert (above.zmin, above.zmax) == (below.zmin, below.zmax)
    assert [text.text for text in figure.layout.annotations] == ["<b>before</b>", "<b>after</b>"]
    assert figure.layout.yaxis.domain[0] > figure.layout.yaxis2.domain[1]


def test_bars_of_a_layer_add_up_to_the_load_of_devices():
    """The experts on a device, one on top of the other, are its load over the mean."""
    figure = COPIED.plot(LOAD, before=BLOCKS, layer=1)
    for name, placement in (("before", BLOCKS), ("after", COPIED)):
        served, _ = share_load(placement.slots, LOAD, placement.replicas)
        wanted = np.maximum(served[1], 0).sum(axis=1)
        bars = [bar for bar in figure.data if bar.offsetgroup == name]
        assert np.sum([numbers(bar.y) for bar in bars], axis=0) == pytest.approx(
            wanted / wanted.mean()
        )
        for lower, upper in pairwise(bars):
            assert numbers(upper.base) == pytest.approx(numbers(lower.base) + numbers(lower.y))


def test_a_result_and_an_advice_draw_their_placement():
    """A result is drawn beside blocks of experts, an advice beside what runs."""
    problem = mt.Problem(TRACE, mt.Topology(2))
    result = mt.solve(problem, iterations=10)
    boxed = result.plot(problem, layer=0)
    assert boxed == result.placement.plot(
        problem.load, before=mt.solve(problem, "contiguous").placement, layer=0
    )
    assert len(result.plot(problem).data) == 2
    with pytest.raises(TypeError, match="problem must be a Problem"):
        result.plot(TRACE)


def test_losses_are_those_of_the_evaluation():
    """Bars have the experts lost and the imbalance after each loss, whose means are its own."""
    evaluation = mt.evaluate(COPIED, TRACE)
    lost, busiest = evaluation.plot_losses().data
    losses = evaluation.losses["device"]
    assert np.mean(numbers(lost.y)) == pytest.approx(losses.experts_lost)
    assert np.mean(numbers(busiest.y)) == pytest.approx(losses.imbalance_after)
    both = evaluation.plot_losses(before=mt.evaluate(BLOCKS, TRACE)).data
    assert [bar.name for bar in both] == ["before", "after"] * 2
    assert numbers(both[0].y).tolist() == [2, 2]


def test_visits_are_those_of_the_evaluation():
    """Of 100 tokens, those whose experts are on one device are counted; others visit both."""
    evaluation = mt.evaluate(BLOCKS, TRACE)
    together = (TRACE.expert_ids // 2).max(axis=2) == (TRACE.expert_ids // 2).min(axis=2)
    assert evaluation.on_one_device == pytest.approx(100 * together.mean())
    one, both = evaluation.plot_visits(before=evaluation).data
    assert numbers(one.x) + numbers(both.x) == pytest.approx([100, 100])
    assert numbers(one.x)[0] == pytest.approx(evaluation.on_one_device)
    four = mt.evaluate(mt.Placement([[[0], [1], [2], [3]]] * 2), TRACE)
    assert four.on_one_device is None
    with pytest.raises(ValueError, match="two devices"):
        four.plot_visits()


WRONG = (
    ({"load": [[1, 2]]}, r"load must be \[2, 4\]"),
    ({"load": "many"}, "load must be"),
    ({"layer": 2}, "layer must be"),
    ({"layer": -1}, "layer must be"),
    ({"before": LOAD}, "before must be a Placement"),
    ({"before": mt.Placement([[[0, 1], [2, 3]]])}, "before must have 2 layers, 2 devices"),
)


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_is_named(arguments, message):
    """Loads of other sizes, layers that are not there, and placements of others are refused."""
    with pytest.raises((TypeError, ValueError), match=message):
        COPIED.plot(**arguments)


def test_a_plot_without_plotly_names_the_extra(monkeypatch):
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r"a plot needs plotly: pip install 'moetuner\[report\]'"):
        COPIED.plot()


def test_placements_and_gains_are_tables():
    """A notebook shows experts by layer and device, and a gain with its interval."""
    table = COPIED._repr_html_()
    assert "<th>device 1</th>" in table
    assert "<td>0, 1, -</td>" in table
    evaluations = [mt.evaluate(placement, TRACE) for placement in (BLOCKS, COPIED)]
    gain = mt.verdict(*evaluations)
    assert f"<td>{gain.answer}</td>" in gain._repr_html_()
    assert f"<td>{100 * gain.gain:.1f} %</td>" in gain._repr_html_()
