"""EPLB's arrays say what the placement says."""

import numpy as np
import pytest

import moetuner as mt
from moetuner.formats import write_placement
from moetuner.formats.eplb import eplb_maps
from moetuner.formats.hints import Hints


def test_maps_are_inverse(tmp_path):
    """Slots of an expert hold that expert, rising, padded with -1 beyond its copies.

    The file has them under EPLB's names, as 64-bit integers.
    """
    placement = mt.Placement(np.array([[[0, 1, 2], [3, 0, 1]], [[3, 2, 1], [0, 3, 2]]]))
    path = tmp_path / "maps.npz"
    write_placement(placement, "eplb", path, Hints())
    with np.load(path) as arrays:
        maps = dict(arrays)
    assert {array.dtype for array in maps.values()} == {np.dtype(np.int64)}
    assert {name: array.tolist() for name, array in maps.items()} == {
        "physical_to_logical_map": [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]],
        "logical_replica_count": [[2, 2, 1, 1], [1, 1, 2, 2]],
        "logical_to_physical_map": [
            [[0, 4], [1, 5], [2, -1], [3, -1]],
            [[3, -1], [2, -1], [1, 5], [0, 4]],
        ],
    }
    with pytest.raises(ValueError, match="layer 0, device 1: slot 1 is empty"):
        eplb_maps(mt.Placement(np.array([[[0, 1], [2, -1]]])))
