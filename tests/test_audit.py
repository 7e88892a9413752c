"""audit(): whom a placement serves worse, and whether that may be chance."""

from pathlib import Path

import numpy as np
import pytest
from conftest import random_ids

import moetuner as mt
from moetuner._bootstrap import interval, resampled
from moetuner._windows import crossings, owners

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
MODEL = mt.CostModel.preset("h100", hidden=1024, intermediate=512)


def contiguous(trace, devices=4):
    """Experts in blocks on all layers."""
    device_of = np.arange(trace.num_experts) * devices // trace.num_experts
    return mt.Placement.from_assignment(np.tile(device_of, (trace.layers, 1)), devices)


def two_kinds(seed=0, layers=3, experts=8):
    """Make a trace of two groups that like different experts, 40 sequences of 50 tokens each."""
    kinds = [random_ids(2000, layers, 2, experts, seed=seed + kind) for kind in (0, 1)]
    sequence = np.arange(4000) // 50
    return mt.RoutingTrace.from_arrays(
        np.concatenate(kinds),
        num_experts=experts,
        sequence=sequence,
        group=sequence // 40,
        group_names=["first", "second"],
    )


def test_figures_are_those_of_evaluate():
    """Every measure of every group is what evaluate says, for both placements."""
    trace, topology = two_kinds(), mt.Topology(4, 2)
    placement = mt.Placement.from_assignment(np.tile(np.arange(8) % 4, (3, 1)), 4)
    found = mt.audit(
        placement, trace, topology, window=100, cost_model=MODEL, baseline=contiguous(trace)
    )
    both = [
        mt.evaluate(each, trace, topology, window=100, cost_model=MODEL)
        for each in (placement, contiguous(trace))
    ]
    names = ("imbalance", "crossing", "fanout", "node_fanout", "predicted_layer_us")
    assert set(found.whole) == set(names)
    for name in names:
        for group in (None, "first", "second"):
            change = (found.whole if group is None else found.groups[group])[name]
            mine, theirs = (
                getattr(each if group is None else each.by_group[group], name) for each in both
            )
            assert change.value.value == pytest.approx(mine)
            assert change.baseline.value == pytest.approx(theirs)
            assert change.change.value == pytest.approx(mine / theirs - 1)


def test_crossings_are_those_of_the_replay_also_with_copies():
    """A token's pairs take the copies that the replay takes."""
    trace = two_kinds()
    slots = np.array([[[0, 1, 2], [3, 4, 0], [5, 6, 1], [7, 0, -1]]] * 3)
    placement = mt.Placement(slots, num_experts=8)
    assert crossings(placement, trace).mean() == pytest.approx(
        mt.evaluate(placement, trace).crossing
    )


def test_a_placement_is_no_worse_than_itself():
    """Both see the same resamples: no change, and an interval of nothing."""
    trace = two_kinds()
    found = mt.audit(contiguous(trace), trace, window=100)
    assert found.worse() == []
    assert found.behind() == []
    assert found.whole["imbalance"].change == (0, 0, 0)
    assert found.units == ("block", 40)


def test_other_text_is_served_worse_than_what_was_solved_for():
    """A placement for one group names the other, and not the one."""
    trace = two_kinds()
    first = mt.RoutingStatistics.from_trace(trace.select(groups="first"), window=100)
    placement = mt.solve(mt.Problem(first, mt.Topology(4)), "lpt").placement
    second = mt.RoutingStatistics.from_trace(trace.select(groups="second"), window=100)
    baseline = mt.solve(mt.Problem(second, mt.Topology(4)), "lpt").placement
    found = mt.audit(placement, trace, baseline=baseline, window=100)
    worse = found.worse(measures=("imbalance",))
    assert [each.group for each in worse] == ["second"]
    assert [each.group for each in found.behind(measures=("imbalance",))] == ["second"]
    assert found.worse(worse[0].change.value, measures=("imbalance",)) == []


@pytest.mark.parametrize("domain", ["python", "english", "japanese"])
def test_solved_on_one_domain_names_the_others(domain):
    """On the bundled trace every other domain falls behind, and some get worse than in blocks."""
    trace = mt.RoutingTrace.load(BUNDLED)
    one = mt.RoutingStatistics.from_trace(trace.select(groups=domain), window=512)
    placement = mt.solve(mt.Problem(one, mt.Topology(4), max_imbalance=1.05), "lpt").placement
    found = mt.audit(placement, trace, resamples=300)
    behind = {each.group for each in found.behind(measures=("imbalance",))}
    assert behind == set(trace.group_names) - {domain}
    worse = {each.group for each in found.worse(measures=("imbalance",))}
    assert worse
    assert domain not in worse


def test_solved_on_one_domain_of_a_real_model_names_the_others(data):
    """Placed for mathematics, the domains furthest from it get worse than in blocks."""
    trace = mt.RoutingTrace.load(data / "gpt-oss-20b.npz")
    one = mt.RoutingStatistics.from_trace(trace.select(groups="math"), window=512)
    placement = mt.solve(mt.Problem(one, mt.Topology(8), max_imbalance=1.05), "lpt").placement
    found = mt.audit(placement, trace, resamples=300)
    worse = {each.group for each in found.worse(measures=("imbalance",))}
    assert {"law", "humanities", "social"} <= worse
    assert "math" not in worse
    behind = {each.group for each in found.behind(measures=("imbalance",))}
    assert behind == set(trace.group_names) - {"math"}


def test_load_tables_resample_windows():
    """Windows of a group are the units; what needs tokens is left out."""
    load = np.random.default_rng(0).integers(1, 100, (20, 2, 8))
    table = mt.RoutingStatistics.from_load(load, group=np.arange(20) % 2, group_names=("a", "b"))
    placement = mt.Placement.from_assignment(np.tile(np.arange(8) % 4, (2, 1)), 4)
    found = mt.audit(placement, table, cost_model=MODEL)
    assert found.units == ("window", 20)
    assert list(found.groups["b"]) == ["imbalance", "predicted_layer_us"]
    change = found.groups["b"]["imbalance"].change
    assert change.low < change.value < change.high


def test_one_window_has_no_interval():
    """Then the change counts as it is."""
    load = np.array([[[9, 9, 1, 1]], [[9, 1, 9, 1]]])
    table = mt.RoutingStatistics.from_load(load, group=[0, 1], group_names=("a", "b"))
    placement = mt.Placement.from_assignment([[0, 1, 0, 1]], 2)
    found = mt.audit(placement, table)
    assert found.groups["a"]["imbalance"].change == (pytest.approx(-4 / 9), None, None)
    assert [(each.group, each.change.value) for each in found.worse()] == [
        ("b", pytest.approx(0.8))
    ]


def test_threads_do_not_matter():
    """One thread and two give the same audit."""
    trace = two_kinds()
    placement = mt.Placement.from_assignment(np.tile(np.arange(8) % 4, (3, 1)), 4)
    one, two = (mt.audit(placement, trace, window=64, threads=n).to_dict() for n in (1, 2))
    assert one == two


def test_windows_belong_to_the_sequence_with_most_of_their_tokens():
    """A long sequence owns its windows; of short ones the largest does."""
    sequence = np.repeat([5, 5, 7, 8, 9], [4, 5, 1, 3, 2])
    assert owners(sequence, 4).tolist() == [0, 0, 2, 3]


def test_intervals_cover_the_truth():
    """Of a hundred means of 40 blocks of two alike windows, about 95 intervals hold the mean."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        values = np.repeat(rng.exponential(1.0, 60), 2)
        columns = np.stack([values, np.ones(120)], axis=1)
        drawn = resampled(columns, np.arange(120) // 2, 400, rng)
        found = interval(values.mean(), drawn[:, 0] / drawn[:, 1])
        covered += found.low <= 1 <= found.high
    assert 0.89 <= covered / 200 <= 0.98


def test_other_models_are_refused():
    """A baseline of another model, or no window, is one line."""
    trace = two_kinds()
    other = contiguous(two_kinds(experts=9), devices=4)
    empty = mt.RoutingTrace.from_arrays(np.empty((0, 3, 2), dtype=np.uint8), num_experts=8)
    with pytest.raises(ValueError, match="placement must have 3 layers, 8 experts and 4 devices"):
        mt.audit(contiguous(trace), trace, baseline=other)
    with pytest.raises(ValueError, match="window must be from 1"):
        mt.audit(contiguous(trace), trace, window=0)
    with pytest.raises(ValueError, match="traffic must have tokens to audit, got a trace of 0"):
        mt.audit(contiguous(trace), empty)
    with pytest.raises(ValueError, match="resamples must be from 1"):
        mt.audit(contiguous(trace), trace, resamples=0)


def test_groups_without_tokens_are_left_out(make_trace):
    """A name that no token has is no group to audit."""
    trace = make_trace()
    found = mt.audit(contiguous(trace), trace, window=20)
    assert list(found.groups) == ["even", "odd"]
