"""audit(): whom a placement serves worse, and whether that may be chance."""

from dataclasses import replace

import numpy as np
import pytest
from make import in_turns, random_ids, trace_of

import moetuner as mt
from moetuner.evaluation import intervals
from moetuner.evaluation.comparison import Comparison
from moetuner.evaluation.intervals import Spread, adjust_by_holm
from moetuner.evaluation.judgement import _judge_groups
from moetuner.placement import blocks

MODEL = mt.CostModel.preset("h100", hidden=1024, intermediate=512)
IN_BLOCKS = blocks(3, 8, 4)


def two_kinds():
    """Make a trace of two groups that like different experts, 40 sequences of 50 tokens each."""
    ids = np.concatenate([random_ids(2000, 3, 2, 8, seed=kind) for kind in (0, 1)])
    sequence = np.arange(4000) // 50
    names = {"group": sequence // 40, "group_names": ["first", "second"]}
    return trace_of(ids, sequence=sequence, **names)


TURNS = in_turns(3, 8, 4)
COPIES = mt.Placement([[[0, 1, 2], [3, 4, 0], [5, 6, 1], [7, 0, 5]]] * 3, num_experts=8)


@pytest.mark.parametrize(
    ("placement", "split"), [(TURNS, "even"), (COPIES, "even"), (COPIES, "nearest")]
)
@pytest.mark.parametrize("arrival", ["bursts", "mixed", 0.3])
@pytest.mark.parametrize(("labelled", "devices_per_node"), [(True, 2), (False, 4)])
def test_figures_are_those_of_evaluate(placement, split, arrival, labelled, devices_per_node):
    """Every measure of all traffic and of groups, under both placements; so are crossings."""
    trace, topology = two_kinds(), mt.Topology(4, devices_per_node=devices_per_node)
    trace = trace if labelled else replace(trace, sequence=None)
    how = {"window": 100, "split": split, "cost_model": MODEL, "arrival": arrival}
    audited = mt.audit(placement, trace, topology, baseline=IN_BLOCKS, **how)
    both = [mt.evaluate(of, trace, topology, **how) for of in (placement, IN_BLOCKS)]
    nodes = {"node_fanout"} if topology.nodes > 1 else set()
    assert set(audited.whole) == {"imbalance", "crossing", "fanout", "predicted_layer_us", *nodes}
    for name in audited.whole:
        if arrival != "bursts" and name not in ("imbalance", "predicted_layer_us"):
            continue
        for group in (None, "first", "second"):
            change = (audited.whole if group is None else audited.groups[group])[name]
            mine, theirs = (getattr(of.by_group.get(group, of), name) for of in both)
            assert (change.after, change.before) == pytest.approx((mine, theirs))
            assert change.change.value == pytest.approx(mine / theirs - 1)


def test_a_placement_is_no_worse_than_itself():
    """Both have the same halves: no change, and an interval of nothing."""
    trace = two_kinds()
    audited = mt.audit(IN_BLOCKS, trace, window=100)
    assert audited.worse() == []
    assert audited.behind() == []
    change = audited.whole["imbalance"].change
    assert (change.value, change.low, change.high) == (0, 0, 0)
    assert audited.to_dict()["units"] == {"kind": "sequence", "number": 80, "block_length": 1}


def test_other_text_is_served_worse_than_what_was_solved_for():
    """A placement for one group names the other, and not the one."""
    trace = two_kinds()
    first = mt.RoutingStatistics.from_trace(trace.select(groups="first"), window=100)
    placement = mt.solve(mt.Problem(first, mt.Topology(4)), "lpt").placement
    second = mt.RoutingStatistics.from_trace(trace.select(groups="second"), window=100)
    baseline = mt.solve(mt.Problem(second, mt.Topology(4)), "lpt").placement
    audited = mt.audit(placement, trace, baseline=baseline, window=100)
    worse = audited.worse(measures=("imbalance",))
    assert [each.group for each in worse] == ["second"]
    assert [each.group for each in audited.behind(measures=("imbalance",))] == ["second"]
    assert audited.worse(worse[0].change.value, measures=("imbalance",)) == []


def test_windows_of_load_tables_are_independent():
    """Windows of a group are the units; what needs tokens is left out."""
    load = np.random.default_rng(1).integers(1, 100, (20, 3, 8))
    table = mt.RoutingStatistics.from_load(load, group=np.arange(20) % 2, group_names=("a", "b"))
    audited = mt.audit(TURNS, table, cost_model=MODEL)
    assert (audited.units.name, audited.gain.units) == ("window", 20)
    assert list(audited.groups["b"]) == ["imbalance", "predicted_layer_us"]
    change = audited.groups["b"]["imbalance"].change
    assert change.low < change.value < change.high


@pytest.mark.parametrize("windows", [1, 2, 4, 5])
def test_fewer_than_five_windows_are_too_few(windows):
    """Nobody is named, however much worse every window is, and the audit says so; of five some."""
    load = np.array([[[9, 9, 1, 1]]] * windows + [[[9, 1, 9, 1]]] * windows)
    group = np.arange(2 * windows) // windows
    table = mt.RoutingStatistics.from_load(load, group=group, group_names=("a", "b"))
    audited = mt.audit(mt.Placement.from_assignment([[0, 1, 0, 1]], 2), table, cost_model=None)
    assert audited.groups["a"]["imbalance"].change.value == pytest.approx(-4 / 9)
    assert audited.groups["b"]["imbalance"].change.value == pytest.approx(0.8)
    assert (audited.groups["b"]["imbalance"].change.low is None) == (windows == 1)
    named = ["b"] if windows == 5 else []
    assert audited.too_few == ({} if named else {"a": windows, "b": windows})
    assert [each.group for each in audited.worse()] == named
    assert [each.group for each in audited.behind()] == named


def test_a_sequence_of_many_windows_is_one_unit():
    """Forty windows of two sequences have the interval of two units, not of forty."""
    ids = np.repeat(random_ids(2, 1, 1, 8, seed=3), 400, axis=0)
    trace = trace_of(ids, length=400)
    audited = mt.audit(blocks(1, 8, 4), trace, window=20)
    assert (audited.units.name, audited.gain.units) == ("sequence", 2)
    assert audited.too_few == {"all": 2}


@pytest.mark.parametrize("freedom", range(1, len(intervals.QUANTILES) + 1))
def test_students_quantiles_are_exceeded_as_often_as_they_say(freedom):
    """By 2.5 % on either side, of every number of degrees of freedom in the table."""
    quantile = float(intervals.QUANTILES[freedom - 1])
    assert intervals.compute_tail(quantile, freedom) == pytest.approx(0.025, rel=1e-4)
    assert intervals.compute_tail(-quantile, freedom) == pytest.approx(0.975, rel=1e-4)


def test_students_tail_is_that_of_the_tables():
    """0.1 % of 1, 4 and 30 degrees of freedom; all of it below and none above what is infinite."""
    for freedom, wanted in ((1, 318.309), (4, 7.1732), (30, 3.3852)):
        assert intervals.compute_tail(wanted, freedom) == pytest.approx(0.001, rel=1e-3)
    assert (intervals.compute_tail(np.inf, 3), intervals.compute_tail(-np.inf, 3)) == (0, 1)


def test_holms_adjustment_is_the_textbooks():
    """Of four probabilities, of none, and of two that are large."""
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (adjust_by_holm([]), adjust_by_holm([0.9, 0.8])) == ([], [1.0, 1.0])


def judged_of(**values):
    """Judge groups whose changes are known, with their errors, and return these, too."""
    spread = {name: Spread(value, error, 9, 10) for name, (value, error) in values.items()}
    compared = {name: Comparison("imbalance", 1.0, 1.0, change) for name, change in spread.items()}
    judged = _judge_groups({name: {"x": each} for name, each in compared.items()})
    return {name: own["x"] for name, own in judged.items()}, spread


def test_the_best_group_was_picked_and_that_counts():
    """How far groups are behind the best is as likely as the best of all others being so far."""
    judged, spread = judged_of(a=(-0.2, 0.1), b=(0.1, 0.1), c=(0.1, 0.1), d=(0.0, 0.1))
    chances = [of.p_value for of in spread.values()]
    chances += [min(3 * (spread[name] - spread["a"]).p_value, 1) for name in "bcd"]
    wanted = adjust_by_holm(chances)
    assert [judged[name].chance for name in "abcd"] == wanted[:4]
    assert [judged[name].behind_chance for name in "bcd"] == wanted[4:]
    assert (judged["a"].behind, judged["a"].behind_chance) == (None, 1.0)


def test_the_best_group_is_the_one_that_gains_most_surely():
    """Not one of few units, whose gain is larger and may be chance."""
    judged, _ = judged_of(few=(-0.4, 0.3), many=(-0.2, 0.01), none=(0.0, 0.01))
    assert judged["many"].behind is None
    assert judged["none"].behind.value == pytest.approx(0.2)
    assert judged["few"].behind.value == pytest.approx(-0.2)
    assert judged["none"].behind_chance < 0.05 < judged["few"].behind_chance


def test_the_difference_of_independent_figures_is_as_uncertain_as_both():
    """Variances add, and degrees of freedom are Welch's, rounded down."""
    actual = Spread(2.0, 3.0, 9, 10) - Spread(1.0, 4.0, 4, 5)
    assert (actual.value, actual.units) == (1.0, 5)
    assert actual.error == pytest.approx(5)
    assert actual.freedom == int(25**2 / (9**2 / 9 + 16**2 / 4))


def test_what_grows_from_nothing_is_worse(tmp_path, run):
    """A figure that is 0 before changes by a difference, with an interval; any gate sees it."""
    expert = np.random.default_rng(0).integers(0, 8, 2000)
    group = np.arange(2000) // 50 % 2
    trace = trace_of(np.stack([expert, expert], axis=1)[:, :, None], length=50, group=group,
                     group_names=["first", "second"])  # fmt: skip
    staying = mt.Placement.from_assignment([np.arange(8) // 2] * 2, 4)
    moved = mt.Placement.from_assignment([np.arange(8) // 2, [1, 0, 0, 1, 2, 2, 3, 3]], 4)
    audited = mt.audit(moved, trace, baseline=staying, measures=["crossing"])
    whole = audited.whole["crossing"]
    crosses = np.isin(expert, [0, 2])
    assert (whole.before, whole.after) == (0, pytest.approx(crosses.mean()))
    assert whole.change.value == pytest.approx(whole.after)
    assert 0 < whole.change.low < whole.after < whole.change.high
    assert (whole.answer, "crossing" in whole.sentence) == ("worse", True)
    # No share of 0 is as much, and no group is compared with another one by differences.
    assert {row.group for row in audited.worse(9.0)} == {"first", "second"}
    assert audited.behind() == []
    back = mt.audit(staying, trace, baseline=staying, measures=["crossing"])
    assert (back.worse(), back.whole["crossing"].answer) == ([], "no evidence")
    paths = [tmp_path / name for name in ("trace.safetensors", "staying.json", "moved.json")]
    for value, path in zip((trace, staying, moved), paths, strict=True):
        value.save(path)
    gate = ("evaluate", paths[2], paths[0], "--baseline", paths[1], "--measure", "crossing")
    for limit in (("--fail-if-worse", 900), ("--fail-if-gain-below", -90)):
        status, text, _ = run(*gate, *limit, "--by-group")
        assert status == 3
        assert "failed: " in text
    same = ("evaluate", paths[1], paths[0], "--baseline", paths[1], "--measure", "crossing")
    assert run(*same, "--fail-if-worse", 0, "--fail-if-gain-below", 0)[0] == 0
