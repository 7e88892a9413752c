"""EPLB's arrays say what the placement says."""

import numpy as np
import pytest

import moetuner as mt
from moetuner.formats import write_placement
from moetuner.formats.eplb import eplb_maps
from moetuner.formats.hints import Hints


def replicated():
    """Two layers, four experts in six slots on two devices."""
    return mt.Placement(np.array([[[0, 1, 2], [3, 0, 1]], [[3, 2, 1], [0, 3, 2]]]))


def test_maps_are_inverse():
    """Slots of an expert hold that expert, rising, padded with -1 beyond its copies."""
    maps = eplb_maps(replicated())
    assert maps["physical_to_logical_map"].tolist() == [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]
    assert maps["logical_replica_count"].tolist() == [[2, 2, 1, 1], [1, 1, 2, 2]]
    assert maps["logical_to_physical_map"].tolist() == [
        [[0, 4], [1, 5], [2, -1], [3, -1]],
        [[3, -1], [2, -1], [1, 5], [0, 4]],
    ]


def test_file_has_the_three_arrays(tmp_path):
    """Under EPLB's names, as 64-bit integers."""
    path = tmp_path / "maps.npz"
    write_placement(replicated(), "eplb", path, Hints())
    with np.load(path) as arrays:
        assert sorted(arrays) == [
            "logical_replica_count",
            "logical_to_physical_map",
            "physical_to_logical_map",
        ]
        assert {arrays[name].dtype for name in arrays} == {np.dtype(np.int64)}
    assert list(tmp_path.iterdir()) == [path]


def test_empty_slots_are_refused():
    """The message names the slot."""
    placement = mt.Placement(np.array([[[0, 1], [2, -1]]]))
    with pytest.raises(ValueError, match="layer 0, device 1: slot 1 is empty"):
        eplb_maps(placement)
