"""structure(): finds what was put into a trace, and nothing where there is nothing."""

import base64

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.report.page.structure import draw_structure
from moetuner.report.structure import _make_independent, structure


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch):
    """Search for the least crossing as shortly as still finds what was put in."""
    monkeypatch.setattr("moetuner.report.structure.ITERATIONS", 3000)


def routed(tokens, follow, seed=0):
    """Top-1 routing [T,4,16] where a layer follows its neighbour with a probability."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 16, (tokens, 4, 1))
    stay = rng.random((tokens, 4)) < follow
    for layer in range(1, 4):
        ids[stay[:, layer], layer] = (5 * ids[stay[:, layer], layer - 1] + 3) % 16
    sequence = np.arange(tokens) // 20
    return trace_of(ids, 16, sequence=sequence)


def test_independent_layers_have_no_structure():
    """Without dependence the search is no better than its null."""
    result = structure(routed(20_000, 0.0), devices=4)
    assert result.crossing == pytest.approx(result.crossing_independent, abs=0.01)
    assert max(result.information) < 0.05


def test_a_permutation_is_found():
    """Where each expert has one successor nothing needs to cross, and the null is far away.

    The share that is done rises from counting to the halves.
    """
    shares = []
    result = structure(routed(20_000, 1.0), devices=4, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] < 0.2
    assert sum(share > 0.5 for share in shares) > 1
    assert shares[-1] < 1
    assert result.crossing == 0
    assert result.crossing_independent == pytest.approx(0.75, abs=0.02)
    assert result.crossing_contiguous > 0.4
    assert min(result.information) == pytest.approx(4.0, abs=0.05)
    assert result.held_out


def test_skew_and_unused_experts():
    """One busy expert of four has four times the mean, and three are unused."""
    result = structure(mt.RoutingStatistics.from_load([[8, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]]))
    assert result.skew == (4.0, 1.0, 1.0)
    assert result.unused == (3, 0, 4)
    assert result.crossing is None
    assert result.information is None


@pytest.mark.usefixtures("brief")
def test_groups_differ_from_their_mix(make_trace):
    """Two groups on different experts are half away from it; those of a trace as of its loads."""
    table = mt.RoutingStatistics.from_load(
        np.array([[[4, 0], [3, 3]], [[0, 4], [3, 3]]]),
        group=np.array([0, 1]),
        group_names=("a", "b"),
    )
    result = structure(table)
    assert result.group_share == {"a": 0.5, "b": 0.5}
    assert result.group_distance == {"a": 0.25, "b": 0.25}
    trace = make_trace()
    of_trace, of_loads = (
        structure(of) for of in (trace, mt.RoutingStatistics.from_trace(trace, by_group=True))
    )
    assert of_trace.group_distance == pytest.approx(of_loads.group_distance)
    assert of_trace.group_share == pytest.approx(of_loads.group_share)


@pytest.mark.parametrize("tokens", [0, 40, 1000])
def test_null_of_few_pairs_is_no_structure(tokens):
    """With fewer pairs than cells no cell of the null is empty, or each is."""
    ids = np.random.default_rng(0).integers(0, 64, (tokens, 2, 1))
    stats = mt.RoutingStatistics.from_trace(trace_of(ids, 64))
    load = stats.total_load.astype(float)
    product = np.outer(load[0], load[1])
    result = _make_independent(stats).transitions[0]
    assert result / max(result.sum(), 1) == pytest.approx(product / max(product.sum(), 1), abs=1e-6)


def test_null_of_few_pairs_is_chance():
    """Of 64 experts, a thousand tokens: three of four steps cross, and all bits are by chance."""
    ids = np.random.default_rng(0).integers(0, 64, (1000, 3, 1))
    sequence = np.arange(1000) // 20
    result = structure(trace_of(ids, 64, sequence=sequence))
    assert result.crossing_independent == pytest.approx(0.75, abs=0.005)
    assert min(result.information_chance) > 1
    assert max(result.information) < 0.1


def claims(traffic):
    """Whether there is said to be structure."""
    gain = structure(traffic).gain
    return gain is not None and gain[0] > 0


def test_independent_layers_seldom_seem_to_have_structure():
    """Of twenty small traces without structure at most three are said to have some."""
    assert sum(claims(routed(300, 0.0, seed)) for seed in range(20)) <= 3


def test_dependent_layers_are_seen():
    """Half of all steps follow: a small trace is enough to say so, with an interval around it."""
    result = structure(routed(1000, 0.5))
    low, high = result.gain
    assert 0.1 < low < result.crossing_independent - result.crossing < high


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_tiny_traces(make_trace, tokens):
    """Nothing, or next to nothing, is no error."""
    result = structure(make_trace(tokens))
    assert result.held_out == (tokens > 1)


def test_saved_statistics_tell_nothing_of_structure(make_trace):
    """Counts cannot be split by sequence, so nothing is searched."""
    result = structure(mt.RoutingStatistics.from_trace(make_trace(), window=16))
    assert not result.held_out
    assert result.crossing is result.crossing_independent is result.gain is None
    assert result.crossing_contiguous is not None


def drawn(packed):
    """Give the numbers of an axis of a chart."""
    return np.frombuffer(base64.b64decode(packed["bdata"]), dtype=f"<{packed['dtype']}")


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("kind", ["trace", "loads"])
def test_charts_show_what_was_measured(make_trace, kind):
    """Curves go through the shares of picks that are told; counts have no order for a cache."""
    traffic = make_trace()
    if kind == "loads":
        traffic = mt.RoutingStatistics.from_load([[[9, 1, 1, 1], [1, 2, 3, 4]]] * 3)
    result = structure(traffic)
    hot, skew = draw_structure(result)
    ((spec,), (points,)) = hot.variants.values(), (each["data"] for each in skew.variants.values())
    shares = [result.hot_experts.static, result.hot_experts.sizes]
    shares += [] if kind == "loads" else [result.hot_experts.cache]
    assert len(spec["data"]) == len(shares)
    for line, values in zip(spec["data"], shares, strict=True):
        assert drawn(line["x"]) == pytest.approx([0, 25, 50, 75, 100])
        assert drawn(line["y"]) == pytest.approx([0, *(100 * share for share in values), 100])
    assert drawn(points[0]["y"]) == pytest.approx(result.skew)
