"""Topology: nodes, links and their integer costs."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner.presets import MACHINES
from moetuner.topology import sum_by_node

TWO = mt.Topology(4, 2, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9)


@pytest.mark.parametrize(
    ("topology", "row", "tier"),
    [
        (mt.Topology(1), [0], [0]),
        (mt.Topology(4), [0, 1, 1, 1], [0, 1, 1, 1]),
        (mt.Topology(3, 1), [0, 1, 1], [0, 2, 2]),
        (TWO, [0, 1, 9, 9], [0, 1, 2, 2]),
        (mt.Topology(5, [3, 2]), [0, 1, 1, 9, 9], [0, 1, 1, 2, 2]),
    ],
)
def test_cost_is_proportional_to_time(topology, row, tier):
    """A link nine times as slow costs nine times as much; where all are equal, each costs 1."""
    assert (topology.cost[0].tolist(), topology.tier[0].tolist()) == (row, tier)
    assert (topology.cost == topology.cost.T).all()
    starts = np.cumsum(topology.node_sizes)
    assert (
        topology.node_of_device == np.searchsorted(starts, range(topology.devices), "right")
    ).all()


def test_nodes_may_differ_in_size(tmp_path):
    """Equal sizes are one number; others are kept, by files and by a change of another field."""
    assert mt.Topology(8, [4, 4]) == mt.Topology(8, 4)
    assert mt.Topology(7, [7]) == mt.Topology(7)
    topology = mt.Topology(7, np.array([4, 3]), name="seven")
    assert (topology.devices_per_node, topology.nodes, topology.node_size) == ((4, 3), 2, 4)
    assert hash(topology) == hash(dataclasses.replace(topology, name="seven"))
    path = tmp_path / "seven.json"
    path.write_text(json.dumps(topology.to_dict()))
    assert mt.Topology.load(path) == topology
    table = np.arange(21).reshape(3, 7)
    assert sum_by_node(table, topology).tolist() == [[6, 15], [34, 36], [62, 57]]


def test_tiers_nest():
    """Devices of a node, of a rack and of different racks are three tiers, each with its link."""
    tiers = (mt.Tier(2, 8e9, 1e-6), mt.Tier(4, 4e9, 2e-6), mt.Tier(8, 1e9, 3e-6))
    topology = mt.Topology(8, tiers=tiers)
    assert topology.tier[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert (topology.tier == topology.tier.T).all()
    assert topology.cost[0].tolist() == [0, 1, 2, 2, 8, 8, 8, 8]
    assert topology.latency[0, [0, 1, 2, 4]].tolist() == [0, 1e-6, 2e-6, 3e-6]
    assert topology.bandwidth[7].tolist() == [1e9] * 4 + [4e9] * 2 + [8e9, np.inf]
    assert (topology.nodes, topology.node_of_device.tolist()) == (4, [0, 0, 1, 1, 2, 2, 3, 3])


def test_nodes_are_two_tiers():
    """The shorthand and the tiers it stands for are one machine."""
    short = mt.Topology(
        4, 2, intra_node_bandwidth=9e9, inter_node_bandwidth=1e9, inter_node_latency=1e-6
    )
    long = mt.Topology(4, tiers=short.levels)
    assert long.levels == short.levels == (mt.Tier(2, 9e9), mt.Tier(4, 1e9, 1e-6))
    assert (long.devices_per_node, long.inter_node_bandwidth) == (2, 1e9)
    assert long.cost.tolist() == short.cost.tolist()
    assert dataclasses.replace(long, name="same") == mt.Topology(4, tiers=short.levels, name="same")


def test_link_cost_of_whole_numbers_is_kept():
    """Whole numbers come in lowest terms; the topology stays a value that compares and hashes."""
    cost = [[0, 2, 4], [2, 0, 6], [4, 6, 0]]
    topology = mt.Topology(3, link_cost=cost)
    assert topology.cost.tolist() == [[0, 1, 2], [1, 0, 3], [2, 3, 0]]
    assert topology == mt.Topology(3, link_cost=np.array(cost, dtype=float))
    assert hash(topology) == hash(mt.Topology(3, link_cost=cost))


@given(st.lists(st.floats(1e-12, 1e12), min_size=6, max_size=6))
def test_link_cost_is_scaled_with_a_bounded_loss(values):
    """Every cost is off by at most 1/65535 of the largest, and none is lost."""
    cost = np.zeros((4, 4))
    cost[np.triu_indices(4, 1)] = values
    cost += cost.T
    actual = mt.Topology(4, link_cost=cost).cost
    assert (actual == actual.T).all()
    assert actual.max() <= 65535
    assert ((actual > 0) == (cost > 0)).all()
    error = np.abs(actual / actual.max() - cost / cost.max())
    assert error.max() <= 1 / 65535


def test_speed_and_slots_say_whether_devices_are_alike():
    """Equal numbers are as good as none."""
    assert mt.Topology(2).has_equal_devices
    assert mt.Topology(2, speed=[3, 3], slots_per_device=[4, 4]).has_equal_devices
    assert not mt.Topology(2, speed=[1, 2]).has_equal_devices
    assert not mt.Topology(2, slots_per_device=np.array([4, 5])).has_equal_devices
    assert mt.Topology(2).speed_of_device.tolist() == [1, 1]


@pytest.mark.parametrize("name", MACHINES)
def test_presets_are_topologies(name):
    """Every machine can be had in one node and in several, and with other numbers."""
    one, two = mt.Topology.preset(name), mt.Topology.preset(name, nodes=2)
    assert (one.nodes, two.nodes, two.name) == (1, 2, f"{name}:2")
    assert two.devices == 2 * one.devices
    assert two.inter_node_bandwidth <= two.intra_node_bandwidth
    slow = mt.Topology.preset(name, 2, inter_node_bandwidth=one.intra_node_bandwidth / 18)
    assert slow.cost[0, [1, -1]].tolist() == [1, 18]


TIERS = """
devices = 4
tiers = [{devices = 2, bandwidth = 9e9}, {devices = 4, bandwidth = 1e9, latency = 1e-6}]
"""
LINKS = {"devices": 2, "link_cost": [[0, 1], [1, 0]], "speed": [1, 2]}


@pytest.mark.parametrize(
    ("text", "topology"),
    [
        (TIERS, mt.Topology(4, tiers=(mt.Tier(2, 9e9), mt.Tier(4, 1e9, 1e-6)))),
        ('preset = "a100-nvl8-ib200"\nnodes = 2', mt.Topology.preset("a100-nvl8-ib200", 2)),
        (json.dumps(LINKS), mt.Topology(**LINKS)),
        ('{"devices": 8, "devices_per_node": 4, "name": "two"}', mt.Topology(8, 4, name="two")),
    ],
)
def test_files_are_what_the_constructor_takes(tmp_path, text, topology):
    """TOML is read like JSON, with tiers as tables and machines by name."""
    path = tmp_path / "machine"
    path.write_text(text)
    assert mt.Topology.load(path) == topology


@pytest.mark.parametrize("ratio", [4096.0, 5000.0, 65535.0, 1e5, 1e12, 1e60])
@pytest.mark.parametrize("fast", ["intra_node_bandwidth", "inter_node_bandwidth"])
def test_links_may_differ_by_any_ratio(ratio, fast, make_trace):
    """Costs stay in the 16 bits that the search counts in, and every problem is solved."""
    links = {"intra_node_bandwidth": 1e-30, "inter_node_bandwidth": 1e-30, fast: ratio * 1e-30}
    topology = mt.Topology(4, 2, **links)
    off = topology.cost[~np.eye(4, dtype=bool)]
    assert (topology.cost == topology.cost.T).all()
    assert not np.diagonal(topology.cost).any()
    assert (off.min(), off.max()) == (1, min(ratio, 65535))
    statistics = mt.RoutingStatistics.from_trace(make_trace(60))
    problem = mt.Problem(statistics, topology, regime="follow", max_imbalance=2.0)
    actual = mt.solve(problem, "heuristic", iterations=100)
    assert 0 <= actual.objective <= ratio * 1.01


def test_all_that_is_finite_gives_finite_times(make_trace):
    """The slowest link and device and the dearest model: no objective is infinite or NaN."""
    statistics = mt.RoutingStatistics.from_trace(make_trace(60), sets=True)
    worst = {"base_us": 1e30, "expert_us": 1e30, "start_us": 0, "token_us": 1e30}
    links = {"intra_node_bandwidth": 1e30, "inter_node_bandwidth": 1e-30}
    speed = [1e-30, 1e30, 1, 1]
    topology = mt.Topology(4, 2, **links, speed=speed, inter_node_latency=1e30)
    model = mt.CostModel(**worst, token_bytes=1e30)
    problem = mt.Problem(statistics, topology, cost_model=model)
    assert np.isfinite(mt.solve(problem, "contiguous").objective)
