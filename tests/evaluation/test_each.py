"""Several placements are replayed in one reading, in both orders of arrival, as each by itself."""

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st
from placements import random_slots

import moetuner as mt
from moetuner import _core
from moetuner.evaluation import evaluate_each
from moetuner.evaluation import replay as replay_
from moetuner.evaluation.arrival import mixed_order
from moetuner.evaluation.copies import SPLITS

MODEL = mt.CostModel(1.0, 0.5, 0.01, 2.0, 64.0)


def same(found, alone):
    """Whether two evaluations hold the same figures, groups included, to the last bit."""
    return found.to_dict() == alone.to_dict()


@given(
    st.sampled_from(SPLITS),
    st.integers(1, 3),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_placements_are_replayed_as_each_by_itself(split, layers, spare, window, seed):
    """With one copy, with several, with groups: what is shared by placements changes nothing."""
    rng = np.random.default_rng(seed)
    trace = mt.RoutingTrace.from_arrays(
        random_ids(90, layers, 2, 8, seed=seed),
        num_experts=8,
        sequence=np.arange(90) // 7,
        group=np.arange(90) // 7 % 2,
    )
    topology = mt.Topology(4, devices_per_node=2)
    placements = [
        mt.Placement(random_slots(rng, layers, 4, 8, spare=more), num_experts=8) for more in spare
    ]
    how = {"window": window, "split": split, "cost_model": MODEL}
    together = evaluate_each(placements, trace, topology, **how)
    for placement, found in zip(placements, together, strict=True):
        assert same(found, mt.evaluate(placement, trace, topology, **how))


@given(st.sampled_from(SPLITS), st.integers(0, 2), st.integers(1, 30), st.integers(0, 5))
def test_mixed_arrival_is_a_replay_in_that_order(split, spare, window, seed):
    """Counted at their places, tokens load devices as if they had come in the mixed order."""
    rng = np.random.default_rng(seed)
    ids = random_ids(70, 2, 3, 8, seed=seed)
    sequence = np.arange(70, dtype=np.int32) // 6
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=8, sequence=sequence)
    topology = mt.Topology(4, devices_per_node=2)
    placement = mt.Placement(random_slots(rng, 2, 4, 8, spare=spare), num_experts=8)
    other = mt.Placement(random_slots(rng, 2, 4, 8, spare=0), num_experts=8)
    order = mixed_order(sequence, 70, seed=3)
    oracle = _core.Replay(
        placement.slots, 8, 3, topology.node_of_device.tolist(), window=window, split=split
    )
    oracle.push(np.ascontiguousarray(ids[order]))
    load = oracle.finish()[1]
    setting = [
        replay_.Setting(each, topology, window, split, False, None, mixed_seed=3)
        for each in (other, placement)
    ]
    [_, (counts, _)] = replay_.of_trace(trace, setting)
    assert np.array_equal(counts.mixed, load)


def test_progress_is_the_share_of_tokens(make_trace, monkeypatch):
    """It rises to one, and a reading serves all placements."""
    trace = make_trace(tokens=500, experts=4, layers=2)
    monkeypatch.setattr(replay_, "SHARD_BYTES", 400)
    readings = []
    shards = type(trace.ids).shards
    monkeypatch.setattr(
        type(trace.ids), "shards", lambda *given: readings.append(1) or shards(*given)
    )
    shares = []
    slots = np.arange(4).reshape(1, 2, 2).repeat(2, axis=0)
    evaluate_each(
        [mt.Placement(slots), mt.Placement(slots[:, ::-1].copy())],
        trace,
        window=16,
        progress=shares.append,
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) == 5
    assert len(readings) == 1


def test_arrival_refuses_what_it_cannot_count():
    """Copies that take turns, and places that are none of the trace's, are errors."""
    slots = np.array([[[0, 1], [1, -1]]], dtype=np.int32)
    with pytest.raises(ValueError, match="take turns"):
        _core.ArrivalLoad(slots, 2, 1, [0, 0], window=2, tokens=4, split="round_robin")
    counter = _core.ArrivalLoad(slots, 2, 1, [0, 0], window=2, tokens=4)
    ids = np.zeros((3, 1, 1), dtype=np.uint8)
    for places in ([0, 1, 4], [0, 1]):
        with pytest.raises(ValueError, match="places"):
            counter.push(ids, np.array(places, dtype=np.uint64))


def test_blocks_of_windows_change_nothing(make_trace, monkeypatch):
    """Thousands of windows are worked on in runs, to the same figures."""
    trace = make_trace(tokens=3000)
    rng = np.random.default_rng(0)
    topology = mt.Topology(4, devices_per_node=2)
    statistics = mt.RoutingStatistics.from_trace(trace, window=2, sets=True)
    cases = [
        (mt.Placement(random_slots(rng, 3, 4, 8, spare=spare), num_experts=8), traffic, split)
        for spare in (0, 1)
        for split in ("even", "nearest")
        for traffic in (trace, statistics)
    ]

    def figures():
        return [
            mt.evaluate(each, traffic, topology, window=2, split=split, cost_model=MODEL)
            for each, traffic, split in cases
        ]

    whole = figures()
    monkeypatch.setattr("moetuner.evaluation.blocks.BLOCK_BYTES", 1000)
    for found, alone in zip(figures(), whole, strict=True):
        for name in ("imbalance", "imbalance_mixed", "imbalance_worst", "predicted_layer_us"):
            assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-12), name
        assert found.predicted_us_per_layer == pytest.approx(alone.predicted_us_per_layer)
