"""Thousands of windows: a search sees some that stand for them, the answer is judged on all."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner.evaluation import copies
from moetuner.problem import windows as windows_
from moetuner.problem.windows import MOST
from moetuner.problem.windows.choice import choose_windows
from moetuner.problem.windows.clusters import MERGED
from moetuner.solver import effort
from moetuner.solver.bounds.loads import least_balance, least_time
from moetuner.statistics import limits as limits_
from moetuner.statistics import tables as tables_

MANY = 2 * MOST + 3


def many(seed=0, windows=MANY, experts=8, layers=2, **fields):
    """Load of many windows, in which four kinds of text follow each other."""
    rng = np.random.default_rng(seed)
    kinds = rng.dirichlet(np.ones(experts), (4, layers)) * 60
    of_window = np.arange(windows) // 7 % 4
    return mt.RoutingStatistics.from_load(rng.poisson(kinds[of_window]), **fields)


@pytest.mark.parametrize("largest", [255, 256, 65535, 65536, 2**32 - 1, 2**32])
def test_loads_have_the_smallest_type(largest, tmp_path, monkeypatch):
    """Where they are large, whatever they came in; what is equal is equal, and so are hashes."""
    small = mt.RoutingStatistics.from_load([[[0, 7]], [[3, 4]]])
    assert small.window_load.dtype == np.uint64
    monkeypatch.setattr(tables_, "NARROW_BYTES", 0)
    given_load = np.array([[[0, largest]], [[3, 4]]])
    made = [
        mt.RoutingStatistics.from_load(given_load.astype(kind))
        for kind in (np.int64, np.uint64, np.float64)
    ]
    made[0].save(tmp_path / "s.safetensors")
    made.append(mt.RoutingStatistics.load(tmp_path / "s.safetensors"))
    for one in made:
        assert one.window_load.dtype == np.min_scalar_type(largest)
        assert one.window_load.tolist() == given_load.tolist()
        assert (one, hash(one), one.fingerprint) == (made[0], hash(made[0]), made[0].fingerprint)
    both = made[0] + mt.RoutingStatistics.from_load([[1, 2]])
    assert both.total_load.tolist() == [[4, largest + 6]]


@pytest.mark.parametrize("arrival", ["bursts", 0.5])
def test_means_stand_for_all_windows(arrival):
    """They have all tokens, none of two groups, and as much weight as what they stand for."""
    group = np.arange(MANY) % 3
    statistics = many(group=group, group_names=("a", "b", "c"))
    windows = choose_windows(statistics, arrival, "mean", {"a": 2.0, "b": 1.0, "c": 0.0})
    few = windows.searched
    assert few is windows.searched
    assert few.load.dtype == np.float64
    assert len(few) <= MERGED + 3 + (0 if arrival == "bursts" else MERGED)
    recorded = few.group < 3
    load = np.tensordot(few.weight[recorded], few.load[recorded], axes=1)
    weight = windows.weight[:MANY]
    assert load == pytest.approx(np.tensordot(weight, statistics.window_load, axes=1))
    assert few.weight.sum() == pytest.approx(windows.weight.sum())
    for number in range(3):
        of = few.weight[few.group == number].sum()
        assert of == pytest.approx(weight[group == number].sum())


@pytest.mark.parametrize("split", ["even", "nearest"])
@pytest.mark.parametrize("goal", ["balance", "time"])
@pytest.mark.parametrize("regime", ["follow", "dispatch"])
def test_the_objective_is_of_all_windows(goal, regime, split, monkeypatch):
    """What is reported is what a dense table of all windows gives, and so is the bound."""
    ids = np.random.default_rng(0).integers(0, 8, (3 * MANY, 2, 1)) ** 2 // 8
    trace = trace_of(ids)
    statistics = mt.RoutingStatistics.from_trace(trace, window=3, sets=True)
    topology = mt.Topology(4, devices_per_node=2)
    problem = mt.Problem(
        statistics, topology, objective=goal, regime=regime, split=split, slots_per_device=3
    )
    monkeypatch.setattr("moetuner.evaluation.chunks.CHUNK_BYTES", 8 * 16 * 100)
    monkeypatch.setattr(effort, "POLISHED_SLOTS", 0)
    result = mt.solve(problem, iterations=100)
    dense = replace(problem.windows, load=statistics.window_load.astype(np.float64))
    expected = problem.objective_in(dense).value(result.placement)
    assert result.objective == pytest.approx(expected, rel=1e-12)
    judged = mt.evaluate(
        result.placement,
        statistics,
        topology,
        split=split,
        cost_model=problem.cost_model,
        regime=regime,
    )
    figure = judged.predicted_layer_us if goal == "time" else None
    assert figure is None or figure == pytest.approx(expected, rel=1e-9)
    bound = least_time if goal == "time" else least_balance
    assert bound(problem) <= expected
    assert result.details.search.windows == MANY
    assert result.details.search.windows_searched <= MERGED


@pytest.mark.parametrize("goal", ["balance", "time"])
def test_the_answer_is_the_same_for_any_threads_and_no_worse_than_balance(goal):
    """Merging, search and judgement do not depend on threads."""
    statistics = many(seed=1, experts=16)
    problem = mt.Problem(statistics, mt.Topology(4), objective=goal, slots_per_device=5)
    one, two = (mt.solve(problem, iterations=2000, threads=threads) for threads in (1, 2))
    assert one.placement == two.placement
    start = mt.balance(statistics.window_load, devices=4, slots_per_device=5)
    assert one.objective <= problem.value(start)


def test_means_are_as_good_as_all_windows():
    """On unseen windows of the same kinds the answer is as good as that of all windows seen."""
    seen, unseen = many(seed=2, experts=16), many(seed=2, windows=2 * MANY, experts=16)
    late = unseen.window_load[MANY:]
    values = []
    for statistics in (seen, mt.RoutingStatistics.from_load(seen.window_load[:MOST])):
        problem = mt.Problem(statistics, mt.Topology(4), objective="balance")
        placement = mt.solve(problem, "heuristic", iterations=5000).placement
        values.append(mt.evaluate(placement, mt.RoutingStatistics.from_load(late)).imbalance)
    assert values[0] <= values[1] * 1.01


@pytest.mark.parametrize(
    ("limits", "every"),
    [((1000, 1000, 1), 1), ((1000, 200, 1), 2), ((1000, 200, 12), 1), ((300, 200, 12), 3)],
)
def test_sets_are_sampled_beyond_those_of_a_layer_of_pairs_and_of_all_layers(
    monkeypatch, make_trace, limits, every
):
    """So many of a layer, or for every pair of experts; but never more than all layers may have."""
    names = ("MOST_SETS", "LAYER_SETS", "PAIR_SETS")
    for name, limit in zip(names, limits, strict=True):
        monkeypatch.setattr(limits_, name, limit)
    trace = make_trace(tokens=399, experts=16, top_k=3, layers=2)
    counted = mt.RoutingStatistics.from_trace(trace, sets=True)
    assert counted.set_tokens == (None if every == 1 else -(-399 // every))


def test_sets_of_a_sample_stand_for_all(monkeypatch, make_trace, tmp_path):
    """Where sets would be too many, one token in so many counts for those that follow it."""
    trace = make_trace(tokens=203, experts=16, top_k=3, layers=2)
    whole = mt.RoutingStatistics.from_trace(trace, sets=True)
    assert whole.set_tokens is None
    monkeypatch.setattr(limits_, "MOST_SETS", 100)
    counted = mt.RoutingStatistics.from_trace(trace, window=50, sets=True)
    every = -(-203 // 50)
    assert counted.set_tokens == -(-203 // every)
    sampled = np.sort(trace.expert_ids[::every], axis=2)
    stands_for = np.minimum(every, 203 - np.arange(0, 203, every)).astype(np.uint64)
    for layer, of in enumerate(counted.sets):
        assert of == mt.ExpertSets(sampled[:, layer], stands_for)
        assert of.counts.sum() == 203
    assert (counted.set_load != counted.total_load).any()
    assert (whole.set_load == whole.total_load).all()
    counted.save(tmp_path / "s.safetensors")
    assert mt.RoutingStatistics.load(tmp_path / "s.safetensors") == counted
    assert (counted + counted).set_tokens == 2 * counted.set_tokens
    unsampled = replace(whole, window=50)
    assert (counted + unsampled).set_tokens == counted.set_tokens + 203
    result = mt.solve(mt.Problem(counted, mt.Topology(4)), iterations=500)
    assert result.details.search.set_tokens == counted.set_tokens
    # Sets of all groups together are bounded, not those of each.
    grouped = mt.RoutingStatistics.from_trace(trace, sets=True, by_group=True)
    assert sum(len(of) for of in grouped.sets) <= 104
    assert grouped.sets[0].counts.sum() == 203
    # Each device is visited by no more tokens than it has.
    evaluation = mt.evaluate(result.placement, counted)
    assert 1 <= evaluation.fanout <= 3


@pytest.mark.parametrize("shard", [20, 100, 101])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
def test_counting_tells_how_far_it_is(make_trace, monkeypatch, shard, window):
    """Shares rise to one, with groups as well; windows are the same wherever a trace is cut."""
    for how in ({"window": window}, {"window": window, "by_group": True}):
        whole, shares = mt.RoutingStatistics.from_trace(make_trace(), **how), []
        with monkeypatch.context() as patch:
            patch.setattr(limits_, "WIDE_SHARD_BYTES", shard)
            counted = mt.RoutingStatistics.from_trace(make_trace(), **how, progress=shares.append)
        assert counted == whole
        assert shares == sorted(shares)
        assert len(shares) > 2
        assert shares[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("arrival", ["bursts", 0.5])
def test_a_sample_of_very_many_windows_counts_as_all(arrival, monkeypatch):
    """It has the weight of all, of every size of windows, and windows of all times and groups."""
    monkeypatch.setattr("moetuner.problem.windows.SAMPLED", MANY // 3)
    group = np.arange(MANY) * 3 // MANY
    statistics = many(group=group, group_names=("a", "b", "c"))
    windows = choose_windows(statistics, arrival, "mean", {"a": 2.0, "b": 1.0, "c": 0.0})
    sample = windows.sampled
    recorded = np.flatnonzero(sample.group < 3)
    assert len(recorded) == len(sample.load) == MANY // 3
    assert sample.weight.sum() == pytest.approx(windows.weight.sum())
    assert sample.weight[len(recorded) :].tolist() == windows.weight[MANY:].tolist()
    counts = np.bincount(sample.group[recorded], minlength=3)
    assert counts[0] == pytest.approx(counts[1], abs=1)
    assert counts[2] == 0
    assert windows.tokens[:MANY].sum() == statistics.window_load.sum()


def test_windows_are_computed_once_of_the_same_counts():
    """Problems of the same counts see the same windows and the same joined ones."""
    statistics = many()
    problems = [mt.Problem(statistics, mt.Topology(2), slots_per_device=n) for n in (8, 9)]
    assert problems[0].windows is problems[1].windows
    other = mt.Problem(statistics, mt.Topology(2), slots_per_device=8, arrival=0.5)
    assert other.windows is not problems[0].windows
    assert statistics.memo
    assert not pickle.loads(pickle.dumps(statistics)).memo


def test_what_tokens_visit_is_counted_once_for_all_windows(monkeypatch):
    """Objectives over all windows, those searched and a sample count it together, each its own."""
    monkeypatch.setattr(windows_, "SAMPLED", MOST)
    trace = trace_of(random_ids(2 * MANY, 2, 2, 8))
    statistics = mt.RoutingStatistics.from_trace(trace, window=2, sets=True)
    problem, again = (mt.Problem(statistics, mt.Topology(4), objective="time") for _ in range(2))
    counted, count = [], copies.count_visits

    def record(placement, *args):
        counted.extend((layer, slots.tobytes()) for layer, slots in enumerate(placement.slots))
        return count(placement, *args)

    monkeypatch.setattr(copies, "count_visits", record)
    placement = mt.solve(problem, "lpt").placement
    objectives = [
        problem.objective_function,
        problem.objective_searched,
        problem.objective_sampled,
    ]
    values = [each.value(placement) for each in objectives]
    assert counted
    assert len(counted) == len(set(counted))
    assert len({len(each.windows) for each in objectives}) == 3
    for each, value in zip(objectives, values, strict=True):
        assert value == again.objective_in(each.windows).value(placement)
    copied = pickle.loads(pickle.dumps(problem))
    assert copied.value(placement) == problem.value(placement)
