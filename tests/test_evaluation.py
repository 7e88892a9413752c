"""evaluate(): the replay counts what a plain loop over tokens counts."""

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner import _core, evaluation


def oracle(slots, ids, nodes, window):
    """Replay token by token.

    Load [W,L,D], follow [L-1,D,D], visits [W,L,D], node visits [W,L,N].
    """
    tokens, layers, _ = ids.shape
    devices, width = slots.shape[1:]
    windows = max(-(-tokens // window), 1) if window else 1
    load = np.zeros((windows, layers, devices), dtype=int)
    follow = np.zeros((layers - 1, devices, devices), dtype=int)
    visits = np.zeros_like(load)
    node_visits = np.zeros((windows, layers, max(nodes) + 1), dtype=int)
    for t in range(tokens):
        serving = []
        for layer in range(layers):
            flat = slots[layer].ravel().tolist()
            chosen = []
            for expert in ids[t, layer].tolist():
                copies = [slot // width for slot, held in enumerate(flat) if held == expert]
                chosen.append(copies[(t * 2654435761) % 2**32 % len(copies)])
            serving.append(chosen)
            at = t // window if window else 0
            for device in chosen:
                load[at, layer, device] += 1
            visits[at, layer, list(set(chosen))] += 1
            node_visits[at, layer, list({nodes[device] for device in chosen})] += 1
        for layer in range(layers - 1):
            for a in serving[layer]:
                for b in serving[layer + 1]:
                    follow[layer, a, b] += 1
    return load, follow, visits, node_visits


def ratios(load):
    """Max / mean of device loads [...,D], 1 where there are none."""
    mean = load.mean(axis=-1)
    return np.where(mean > 0, load.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)


@st.composite
def cases(draw):
    """Draw slots with replicas and empty ones, ids, experts and a window."""
    layers, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    # Counts of devices fit one word, some, or are not used at all.
    experts, devices = draw(st.integers(top_k, 9)), draw(st.sampled_from([1, 2, 4, 30, 70, 200]))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    width = -(-experts // devices) + draw(st.integers(0, 2))
    slots = np.full((layers, devices, width), -1)
    for layer in slots:
        for i, expert in enumerate(rng.permutation(experts)):
            layer[i % devices, i // devices] = expert
        for device, slot in np.argwhere(layer == -1):
            expert = rng.integers(-1, experts)
            if expert not in layer[device]:
                layer[device, slot] = expert
    ids = random_ids(draw(st.integers(0, 70)), layers, top_k, experts, seed=seed)
    return slots, ids, experts, draw(st.sampled_from([None, 1, 7, 100]))


@given(cases())
def test_replay_is_the_plain_loop(case):
    """Load, transitions and fanout equal the oracle's, also with replicas and empty slots."""
    slots, ids, experts, window = case
    devices = slots.shape[1]
    topology = mt.Topology(devices, 2 if devices % 2 == 0 else None)
    load, follow, visits, node_visits = oracle(slots, ids, topology.node_of_device, window)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
    placement = mt.Placement(slots, num_experts=experts)
    found = mt.evaluate(placement, trace, topology, window=window)
    assert found.tokens == len(ids)
    assert found.traffic["follow"].tolist() == follow.tolist()
    total = follow.sum()
    kept = sum(np.trace(table) for table in follow)
    assert found.crossing == pytest.approx((total - kept) / total if total else 0.0)
    per_token = max(len(ids), 1) * slots.shape[0]
    assert found.fanout == pytest.approx(visits.sum() / per_token)
    assert found.node_fanout == pytest.approx(node_visits.sum() / per_token)
    assert found.imbalance == pytest.approx(ratios(load).mean())
    assert found.imbalance_worst == pytest.approx(ratios(load).max())
    assert found.imbalance_total == pytest.approx(ratios(load.sum(axis=0)).mean())
    assert found.imbalance_per_layer == pytest.approx(ratios(load).mean(axis=0))


@given(cases(), st.integers(0, 70))
def test_replay_counts_every_window(case, cut):
    """Load and visits by window equal the oracle's, wherever the trace is cut into shards."""
    slots, ids, experts, window = case
    nodes = np.arange(slots.shape[1]) // 3
    replay = _core.Replay(
        slots.astype(np.int32), experts, ids.shape[2], nodes.tolist(), window=window
    )
    for shard in (ids[:cut], ids[cut:]):
        replay.push(np.ascontiguousarray(shard, dtype=np.uint16))
    tokens, *found = replay.finish()
    assert tokens == len(ids)
    for mine, theirs in zip(found, oracle(slots, ids, nodes, window), strict=True):
        assert mine.tolist() == theirs.tolist()


def test_too_many_windows_are_refused(make_trace, monkeypatch):
    """Counts of every window must fit memory."""
    trace = make_trace()
    monkeypatch.setattr(evaluation, "TABLE_LIMIT", 1 << 10)
    with pytest.raises(ValueError, match="make windows longer"):
        mt.evaluate(contiguous(trace), trace, window=1)


def contiguous(trace, devices=4):
    """Experts in blocks on all layers."""
    device_of = np.arange(trace.num_experts) * devices // trace.num_experts
    return mt.Placement.from_assignment(np.tile(device_of, (trace.layers, 1)), devices)


def test_threads_do_not_matter(make_trace):
    """One thread and two give the same answer to the last bit."""
    trace = make_trace(5000, layers=5)
    placement = contiguous(trace)
    one, two = (mt.evaluate(placement, trace, window=100, threads=n) for n in (1, 2))
    assert one.to_dict() == two.to_dict()


def test_groups_are_the_traces_of_their_tokens(make_trace):
    """A group is evaluated like the trace of its tokens alone; empty groups are left out."""
    trace = make_trace()
    placement = contiguous(trace)
    found = mt.evaluate(placement, trace, window=16)
    assert list(found.by_group) == ["even", "odd"]
    for name, group in found.by_group.items():
        alone = mt.evaluate(placement, trace.select(groups=name), window=16)
        assert {**group.to_dict(), "by_group": {}} == {**alone.to_dict(), "by_group": {}}


def test_statistics_tell_the_same_balance_and_crossing(make_trace):
    """Without replicas, counts are enough for balance and crossing, and fanout is not known."""
    trace = make_trace(500)
    placement = contiguous(trace)
    replayed = mt.evaluate(placement, trace, window=64)
    counted = mt.evaluate(placement, mt.RoutingStatistics.from_trace(trace, window=64))
    for name in ("imbalance", "imbalance_total", "imbalance_worst", "crossing"):
        assert getattr(counted, name) == pytest.approx(getattr(replayed, name))
    assert counted.fanout is None
    assert counted.node_fanout is None


def test_load_table_has_no_crossing(make_trace):
    """Loads alone say nothing about transitions."""
    trace = make_trace()
    load = mt.RoutingStatistics.from_trace(trace).window_load
    assert mt.evaluate(contiguous(trace), mt.RoutingStatistics.from_load(load)).crossing is None


def test_other_models_and_machines_are_refused(make_trace):
    """The message gives both sizes."""
    trace = make_trace()
    with pytest.raises(ValueError, match="3 layers, 8 experts and 2 devices"):
        mt.evaluate(contiguous(trace), trace, mt.Topology(2))
    with pytest.raises(ValueError, match="got 3, 8 and 4"):
        mt.evaluate(contiguous(trace), make_trace(experts=9))


def test_dispatch_traffic_is_what_leaves_home(make_trace):
    """With homes spread evenly, remote visits are fanout * (1 - 1 / D)."""
    trace = make_trace()
    found = mt.evaluate(contiguous(trace), trace)
    moved = found.traffic["dispatch"].sum() / (trace.tokens * trace.layers)
    assert moved == pytest.approx(found.fanout * (1 - 1 / 4))
