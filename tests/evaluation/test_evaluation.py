"""evaluate(): the replay counts what a plain loop over tokens counts."""

import dataclasses

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st
from placements import murmur, random_slots

import moetuner as mt
from moetuner import _core
from moetuner.cost import busiest_ports
from moetuner.evaluation import replay as replay_
from moetuner.evaluation.auditing import blocks


def serving_copy(copies, nodes, token, turn, split):
    """Choose the device that serves a token, of those that have a copy."""
    hashed = murmur(token)
    if split == "round_robin":
        return copies[turn % len(copies)]
    if split == "nearest":
        home = hashed * len(nodes) >> 32
        if home in copies:
            return home
        copies = [device for device in copies if nodes[device] == nodes[home]] or copies
    return copies[hashed % len(copies)]


def oracle(slots, ids, nodes, window, split="even"):
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
    served = np.zeros((layers, slots.max() + 1), dtype=int)
    for t in range(tokens):
        serving = []
        for layer in range(layers):
            flat = slots[layer].ravel().tolist()
            chosen = []
            for expert in ids[t, layer].tolist():
                copies = [slot // width for slot, held in enumerate(flat) if held == expert]
                chosen.append(serving_copy(copies, nodes, t, served[layer, expert], split))
                served[layer, expert] += 1
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
    slots = random_slots(rng, layers, devices, experts, draw(st.integers(0, 2)))
    ids = random_ids(draw(st.integers(0, 70)), layers, top_k, experts, seed=seed)
    return slots, ids, experts, draw(st.sampled_from([None, 1, 7, 100]))


@given(cases(), st.sampled_from(["even", "nearest", "round_robin"]))
def test_replay_is_the_plain_loop(case, split):
    """Load, transitions and fanout equal the oracle's, also with replicas and empty slots."""
    slots, ids, experts, window = case
    devices = slots.shape[1]
    topology = mt.Topology(devices, 2 if devices % 2 == 0 else None)
    load, follow, visits, node_visits = oracle(slots, ids, topology.node_of_device, window, split)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
    placement = mt.Placement(slots, num_experts=experts)
    found = mt.evaluate(placement, trace, topology, window=window, split=split)
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
    monkeypatch.setattr(replay_, "TABLE_LIMIT", 1 << 10)
    with pytest.raises(ValueError, match="make windows longer"):
        mt.evaluate(blocks(trace.layers, 8, 4), trace, window=1)


def test_threads_do_not_matter(make_trace):
    """One thread and two give the same answer to the last bit."""
    trace = make_trace(5000, layers=5)
    one, two = (mt.evaluate(blocks(5, 8, 4), trace, window=100, threads=n) for n in (1, 2))
    assert one.to_dict() == two.to_dict()


def test_groups_are_the_traces_of_their_tokens(make_trace):
    """A group is evaluated like the trace of its tokens alone; empty groups are left out."""
    trace = make_trace()
    placement = blocks(trace.layers, 8, 4)
    found = mt.evaluate(placement, trace, window=16)
    assert list(found.by_group) == ["even", "odd"]
    for name, group in found.by_group.items():
        alone = mt.evaluate(placement, trace.select(groups=name), window=16)
        assert {**group.to_dict(), "by_group": {}} == {**alone.to_dict(), "by_group": {}}


def test_statistics_tell_the_same_balance_and_crossing(make_trace):
    """Without replicas, counts tell balance and crossing but no fanout; loads tell balance."""
    trace = make_trace(500)
    placement = blocks(trace.layers, 8, 4)
    replayed = mt.evaluate(placement, trace, window=64)
    counted = mt.evaluate(placement, mt.RoutingStatistics.from_trace(trace, window=64))
    for name in ("imbalance", "imbalance_total", "imbalance_worst", "crossing"):
        assert getattr(counted, name) == pytest.approx(getattr(replayed, name))
    assert counted.fanout is counted.node_fanout is None
    load = mt.RoutingStatistics.from_load(mt.RoutingStatistics.from_trace(trace).window_load)
    assert mt.evaluate(placement, load).crossing is None


def test_other_models_and_machines_are_refused(make_trace):
    """The message gives both sizes."""
    trace = make_trace()
    with pytest.raises(ValueError, match="3 layers, 8 experts and 2 devices"):
        mt.evaluate(blocks(trace.layers, 8, 4), trace, mt.Topology(2))
    with pytest.raises(ValueError, match="got 3, 8 and 4"):
        mt.evaluate(blocks(trace.layers, 8, 4), make_trace(experts=9))


REPLICATED = np.array([[[0, 1, 2, 4], [3, 0, 5, -1], [4, 5, 0, 6], [6, 7, 1, -1]]])


def replicated(layers=3):
    """Eight experts on four devices, some of them two or three times."""
    return mt.Placement(np.tile(REPLICATED, (layers, 1, 1)), num_experts=8)


@pytest.mark.parametrize("split", ["even", "nearest", "round_robin"])
def test_statistics_split_like_long_traces(make_trace, split):
    """Expected shares are what the replay comes to on many tokens, in loads and in dispatch."""
    trace, topology = make_trace(20000, top_k=1), mt.Topology(4, 2)
    replayed = mt.evaluate(replicated(), trace, topology, split=split)
    counted = mt.evaluate(
        replicated(), mt.RoutingStatistics.from_trace(trace), topology, split=split
    )
    assert counted.imbalance == pytest.approx(replayed.imbalance, rel=0.02)
    assert counted.crossing == pytest.approx(replayed.crossing, abs=0.03)


def test_nearest_shares_are_counted_by_home():
    """With copies in both nodes each serves the homes of its own, and its own device's first."""
    load = np.zeros((1, 1, 8), dtype=np.uint64)
    load[0, 0, 0] = 800
    statistics = mt.RoutingStatistics.from_load(load)
    # Expert 0 is on devices 0 and 1 of the first node, and on 2 of the second.
    nearest = mt.evaluate(replicated(1), statistics, mt.Topology(4, 2), split="nearest")
    even = mt.evaluate(replicated(1), statistics, mt.Topology(4, 2))
    assert nearest.imbalance == pytest.approx(400 / 200)
    assert even.imbalance == pytest.approx(800 / 3 / 200)
    # In one node homes with a copy use it; those of device 3 are shared out.
    one_node = mt.evaluate(replicated(1), statistics, split="nearest")
    assert one_node.imbalance == pytest.approx(800 / 3 / 200)


def test_nearest_pairs_have_one_home():
    """Where both layers have a copy at home, the token stays there; counts know that."""
    slots = [[[0, 1], [0, 1]]] * 2
    placement = mt.Placement(np.array(slots), num_experts=2)
    pairs = np.array([[[7, 2], [3, 5]]], dtype=np.uint64)
    load = np.array([[[9, 8], [10, 7]]], dtype=np.uint64)
    statistics = mt.RoutingStatistics(load, pairs)
    assert mt.evaluate(placement, statistics, split="nearest").crossing == 0
    assert mt.evaluate(placement, statistics, split="even").crossing == pytest.approx(0.5)
    problem = mt.Problem(
        statistics, mt.Topology(2), slots_per_device=2, split="nearest", objective="traffic"
    )
    assert mt.Objective(problem).value(placement) == 0


def test_mixed_arrival_balances_bursts():
    """Two kinds of text, each on an expert of its own, are unbalanced only one after the other."""
    ids = np.repeat([0, 1], 500).reshape(-1, 1, 1)
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=2, sequence=np.arange(1000) // 10)
    placement = mt.Placement.from_assignment([[0, 1]], 2)
    found = mt.evaluate(placement, trace, window=100)
    assert found.imbalance == 2
    assert found.imbalance_mixed < 1.4
    assert mt.evaluate(placement, trace, window=100, mixed=False).imbalance_mixed is None
    statistics = mt.RoutingStatistics.from_trace(trace, window=100)
    counted = mt.evaluate(placement, statistics)
    assert counted.imbalance == 2
    assert counted.imbalance_mixed == 1  # ten windows: each mean is of all


def test_speeds_count_in_the_imbalance():
    """A device of twice the speed carries twice the load as easily."""
    statistics = mt.RoutingStatistics.from_load(np.array([[20, 10]]))
    placement = mt.Placement.from_assignment([[0, 1]], 2)
    assert mt.evaluate(placement, statistics, mt.Topology(2)).imbalance == pytest.approx(4 / 3)
    for speed, wanted in (([2, 1], 1), ([1, 1], 4 / 3), ([1, 2], 2)):
        found = mt.evaluate(placement, statistics, mt.Topology(2, speed=speed))
        assert found.imbalance == pytest.approx(wanted)


MODEL = mt.CostModel(5, 2, 3, 0.25, token_bytes=1000, combine_bytes=2000, overlap=0.5)


def test_times_are_the_cost_models(make_trace):
    """Every window and layer takes what its loads, active experts and rows cost."""
    trace, window = make_trace(200, top_k=2), 50
    topology = mt.Topology(
        4,
        2,
        intra_node_bandwidth=1e9,
        inter_node_bandwidth=1e8,
        inter_node_latency=1e-5,
        speed=[1, 1, 2, 2],
    )
    placement = blocks(trace.layers, 8, 4)
    load, _, visits, _ = oracle(placement.slots, trace.expert_ids, [0, 0, 1, 1], window)
    times = []
    for w, layer in np.ndindex(4, 3):
        ids = trace.expert_ids[w * window : (w + 1) * window, layer]
        active = [len({e for e in ids.ravel().tolist() if e // 2 == device}) for device in range(4)]
        sent = np.repeat(visits[w, layer][None] / 4, 4, axis=0)
        compute = MODEL.compute_us(load[w, layer], active, topology.speed_of_device)
        there = MODEL.ports_us(busiest_ports(sent, topology), topology)
        back = MODEL.ports_us(busiest_ports(sent.T, topology), topology, bytes_each=2000)
        times.append(MODEL.layer_us(compute, there + back))
    found = mt.evaluate(placement, trace, topology, window=window, cost_model=MODEL)
    assert found.predicted_layer_us == pytest.approx(np.mean(times))
    for percent in (50, 95, 99):
        name = f"predicted_layer_us_p{percent}"
        assert getattr(found, name) == pytest.approx(np.percentile(times, percent))
    assert mt.evaluate(placement, trace, topology).predicted_layer_us is None


def test_a_node_is_sent_to_once(make_trace):
    """Rows from every home are counted one by one: across once per node, then on to each device."""
    trace, topology = (
        make_trace(240, top_k=3),
        mt.Topology(4, 2, intra_node_bandwidth=1e9, inter_node_bandwidth=1e8),
    )
    placement = blocks(trace.layers, 8, 4)
    model = mt.CostModel(0, 0, 0, 0, token_bytes=1000, combine_bytes=0, once_per="node")
    times = []
    for layer in range(3):
        near, far = np.zeros((2, 4, 4))
        for token in trace.expert_ids[:, layer].tolist():
            to = {expert // 2 for expert in token}
            for home in range(4):
                for node in {device // 2 for device in to}:
                    relay = node * 2 + home % 2
                    far[home, relay] += (node != home // 2) / 4
                    for device in to:
                        near[relay, device] += (device // 2 == node and device != relay) / 4
        times.append(model.ports_us(busiest_ports(near + far, topology), topology))
    found = mt.evaluate(placement, trace, topology, cost_model=model)
    assert found.predicted_layer_us == pytest.approx(np.mean(times))
    by_device = dataclasses.replace(model, once_per="device")
    more = mt.evaluate(placement, trace, topology, cost_model=by_device).predicted_layer_us
    assert more > found.predicted_layer_us


def test_following_moves_states_to_the_next_layer():
    """One token in each direction: a port each way, nothing after the last layer, none back."""
    ids = np.array([[[0], [1]], [[1], [1]]])
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=2)
    placement = mt.Placement.from_assignment([[0, 1], [0, 1]], 2)
    model = mt.CostModel(0, 0, 0, 1, token_bytes=1000)
    topology = mt.Topology(2, intra_node_bandwidth=1e9)
    found = mt.evaluate(placement, trace, topology, cost_model=model, regime="follow")
    assert found.predicted_layer_us == pytest.approx(((1 + 1) + 2) / 2)
    assert found.busiest_port["follow"] == {"out": [1], "in": [1]}


def test_busiest_ports_are_reported_by_tier(make_trace):
    """Rows out of and into the busiest device, of either tier."""
    trace = make_trace()
    found = mt.evaluate(blocks(trace.layers, 8, 4), trace, mt.Topology(4, 2))
    rows = found.traffic["dispatch"]
    inside = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    for tier, mask in enumerate((inside, ~inside)):
        ports = found.busiest_port["dispatch"]
        assert ports["out"][tier] == pytest.approx((rows * mask).sum(axis=2).max(axis=1).mean())
        assert ports["in"][tier] == pytest.approx((rows * mask).sum(axis=1).max(axis=1).mean())


def test_replicas_are_active_by_their_share():
    """A copy that gets half of one token is expected to be read half of the time."""
    statistics = mt.RoutingStatistics.from_load(np.array([[1, 0]]))
    placement = mt.Placement([[[0, 1], [0, -1]]], num_experts=2)
    model = mt.CostModel(0, 8, 0, 0, token_bytes=0)
    assert mt.evaluate(placement, statistics, cost_model=model).predicted_layer_us == 4


def test_load_tables_have_groups(make_trace):
    """Windows of a group are evaluated like a table of them alone."""
    load = mt.RoutingStatistics.from_trace(make_trace(), window=20).window_load
    group = np.arange(10) % 2
    table = mt.RoutingStatistics.from_load(load, group=group, group_names=("a", "b", "none"))
    found = mt.evaluate(blocks(3, 8, 4), table)
    assert list(found.by_group) == ["a", "b"]
    alone = mt.evaluate(blocks(3, 8, 4), mt.RoutingStatistics.from_load(load[group == 1]))
    assert found.by_group["b"].to_dict() == alone.to_dict()


@pytest.mark.parametrize("counted", [False, True])
def test_mixed_seed_is_another_order(counted):
    """Another seed is another mixed figure, and no other figure changes; one seed is one answer."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (2000, 2, 1))
    traffic = mt.RoutingTrace.from_arrays(ids, num_experts=8, sequence=np.arange(2000) // 50)
    placement = blocks(2, 8, 4)
    if counted:
        traffic = mt.RoutingStatistics.from_trace(traffic, window=50)
    one, same, other = (
        mt.evaluate(placement, traffic, window=None if counted else 50, mixed_seed=seed)
        for seed in (0, 0, 1)
    )
    assert one.imbalance_mixed == same.imbalance_mixed != other.imbalance_mixed
    assert one.imbalance == other.imbalance


def test_slots_in_use_are_counted():
    """Eight experts in twelve slots of four devices are two of three; a copy takes another one."""
    trace = mt.RoutingTrace.from_arrays(np.zeros((4, 1, 1), int), num_experts=8)
    slots = np.array([[[0, 1, -1], [2, 3, -1], [4, 5, -1], [6, 7, -1]]])
    assert mt.evaluate(mt.Placement(slots, num_experts=8), trace).slots_used == 2.0
    slots[0, 0, 2] = 7
    found = mt.evaluate(mt.Placement(slots, num_experts=8), trace)
    assert found.slots_used == found.to_dict()["slots_used"] == 2.25
