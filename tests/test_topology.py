"""Topology: nodes, links and their integer costs."""

import json

import numpy as np
import pytest

import moetuner as mt


def test_one_node_costs_one_everywhere():
    """Where all links are equal, moving to any other device costs 1, and staying nothing."""
    cost = mt.Topology(4).cost
    assert cost.tolist() == (1 - np.eye(4, dtype=int)).tolist()


def test_cost_is_proportional_to_time():
    """A link nine times as slow costs nine times as much."""
    topology = mt.Topology(
        4, devices_per_node=2, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9
    )
    assert topology.node_of_device.tolist() == [0, 0, 1, 1]
    assert topology.cost[0].tolist() == [0, 1, 9, 9]


def test_single_device_costs_nothing():
    """One device has no links."""
    assert mt.Topology(1).cost.tolist() == [[0]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"devices": 0}, "devices must be from 1 to 65535, got 0"),
        (
            {"devices": 6, "devices_per_node": 4},
            r"devices_per_node must divide devices \(6\), got 4",
        ),
        ({"devices": 4, "devices_per_node": 0}, "devices_per_node must divide"),
        ({"devices": 4, "inter_node_bandwidth": 0}, "inter_node_bandwidth must be a positive"),
        ({"devices": 4, "intra_node_bandwidth": float("nan")}, "intra_node_bandwidth must be"),
    ],
)
def test_wrong_sizes_are_named(fields, words):
    """A message names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=words):
        mt.Topology(**fields)


def test_load_reads_what_the_constructor_takes(tmp_path):
    """A file holds the constructor's parameters."""
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"devices": 8, "devices_per_node": 4, "name": "two boxes"}))
    assert mt.Topology.load(path) == mt.Topology(8, 4, name="two boxes")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gpus": 8}', '{"devices": "8"}', "\xff", "{}"])
def test_bad_files_are_value_errors(tmp_path, text):
    """Whatever is in the file, the error is a ValueError that names it."""
    path = tmp_path / "machine.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"machine\.json"):
        mt.Topology.load(path)
