"""memra's map of experts to two cards."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner.files.opened import Opened
from moetuner.formats import WRITERS, find_form, write_placement
from moetuner.formats.hints import Hints
from moetuner.formats.layout import find_faults

HALVES = mt.Placement([[[0, 3], [1, 2]], [[0, 1], [2, 3]]])


@given(st.integers(0, 1 << 30), st.integers(1, 4), st.integers(1, 5))
def test_maps_come_back(tmp_path_factory, seed, layers, half):
    """Every expert is on the card that was written, in the layers of the model."""
    experts = 2 * half
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    placement = mt.Placement(order.reshape(layers, 2, half), num_experts=experts)
    path = tmp_path_factory.getbasetemp() / "map.json"
    write_placement(placement, "memra", path, dense_layers=[0])
    assert find_form(path) == "memra"
    assert np.array_equal(mt.read_placement(path).device_of, placement.device_of)
    layout = WRITERS["memra"].module.read_map(Opened(path), Hints())
    assert layout.layers == tuple(range(1, layers + 1))
    assert find_faults(layout, "memra", Hints(num_experts=experts, devices=2)) == []


def test_the_map_is_as_memras_loader_reads_it(tmp_path):
    """The fields that its reader looks at, and no other value of them."""
    path = tmp_path / "map.json"
    write_placement(HALVES, "memra", path, dense_layers=[1])
    fields = json.loads(path.read_text())
    about = {name: fields[name] for name in ("format", "ranks", "entry_rank", "expert_count")}
    assert about == {"format": "memra-ep-map-v1", "ranks": 2, "entry_rank": 0, "expert_count": 4}
    rows = {layer["layer"]: layer["assignment"] for layer in fields["layers"]}
    assert rows == {0: [0, 1, 1, 0], 2: [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ([[[0, 1], [2, 3], [4, 5], [6, 7]]], "must be for 2 devices, as memra loads it, got 4"),
        ([[[0, 1, 2], [2, 3, 0]]], "must have 4 slots, as memra has no copies, got 6"),
        ([[[0, 1, 2], [3, -1, -1]]], "slot 1 is empty"),
    ],
)
def test_what_the_map_cannot_say_is_refused(tmp_path, slots, words):
    """Other ranks than two, an expert on both cards, and uneven halves."""
    path = tmp_path / "map.json"
    with pytest.raises(ValueError, match=words):
        write_placement(mt.Placement(slots), "memra", path, dense_layers=[])
    assert not path.exists()
