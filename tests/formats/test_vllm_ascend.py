"""vllm-ascend: workloads of slots by the table of experts, and the expert map."""

import json

import numpy as np
import pytest
from engines_files import GOLDEN, save_torch

import moetuner as mt
from moetuner.formats import find_reader, read_input, read_map, vllm_ascend
from moetuner.formats.hints import Hints

TABLE = np.array([[[0, 1], [2, 0]], [[2, 1], [0, 1]]])
LOAD = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
BY_EXPERT = [[1 + 4, 2, 3], [7, 6 + 8, 5]]


def test_workload_with_its_table(tmp_path):
    """Tokens of slots become those of experts; stages are windows."""
    path = tmp_path / "load.npz"
    np.savez(path, expert_workload=LOAD, current_expert_table=TABLE)
    assert find_reader(path) == "vllm-ascend"
    assert mt.open_input(path).window_load.tolist() == [BY_EXPERT]
    assert mt.open_input(path, num_experts=4).window_load.shape == (1, 2, 4)
    np.savez(path, expert_workload=np.stack([LOAD, 2 * LOAD]), current_expert_table=TABLE)
    assert mt.open_input(path).window_load[1].tolist() == (2 * np.array(BY_EXPERT)).tolist()


def test_workload_beside_the_map(tmp_path):
    """The table may be the placement that ran; its map is no recording."""
    path, other = tmp_path / "load.npy", tmp_path / "map.json"
    np.save(path, LOAD)
    mt.write_placement(mt.Placement(TABLE, num_experts=3), "vllm-ascend", other)
    running = read_map(other, Hints()).experts
    actual = read_input([path], Hints(running=running), "vllm-ascend")
    assert actual.window_load.tolist() == [BY_EXPERT]
    with pytest.raises(ValueError, match=r"counts slots: .* the expert map that ran \(convert --"):
        mt.open_input(path, reader="vllm-ascend")
    with pytest.raises(ValueError, match="must be recorded routing, got a placement: the JSON of"):
        mt.open_input(other)


def test_tensors(tmp_path):
    """A file of torch.save: loads of experts, or workload and table by name."""
    path = save_torch(tmp_path / "expert_load_view.pt", np.array(BY_EXPERT))
    assert find_reader(path) == "vllm-ascend"
    assert mt.open_input(path).window_load.tolist() == [BY_EXPERT]
    save_torch(path, {"moe_load": LOAD, "table": TABLE})
    assert mt.open_input(path).window_load.tolist() == [BY_EXPERT]


def test_what_vllm_ascend_wrote(tmp_path):
    """What its policies are asked, and a map that it exported, which is ours and written again."""
    folder = GOLDEN / "ascend"
    workload = np.load(folder / "workload.npz")
    expected = np.zeros((4, 2, 256), dtype=int)
    for window, layer in np.ndindex(4, 2):
        table = workload["current_expert_table"][layer].ravel()
        np.add.at(
            expected[window, layer], table, workload["expert_workload"][window, layer].ravel()
        )
    assert np.array_equal(mt.open_input(folder / "workload.npz").window_load, expected)
    exported = json.loads((folder / "exported.json").read_text())
    placement = mt.read_placement(folder / "exported.json")
    assert (placement.layers, placement.devices, placement.slots_per_device) == (2, 32, 9)
    for layer, device in np.ndindex(2, 32):
        content = exported["layer_list"][layer]["device_list"][device]["device_expert"]
        assert placement.slots[layer, device].tolist() == content
    vllm_ascend.write_map(placement, tmp_path / "m.json", Hints())
    assert json.loads((tmp_path / "m.json").read_text()) == exported


def test_order_of_the_file_counts(tmp_path, run):
    """Entries are taken in the file's order; --check refuses ids that are another than their place.

    Ids may be left out.
    """
    path = tmp_path / "map.json"
    vllm_ascend.write_map(mt.Placement(TABLE, num_experts=3), path, Hints())
    fields = json.loads(path.read_text())
    fields["layer_list"].reverse()
    fields["layer_list"][1]["device_list"].reverse()
    path.write_text(json.dumps(fields))
    slots = [TABLE[1].tolist(), TABLE[0][::-1].tolist()]
    assert mt.read_placement(path).slots.tolist() == slots
    assert run("export", "--check", path)[0] == 2
    for layer in fields["layer_list"]:
        del layer["layer_id"]
        for device in layer["device_list"]:
            del device["device_id"]
    path.write_text(json.dumps(fields))
    assert mt.read_placement(path).slots.tolist() == slots
    assert run("export", "--check", path)[0] == 0
