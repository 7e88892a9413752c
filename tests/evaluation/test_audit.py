"""audit(): whom a placement serves worse, and whether that may be chance."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import random_ids

import moetuner as mt
from moetuner.evaluation import intervals
from moetuner.evaluation.auditing import _judged, blocks
from moetuner.evaluation.by_unit import crossings, of_traffic
from moetuner.evaluation.intervals import Change, Spread, Sums, holm, paired
from moetuner.evaluation.replay import Setting
from moetuner.evaluation.units import Units

MODEL = mt.CostModel.preset("h100", hidden=1024, intermediate=512)
IN_BLOCKS = blocks(3, 8, 4)


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


TURNS = mt.Placement.from_assignment(np.tile(np.arange(8) % 4, (3, 1)), 4)
COPIES = mt.Placement([[[0, 1, 2], [3, 4, 0], [5, 6, 1], [7, 0, 5]]] * 3, num_experts=8)


@pytest.mark.parametrize(
    ("placement", "split"), [(TURNS, "even"), (COPIES, "even"), (COPIES, "nearest")]
)
@pytest.mark.parametrize("arrival", ["bursts", "mixed", 0.3])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("devices_per_node", [2, 4])
def test_figures_are_those_of_evaluate(placement, split, arrival, labelled, devices_per_node):
    """Every measure of all traffic and of groups, under both placements; so are crossings."""
    trace, topology = two_kinds(), mt.Topology(4, devices_per_node=devices_per_node)
    trace = trace if labelled else replace(trace, sequence=None)
    how = {"window": 100, "split": split, "cost_model": MODEL, "arrival": arrival}
    found = mt.audit(placement, trace, topology, baseline=IN_BLOCKS, resamples=5, **how)
    both = [mt.evaluate(each, trace, topology, **how) for each in (placement, IN_BLOCKS)]
    nodes = {"node_fanout"} if topology.nodes > 1 else set()
    assert set(found.whole) == {"imbalance", "crossing", "fanout", "predicted_layer_us", *nodes}
    # Which copy serves a token of a group depends on its place in all traffic.
    alone = () if placement.has_copies and arrival != "mixed" else ("first", "second")
    for name in found.whole:
        for group in (None, *alone):
            change = (found.whole if group is None else found.groups[group])[name]
            mine, theirs = (
                getattr(each if group is None else each.by_group[group], name) for each in both
            )
            if arrival == "bursts" or name in ("imbalance", "predicted_layer_us"):
                assert change.value.value == pytest.approx(mine)
                assert change.baseline.value == pytest.approx(theirs)
                assert change.change.value == pytest.approx(mine / theirs - 1)
    assert crossings(Setting(placement, topology, 512, split), trace).mean() == pytest.approx(
        mt.evaluate(placement, trace, topology, split=split).crossing
    )


def test_a_placement_is_no_worse_than_itself():
    """Both see the same resamples: no change, and an interval of nothing."""
    trace = two_kinds()
    found = mt.audit(IN_BLOCKS, trace, window=100)
    assert found.worse() == []
    assert found.behind() == []
    change = found.whole["imbalance"].change
    assert (change.value, change.low, change.high) == (0, 0, 0)
    assert found.units == ("sequence", 80)
    assert found.to_dict()["units"] == {"kind": "sequence", "number": 80}


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


@pytest.mark.parametrize("windows", [1, 2, 4, 5])
def test_fewer_than_five_windows_are_too_few(windows):
    """Nobody is named, however much worse every window is, and the audit says so; of five some."""
    load = np.array([[[9, 9, 1, 1]]] * windows + [[[9, 1, 9, 1]]] * windows)
    group = np.arange(2 * windows) // windows
    table = mt.RoutingStatistics.from_load(load, group=group, group_names=("a", "b"))
    found = mt.audit(mt.Placement.from_assignment([[0, 1, 0, 1]], 2), table)
    assert found.groups["a"]["imbalance"].change.value == pytest.approx(-4 / 9)
    assert found.groups["b"]["imbalance"].change.value == pytest.approx(0.8)
    assert (found.groups["b"]["imbalance"].change.low is None) == (windows == 1)
    named = ["b"] if windows == 5 else []
    assert found.too_few == ({} if named else {"a": windows, "b": windows})
    assert [each.group for each in found.worse()] == named
    assert [each.group for each in found.behind()] == named


def test_threads_do_not_matter():
    """One thread and two give the same audit."""
    trace = two_kinds()
    one, two = (mt.audit(TURNS, trace, window=64, threads=n).to_dict() for n in (1, 2))
    assert one == two


def units(trace, *, window=40, model=None, devices=4):
    """Figures of experts in blocks, and what each sequence adds to them."""
    placement = blocks(trace.layers, trace.num_experts, devices)
    setting = Setting(placement, mt.Topology(devices, 2), window, cost_model=model)
    units = Units("sequence", len(np.unique(trace.sequence)))
    return of_traffic(trace, setting, units)


@pytest.mark.parametrize("together", [False, True])
def test_units_are_whole_sequences_and_add_up_to_the_figure(together):
    """However sequences lie in windows, each is one unit, and all parts are shared out."""
    trace = two_kinds()
    sequence = trace.sequence.copy()
    if together:
        np.random.default_rng(0).shuffle(sequence)
    trace = mt.RoutingTrace.from_arrays(trace.expert_ids, num_experts=8, sequence=sequence)
    for name, sums in units(trace, model=MODEL)[None].items():
        assert len(sums.by_unit()[0]) == len(np.unique(sequence))
        # First order: where two devices are equally slow, one more of either counts.
        assert sums.above.sum() / sums.below.sum() == pytest.approx(sums.value, rel=0.02), name


def test_a_sequence_gets_its_part_of_the_slowest_devices_load():
    """Of a window of 8 tokens, the slowest device has 6: one sequence brings 4 of them, one 2."""
    ids = np.array([0, 0, 0, 0, 1, 1, 0, 0])[:, None, None]
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=2, sequence=[0] * 5 + [1] * 3)
    found = units(trace, window=8, devices=2)[None]["imbalance"]
    assert found.value == 1.5
    assert found.above.tolist() == pytest.approx([1.5 * 4 / 6, 1.5 * 2 / 6])
    assert found.below.tolist() == [5 / 8, 3 / 8]


def test_a_sequence_of_many_windows_is_drawn_as_a_whole():
    """Forty windows of two sequences have the interval of two units, not of forty."""
    ids = np.repeat(random_ids(2, 1, 1, 8, seed=3), 400, axis=0)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=8, sequence=np.arange(800) // 400)
    found = mt.audit(blocks(1, 8, 4), trace, window=20)
    assert found.units == ("sequence", 2)
    assert found.too_few == {"all": 2}


def test_students_quantiles_are_those_of_the_tables():
    """Two sides of 95 % of 1, 4 and 30 degrees of freedom, and the tail is the inverse."""
    for freedom, wanted in ((1, 12.7062), (4, 2.7764), (30, 2.0423), (1e7, 1.95996)):
        found = intervals.quantile(0.025, freedom)
        assert found == pytest.approx(wanted, abs=1e-4)
        assert intervals.tail(found, freedom) == pytest.approx(0.025)
        assert intervals.tail(-found, freedom) == pytest.approx(0.975)


def test_holm_adjusts_the_smallest_by_all_and_keeps_the_order():
    """The textbook's example of four."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def judged_of(values):
    """Judge groups whose changes are known, with their errors, and return these, too."""
    rng = np.random.default_rng(0)
    spread = {
        name: Spread(value, rng.normal(0, error, 500), 9, 10)
        for name, (value, error) in values.items()
    }
    found = _judged({name: {"x": Change(each, each, each)} for name, each in spread.items()})
    return {name: of["x"] for name, of in found.items()}, spread


def test_the_best_group_was_picked_and_that_counts():
    """How far groups are behind the best is as likely as the best of all others being so far."""
    values = {"a": (-0.2, 0.1), "b": (0.1, 0.1), "c": (0.1, 0.1), "d": (0.0, 0.1)}
    found, spread = judged_of(values)
    chances = [each.chance for each in spread.values()]
    chances += [min(3 * (spread[name] - spread["a"]).chance, 1) for name in "bcd"]
    wanted = holm(chances)
    assert [found[name].chance for name in "abcd"] == wanted[:4]
    assert [found[name].behind_chance for name in "bcd"] == wanted[4:]
    assert (found["a"].behind, found["a"].behind_chance) == (None, 1.0)


def test_the_best_group_is_the_one_that_gains_most_surely():
    """Not one of few units, whose gain is larger and may be chance."""
    found, _ = judged_of({"few": (-0.4, 0.3), "many": (-0.2, 0.01), "none": (0.0, 0.01)})
    assert found["many"].behind is None
    assert found["none"].behind.value == pytest.approx(0.2)
    assert found["few"].behind.value == pytest.approx(-0.2)
    assert found["none"].behind_chance < 0.05 < found["few"].behind_chance


@pytest.mark.parametrize(("number", "most"), [(3, 0.09), (5, 0.09), (10, 0.09), (50, 0.08)])
def test_intervals_of_few_units_hold_the_truth(number, most):
    """Of means of so many normal variates, about 95 of 100 intervals hold the mean."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(300):
        drawn = rng.normal(10, 1, (2, number))
        ones = np.ones(number)
        one, two = ({"x": Sums(row.mean(), row, ones)} for row in drawn)
        found = paired(one, two, resamples=400, rng=rng)["x"].change
        missed += not found.low <= 0 <= found.high
    assert missed / 300 <= most


def test_the_difference_of_independent_figures_is_as_uncertain_as_both():
    """Variances add, and degrees of freedom are Welch's."""
    rng = np.random.default_rng(0)
    one = Spread(2.0, rng.normal(0, 3, 4000), 9.0, 10)
    two = Spread(1.0, rng.normal(0, 4, 4000), 4.0, 5)
    found = one - two
    assert (found.value, found.units) == (1.0, 5)
    assert found.deviations.std() == pytest.approx(5, rel=0.05)
    assert found.freedom == pytest.approx(25**2 / (9**2 / 9 + 16**2 / 4), rel=0.1)


def test_other_models_are_refused():
    """A baseline of another model, or no window, is one line."""
    trace = two_kinds()
    other = blocks(3, 9, 4)
    empty = mt.RoutingTrace.from_arrays(np.empty((0, 3, 2), dtype=np.uint8), num_experts=8)
    with pytest.raises(ValueError, match="placement must have 3 layers, 8 experts and 4 devices"):
        mt.audit(IN_BLOCKS, trace, baseline=other)
    with pytest.raises(ValueError, match="window must be from 1"):
        mt.audit(IN_BLOCKS, trace, window=0)
    with pytest.raises(ValueError, match="traffic must have tokens to audit, got a trace of 0"):
        mt.audit(IN_BLOCKS, empty)
    with pytest.raises(ValueError, match="resamples must be from 1"):
        mt.audit(IN_BLOCKS, trace, resamples=0)


def test_groups_without_tokens_are_left_out(make_trace):
    """A name that no token has is no group to audit."""
    trace = make_trace()
    found = mt.audit(IN_BLOCKS, trace, window=20)
    assert list(found.groups) == ["even", "odd"]
