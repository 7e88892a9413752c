"""evaluate(): the replay counts what a plain loop over tokens counts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of
from placements import random_slots
from served import replayed, serving

import moetuner as mt
from moetuner import _core
from moetuner.cost import busiest_ports
from moetuner.evaluation import copies, replay
from moetuner.placement import blocks

IN_BLOCKS = blocks(3, 8, 4)


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
    # Rows of hundreds of tokens are counted bit by bit, shorter ones token by token.
    tokens = draw(st.integers(0, 70)) * draw(st.sampled_from([1, 12]))
    ids = random_ids(tokens, layers, top_k, experts, seed=seed)
    return slots, ids, experts, draw(st.sampled_from([None, 1, 7, 100]))


@given(cases(), st.sampled_from(["even", "nearest", "round_robin"]), st.integers(0, 70))
def test_replay_is_the_plain_loop(case, split, cut):
    """Counts of every window, wherever the trace is cut into shards, and what follows of them."""
    slots, ids, experts, window = case
    devices = slots.shape[1]
    topology = mt.Topology(devices, [2] * (devices // 2) + [1] * (devices % 2))
    nodes = topology.node_of_device.tolist()
    load, follow, visits, node_visits = wanted = replayed(slots, ids, nodes, window, split)
    row = (np.arange(len(ids)) // (window or max(len(ids), 1))).astype(np.uint32)
    sizes = {"rows": len(load), "most_tokens": window or len(ids)}
    how = (slots.astype(np.int32), experts, ids.shape[2], nodes)
    counter = _core.Replay(*how, **sizes, split=split, pairs=True)
    for part in (slice(0, cut), slice(cut, None)):
        counter.push(np.ascontiguousarray(ids[part], dtype=np.uint16), row[part])
    *counted, of_slots, pairs, _ = counter.finish()
    assert not of_slots.size
    counted.insert(1, pairs)
    assert [mine.tolist() for mine in counted] == [theirs.tolist() for theirs in wanted]
    trace = trace_of(ids, experts)
    placement = mt.Placement(slots, num_experts=experts)
    of = mt.evaluate(placement, trace, topology, window=window, split=split)
    assert (of.tokens, of.traffic["follow"].tolist()) == (len(ids), follow.tolist())
    total, per_token = follow.sum(), max(len(ids), 1) * slots.shape[0]
    stays = sum(np.trace(table) for table in follow)
    assert of.crossing == pytest.approx((total - stays) / total if total else 0.0)
    assert of.fanout == pytest.approx(visits.sum() / per_token)
    assert of.node_fanout == pytest.approx(node_visits.sum() / per_token)
    assert of.imbalance_total == pytest.approx(ratios(load.sum(axis=0)).mean())
    # Tokens that are left over behind whole windows are no step.
    steps = load[: max(len(ids) // window, 1)] if window else load
    assert of.imbalance == pytest.approx(ratios(steps).mean())
    assert of.imbalance_worst == pytest.approx(ratios(steps).max())
    assert of.imbalance_per_layer == pytest.approx(ratios(steps).mean(axis=0))


def test_too_many_windows_are_refused(make_trace, monkeypatch):
    """Counts of every window must fit memory."""
    monkeypatch.setattr(replay, "TABLE_LIMIT", 1 << 10)
    with pytest.raises(ValueError, match="make windows longer"):
        mt.evaluate(IN_BLOCKS, make_trace(), window=1)


@pytest.mark.parametrize(
    "judge",
    [
        lambda trace, n: mt.evaluate(IN_BLOCKS, trace, window=100, threads=n).to_dict(),
        lambda trace, n: mt.audit(IN_BLOCKS, trace, window=64, threads=n).to_dict(),
        lambda trace, n: mt.structure(trace, 2, threads=n),
        lambda trace, n: mt.advise(trace, mt.Topology(4), window=100, threads=n).to_dict(),
    ],
)
def test_threads_do_not_matter(make_trace, brief, judge):
    """One thread and two give the same answer to the last bit."""
    assert judge(make_trace(2000), 1) == judge(make_trace(2000), 2)


def test_groups_are_evaluated_like_their_tokens_or_windows_alone(make_trace):
    """Of a trace and of a load table; empty groups are left out."""
    trace = make_trace()
    load = mt.RoutingStatistics.from_trace(trace, window=20).window_load
    group = np.arange(10) % 2
    table = mt.RoutingStatistics.from_load(load, group=group, group_names=("even", "odd", "none"))
    for traffic, alone in (
        (trace, [trace.select(groups=name) for name in ("even", "odd")]),
        (table, [mt.RoutingStatistics.from_load(load[group == number]) for number in (0, 1)]),
    ):
        by_group = mt.evaluate(IN_BLOCKS, traffic, window=16).by_group
        assert list(by_group) == ["even", "odd"]
        for mine, part in zip(by_group.values(), alone, strict=True):
            expected = mt.evaluate(IN_BLOCKS, part, window=16).to_dict()
            assert mine.to_dict() == {**expected, "by_group": {}}


def test_statistics_tell_the_same_balance_and_crossing(make_trace):
    """Without replicas, counts tell balance and crossing but no fanout; loads tell balance."""
    trace = make_trace(500)
    replayed = mt.evaluate(IN_BLOCKS, trace, window=64)
    counted = mt.evaluate(IN_BLOCKS, mt.RoutingStatistics.from_trace(trace, window=64, sets=False))
    for name in ("imbalance", "imbalance_total", "imbalance_worst", "crossing"):
        assert getattr(counted, name) == pytest.approx(getattr(replayed, name))
    assert counted.fanout is counted.node_fanout is None
    load = mt.RoutingStatistics.from_load(mt.RoutingStatistics.from_trace(trace).window_load)
    assert mt.evaluate(IN_BLOCKS, load).crossing is None


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
    # Expert 0 is on devices 0 and 1 of the first node, and on 2 of the second. In one node homes
    # with a copy use it; those of device 3 are shared out.
    for nodes, split, most in ((2, "nearest", 400), (2, "even", 800 / 3), (4, "nearest", 800 / 3)):
        of = mt.evaluate(replicated(1), statistics, mt.Topology(4, nodes), split=split)
        assert of.imbalance == pytest.approx(most / 200)


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
    assert problem.objective_function.value(placement) == 0


def test_mixed_arrival_balances_bursts():
    """Two kinds of text, each on an expert of its own, are unbalanced only one after the other."""
    ids = np.repeat([0, 1], 500).reshape(-1, 1, 1)
    trace = trace_of(ids, 2, length=10)
    placement = mt.Placement.from_assignment([[0, 1]], 2)
    evaluation = mt.evaluate(placement, trace, window=100)
    assert evaluation.imbalance == 2
    assert evaluation.imbalance_mixed < 1.4
    assert mt.evaluate(placement, trace, window=100, mixed=False).imbalance_mixed is None
    statistics = mt.RoutingStatistics.from_trace(trace, window=100)
    counted = mt.evaluate(placement, statistics)
    assert counted.imbalance == 2
    assert counted.imbalance_mixed == 1  # ten windows: each mean is of all


@pytest.mark.parametrize(
    ("speed", "wanted"), [(None, 4 / 3), ([2, 1], 1), ([1, 1], 4 / 3), ([1, 2], 2)]
)
def test_speeds_count_in_the_imbalance(speed, wanted):
    """A device of twice the speed carries twice the load as easily."""
    statistics = mt.RoutingStatistics.from_load(np.array([[20, 10]]))
    placement = mt.Placement.from_assignment([[0, 1]], 2)
    evaluation = mt.evaluate(placement, statistics, mt.Topology(2, speed=speed))
    assert evaluation.imbalance == pytest.approx(wanted)


MODEL = mt.CostModel(5, 2, 3, 0.25, 1000, combine_bytes=2000, exposed=0.4, overlap=0.5)


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
    load, _, visits, _ = replayed(IN_BLOCKS.slots, trace.expert_ids, [0, 0, 1, 1], window)
    times = []
    for w, layer in np.ndindex(4, 3):
        ids = trace.expert_ids[w * window : (w + 1) * window, layer]
        active = [len({e for e in ids.ravel().tolist() if e // 2 == device}) for device in range(4)]
        sent = np.repeat(visits[w, layer][None] / 4, 4, axis=0)
        compute = MODEL.compute_us(load[w, layer], active, topology.speed_of_device)
        there = MODEL.ports_us(busiest_ports(sent, topology), topology)
        back = MODEL.ports_us(busiest_ports(sent.T, topology), topology, bytes_each=2000)
        times.append(MODEL.layer_us(compute, there + back))
    evaluation = mt.evaluate(IN_BLOCKS, trace, topology, window=window, cost_model=MODEL)
    assert evaluation.predicted_layer_us == pytest.approx(np.mean(times))
    for percent in (50, 95, 99):
        name = f"predicted_layer_us_p{percent}"
        assert getattr(evaluation, name) == pytest.approx(np.percentile(times, percent))


@pytest.mark.parametrize("model", [None, "nobodys-moe", "deepseek-v3"])
def test_times_are_of_assumed_experts_where_no_model_is_known(model):
    """As on the command line they are DeepSeek-V3's, of a table too, and the evaluation says so."""
    load = np.random.default_rng(0).poisson(900, (6, 3, 8))
    table = mt.RoutingStatistics.from_load(load, model=model)
    evaluation = mt.evaluate(IN_BLOCKS, table)
    expected = mt.CostModel.preset("h100", hidden=7168, intermediate=2048, weight_bits=8)
    named = mt.evaluate(IN_BLOCKS, table, cost_model=expected)
    assert evaluation.predicted_layer_us == named.predicted_layer_us
    assert evaluation.predicted_with is not None
    assert ("deepseek-v3, as " in evaluation.predicted_with) == (model != "deepseek-v3")
    assert named.predicted_with == "h100:7168x2048, weights in 8 bits"
    without = mt.evaluate(IN_BLOCKS, table, cost_model=None)
    assert (without.predicted_layer_us, without.predicted_with) == (None, None)


@pytest.mark.parametrize("sizes", [[2, 2], [3, 1]])
def test_a_node_is_sent_to_once(make_trace, sizes):
    """Rows from every home are counted one by one: across once per node, then on to each device.

    Every device of a node receives and forwards as many of them.
    """
    trace, topology = (
        make_trace(240, top_k=3),
        mt.Topology(4, sizes, intra_node_bandwidth=1e9, inter_node_bandwidth=1e8),
    )
    node_of = topology.node_of_device.tolist()
    model = mt.CostModel(0, 0, 0, 0, token_bytes=1000, combine_bytes=0, once_per="node")
    times = []
    for layer in range(3):
        near, far = np.zeros((2, 4, 4))
        for token in trace.expert_ids[:, layer].tolist():
            to = {expert // 2 for expert in token}
            for home, relay in np.ndindex(4, 4):
                node = node_of[relay]
                if node not in {node_of[device] for device in to}:
                    continue
                rows = 1 / 4 / sizes[node]
                far[home, relay] += (node != node_of[home]) * rows
                for device in to:
                    near[relay, device] += (node_of[device] == node and device != relay) * rows
        times.append(model.ports_us(busiest_ports(near + far, topology), topology))
    evaluation = mt.evaluate(IN_BLOCKS, trace, topology, cost_model=model)
    assert evaluation.predicted_layer_us == pytest.approx(np.mean(times))
    by_device = replace(model, once_per="device")
    more = mt.evaluate(IN_BLOCKS, trace, topology, cost_model=by_device).predicted_layer_us
    assert more > evaluation.predicted_layer_us


def test_following_moves_states_to_the_next_layer():
    """One token in each direction: a port each way, nothing after the last layer, none back."""
    ids = np.array([[[0], [1]], [[1], [1]]])
    trace = trace_of(ids, 2)
    placement = mt.Placement.from_assignment([[0, 1], [0, 1]], 2)
    model = mt.CostModel(0, 0, 0, 1, token_bytes=1000)
    topology = mt.Topology(2, intra_node_bandwidth=1e9)
    evaluation = mt.evaluate(placement, trace, topology, cost_model=model, regime="follow")
    assert evaluation.predicted_layer_us == pytest.approx(((1 + 1) + 2) / 2)
    assert evaluation.busiest_port["follow"] == {"out": [1], "in": [1]}


def test_busiest_ports_are_reported_by_tier(make_trace):
    """Rows out of and into the busiest device, of either tier."""
    trace = make_trace()
    evaluation = mt.evaluate(IN_BLOCKS, trace, mt.Topology(4, 2))
    rows = evaluation.traffic["dispatch"]
    inside = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    for tier, mask in enumerate((inside, ~inside)):
        ports = evaluation.busiest_port["dispatch"]
        assert ports["out"][tier] == pytest.approx((rows * mask).sum(axis=2).max(axis=1).mean())
        assert ports["in"][tier] == pytest.approx((rows * mask).sum(axis=1).max(axis=1).mean())


def test_replicas_are_active_by_their_share():
    """A copy that gets half of one token is expected to be read half of the time."""
    statistics = mt.RoutingStatistics.from_load(np.array([[1, 0]]))
    placement = mt.Placement([[[0, 1], [0, -1]]], num_experts=2)
    model = mt.CostModel(0, 8, 0, 0, token_bytes=0)
    assert mt.evaluate(placement, statistics, cost_model=model).predicted_layer_us == 4


@given(st.integers(0, 2**32), st.sampled_from([1, 100, 10_000, 10**12]), st.booleans())
def test_copies_are_active_as_the_formula_has_it(seed, most, are_means):
    """A copy with a share of a window's tokens is idle by chance; means of windows are no whole."""
    rng = np.random.default_rng(seed)
    slots = [[[0, 1, 2], [2, 0, -1], [3, 0, 1]], [[3, 2, 1], [1, 0, -1], [-1, 1, -1]]]
    placement, topology = mt.Placement(slots, num_experts=4), mt.Topology(3)
    split = rng.choice(["even", "nearest"])
    share = copies.compute_slot_shares(placement, topology, split)
    load = rng.integers(0, most, (5, 2, 4)) * rng.integers(0, 2, (5, 2, 4))
    load = load / 3 if are_means else load.astype(np.uint64)
    tokens = load[:, np.arange(2)[:, None, None], placement.slots].astype(np.float64)
    wanted = np.where(tokens > 0, 1 - (1 - share) ** tokens, 0.0) * (placement.slots >= 0)
    assert copies.count_active_experts(placement, share, load) == pytest.approx(wanted.sum(axis=3))


@pytest.mark.parametrize("counted", [False, True])
def test_mixed_seed_is_another_order(counted):
    """Another seed is another mixed figure, and no other figure changes; one seed is one answer."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (2000, 2, 1))
    traffic = trace_of(ids, length=50)
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
    trace = trace_of(np.zeros((4, 1, 1), int))
    slots = np.array([[[0, 1, -1], [2, 3, -1], [4, 5, -1], [6, 7, -1]]])
    for last, used in ((-1, 2.0), (7, 2.25)):
        slots[0, 0, 2] = last
        of = mt.evaluate(mt.Placement(slots, num_experts=8), trace)
        assert of.slots_used == of.to_dict()["slots_used"] == used


@pytest.mark.parametrize("window", [64, 150, 199])
def test_tokens_left_over_are_no_step(make_trace, window):
    """Means over windows are those of whole windows: replayed, counted, by group, as objective."""
    rest = 37
    trace = make_trace(3 * window + rest)
    whole = trace_of(trace.expert_ids[: 3 * window])
    model = mt.CostModel(1, 2, 3, 0.5, token_bytes=0)
    how = {"window": window, "cost_model": model, "mixed": False}
    expected = mt.evaluate(IN_BLOCKS, whole, **how)
    counted = mt.RoutingStatistics.from_trace(trace, window=window, sets=True)
    by_group = mt.RoutingStatistics.from_trace(trace, window=window, by_group=True)
    alone = replace(by_group, group=None, group_names=())
    assert counted.is_full_window.tolist() == [True] * 3 + [False]
    names = [name for name in mt.evaluation.figures.FIGURES if "predicted" in name]
    for traffic in (trace, counted):
        actual = mt.evaluate(IN_BLOCKS, traffic, **how)
        for name in ("imbalance", "imbalance_worst", "imbalance_per_window", *names):
            assert getattr(actual, name) == pytest.approx(getattr(expected, name)), name
    three = replace(counted, window_load=counted.window_load[:3])
    mixed, expected_mixed = (mt.evaluate(IN_BLOCKS, of).imbalance_mixed for of in (counted, three))
    assert mixed == expected_mixed
    goals = {"balance": expected.imbalance, "time": expected.predicted_layer_us}
    for goal, value in goals.items():
        problem = mt.Problem(counted, mt.Topology(4), objective=goal, cost_model=model)
        assert problem.value(IN_BLOCKS) == pytest.approx(value)
        steps = trace.tokens * trace.layers * trace.top_k / problem.windows.mean_tokens
        assert steps == pytest.approx(3 + rest / window)
    assert by_group.is_full_window.sum() == sum(np.bincount(trace.group) // window)
    assert alone.is_full_window.sum() == by_group.is_full_window.sum()


def test_windows_that_are_all_there_is_count():
    """A trace below one window is one; windows of unknown length, and short ones first, count."""
    load = np.array([[[8, 0]], [[8, 8]], [[4, 0]], [[1, 1]], [[8, 8]], [[2, 2]]])
    group = np.array([0, 0, 1, 1, 0, 0])

    def steps(**fields):
        return mt.RoutingStatistics.from_load(load, **fields).is_full_window.tolist()

    assert steps() == [True] * 6
    assert steps(window=16) == [True, True, False, True, True, False]
    named = {"group": group, "group_names": ("long", "short")}
    assert steps(window=16, **named) == [True, True, True, True, True, False]
    assert mt.RoutingStatistics.from_load(load[2:3], window=16).is_full_window.tolist() == [True]


@pytest.mark.parametrize("arrival", ["mixed", 0.5])
def test_mixed_windows_of_a_group_are_of_its_own_sequences(make_trace, arrival):
    """Whatever the arrival: imbalance_mixed of a group, and of all, is one number."""
    trace = make_trace(1000)
    bursts, other = (
        mt.evaluate(IN_BLOCKS, trace, window=64, arrival=each) for each in ("bursts", arrival)
    )
    assert other.imbalance_mixed == bursts.imbalance_mixed
    for name, group in bursts.by_group.items():
        assert other.by_group[name].imbalance_mixed == group.imbalance_mixed


@pytest.mark.parametrize("window", [1, 5, 40, None])
@pytest.mark.parametrize("split", ["even", "nearest", "round_robin"])
def test_copies_are_read_where_the_replay_has_a_token(split, window):
    """How many experts a device reads in a window is counted, of copies too."""
    tokens, size, nodes = 130, window or 130, mt.Topology(4, 2).node_of_device.tolist()
    slots = np.array([[[(2 * device + slot) % 8 for slot in range(3)] for device in range(4)]] * 2)
    ids, turn = random_ids(tokens, 2, 2, 8, seed=5), np.zeros((2, 8), dtype=int)
    read = [[[set() for _ in range(4)] for _ in range(2)] for _ in range(tokens // size)]
    for token, layer, choice in np.ndindex(tokens // size * size, 2, 2):
        expert = int(ids[token, layer, choice])
        how = {"turn": turn[layer, expert]}
        device = serving(slots[layer], expert, nodes, token, split, **how)
        turn[layer, expert] += 1
        read[token // size][layer][device].add(expert)
    times = [3 + 5 * max(map(len, devices)) for layers in read for devices in layers]
    model = mt.CostModel(3, 5, 0, 0, token_bytes=0)
    trace = trace_of(ids)
    placement = mt.Placement(slots, num_experts=8)
    actual = mt.evaluate(
        placement, trace, mt.Topology(4, 2), window=window, split=split, cost_model=model
    )
    assert actual.predicted_layer_us == pytest.approx(np.mean(times))


def test_the_name_of_a_file_is_no_traffic():
    """It is refused by its type, whatever else is given."""
    for model in ("model", None):
        with pytest.raises(TypeError, match="traffic must be a RoutingTrace"):
            mt.evaluate(IN_BLOCKS, "t.safetensors", cost_model=model)
