"""omni-infer's patterns: 0 or 1 for every device, layer and expert."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placements import full_slots

import moetuner as mt
from moetuner.formats import WRITERS, form_of
from moetuner.formats.hints import Hints


@given(st.integers(0, 1 << 30), st.sampled_from(["u1", "i4", "i8", "?"]))
def test_patterns_come_back(tmp_path_factory, seed, kind):
    """Devices hold the experts that were written, whatever the type of the array."""
    slots, experts = full_slots(seed)
    placement = mt.Placement(slots, num_experts=experts)
    path = tmp_path_factory.getbasetemp() / "pattern.npy"
    WRITERS["omni-infer"].of.write_map(placement, path, Hints())
    pattern = np.load(path)
    assert (pattern == placement.held.transpose(1, 0, 2)).all()
    np.save(path, pattern.astype(kind))
    if experts < 3:
        return  # two entries of a row may as well be expert ids
    assert form_of(path) == "omni-infer"
    again = mt.read_placement(path)
    assert again.num_experts == experts
    assert (again.held == placement.held).all()


def test_devices_with_fewer_experts_have_empty_slots(tmp_path):
    """Every device gets as many slots as the fullest one; experts come in rising order."""
    path = tmp_path / "pattern.npy"
    np.save(path, [[[1, 0, 1, 1]], [[0, 1, 0, 0]]])
    assert mt.read_placement(path).slots.tolist() == [[[0, 2, 3], [1, -1, -1]]]


def test_a_pattern_is_no_recording(tmp_path):
    """A pattern given as recorded routing is refused by what it is; expert ids are still read."""
    path = tmp_path / "pattern.npy"
    np.save(path, [[[1, 0, 1, 1]], [[0, 1, 0, 0]]])
    with pytest.raises(ValueError, match=r"must be recorded routing, got a placement"):
        mt.open_input(path, num_experts=4)
    ids = tmp_path / "ids.npy"
    np.save(ids, np.array([[[0, 1]], [[1, 0]]], dtype=np.uint8))
    assert mt.open_input(ids, num_experts=4).tokens == 2
