"""Maps of experts: what is written can be read, converted and checked, whatever the format."""

import json
from functools import partial

import numpy as np
import pytest
from engines_files import GOLDEN
from hypothesis import given
from hypothesis import strategies as st
from placements import full_slots

import moetuner as mt
from moetuner.files.opened import Opened
from moetuner.formats import WRITERS, find_form, is_map, read_placement, write_placement
from moetuner.formats.eplb import eplb_maps
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout, find_faults
from moetuner.report.recording import list_warnings

# memra's map knows no order of slots; it has tests of its own.
READ = sorted(name for name in WRITERS if name != "memra")


def path_of(folder, name):
    return folder / f"map{WRITERS[name].suffixes[0]}"


@given(st.integers(0, 1 << 32), st.sets(st.integers(0, 8), max_size=4))
def test_what_is_written_is_read(tmp_path_factory, seed, dense):
    """Every format gives the same placement, and says by its content which one it is."""
    slots, experts = full_slots(seed)
    placement = mt.Placement(slots, num_experts=experts)
    dense = tuple(layer for layer in sorted(dense) if layer <= placement.layers)[:1]
    hints = Hints(num_experts=experts, dense_layers=dense)
    read = partial(
        read_placement, devices=placement.devices, num_experts=experts, dense_layers=dense
    )
    folder = tmp_path_factory.mktemp("maps")
    before = path_of(folder, "json")
    placement.save(before)
    for name in READ:
        path = path_of(folder, name)
        # From what was written last: any format can be made of any other.
        write_placement(read(before), name, path, dense_layers=dense)
        assert find_form(path) == name
        assert read(path) == placement
        writer = WRITERS[name]
        layout = writer.module.read_map(Opened(path), hints)
        assert find_faults(layout, writer.engine, hints) == []
        before = path.rename(folder / f"before{path.suffix}")


@pytest.mark.parametrize("name", sorted(n for n, writer in WRITERS.items() if writer.engine))
def test_what_an_engine_cannot_load_is_not_written(tmp_path, name):
    """An empty slot is named, with the option that avoids it; so is a wrong ending."""
    placement = mt.Placement([[[0, 1], [2, -1]], [[0, 1], [2, 0]]])
    path = path_of(tmp_path, name)
    with pytest.raises(ValueError, match=r"layer 0, device 1: slot 1 is empty.*--for ") as caught:
        write_placement(placement, name, path, dense_layers=())
    assert f'"--for {WRITERS[name].engine}"' in str(caught.value)
    assert not path.exists()
    with pytest.raises(ValueError, match="path must end in"):
        write_placement(placement.filled(), name, tmp_path / "map.txt", dense_layers=())


of = Layout.from_rows
GOOD = [[0, 1, 2, 3, 0, 2]] * 4
# A map, the engine, what is said of the model, and what is wrong.
FAULTS = """
of(GOOD) | vllm | | nothing
of(GOOD) | vllm | devices=3, num_experts=4, hidden_layers=4 | nothing
of(GOOD) | vllm | hidden_layers=4, dense_layers=(0,) | got 4, one for every hidden layer
of(GOOD, counts_dense=True) | sglang | hidden_layers=6, dense_layers=(0, 1) | must have 6 rows, one
of(GOOD) | vllm | hidden_layers=9 | got 4: of another model
of(GOOD, layers=(0, 2, 3, 4)) | vllm | dense_layers=(0,) | layer 0 has no
of(GOOD) | vllm | devices=4 | 4 or 8 would fit
of(GOOD, devices=2) | vllm | devices=3 | must be for 3 devices, got 2
of(GOOD) | vllm | num_experts=5 | layer 0: expert 4 has no slot
of(GOOD) | vllm | num_experts=3 | expert 3 is not below 3
of(GOOD, num_experts=4) | vllm | num_experts=8 | another model
of([[0, 1, 3, 3]]) | vllm | | layer 0: expert 2 has no slot
of([[0, 1, -1, 2]], layers=(7,)) | vllm | | layer 7: slot 2 is empty
of([[0, 1, -1, 2]], devices=2) | vllm | | layer 0, device 1: slot 0 is empty
of([[0, 1, 1 << 40, 2]]) | vllm | | is not below 65536
of([[0, 0, 1, 2]]) | vllm | devices=2 | nothing
of([[0, 0, 1, 2]], counts_dense=True) | sglang | devices=2 | row 0, device 0: exp
of([[0, 0, 1, 2]]) | vllm-ascend | devices=2 | refuses it
of([[0, 0, 1, 2]]) | megatron | devices=2 | has no copies
"""


@pytest.mark.parametrize("case", FAULTS.strip().splitlines())
def test_faults(case):
    """What is wrong is said in words that say what would be right; vLLM serves two copies."""
    layout, engine, hints, words = (part.strip() for part in case.split("|"))
    actual = find_faults(eval(layout, globals()), engine, eval(f"Hints({hints})", globals()))
    assert (not actual) if words == "nothing" else any(words in fault for fault in actual), actual


def test_eplbs_arrays_are_inverse(tmp_path):
    """Slots of an expert hold that expert, rising, padded with -1 beyond its copies.

    The file has them under EPLB's names, as 64-bit integers.
    """
    placement = mt.Placement(np.array([[[0, 1, 2], [3, 0, 1]], [[3, 2, 1], [0, 3, 2]]]))
    path = tmp_path / "maps.npz"
    write_placement(placement, "eplb", path)
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


@pytest.mark.parametrize("form", WRITERS)
def test_what_is_written_is_known_for_a_map(tmp_path, form):
    """Whatever the format, so that inspect shows it as a placement."""
    entry = mt.Placement([[[0, 1, 2], [3, 4, 5]]] * 2)
    write_placement(entry, form, path_of(tmp_path, form), hidden_layers=3, dense_layers=(0,))
    assert is_map(path_of(tmp_path, form))


def test_recordings_are_no_maps():
    """Of what engines wrote, two files are maps; some recordings hold one besides."""
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert {path.name for path in files if is_map(path)} == {
        "exported.json",
        "expert_location.json",
    }
    assert not is_map(GOLDEN)


ROWS = [[0, 4, 1, 5, 2, 6, 3, 7], [7, 6, 5, 4, 3, 2, 1, 0], [*range(8)]]
FOUND = {
    "lists": ROWS,
    "arrays": {"physical_to_logical_map": ROWS, "logical_replica_count": [[1] * 8] * 3},
    "hidden layers": {"physical_to_logical_map": [[0] * 8, *ROWS]},
    "record": {
        "record_type": "eplb_initial_mapping",
        "num_slots": 8,
        "initial_global_assignments": dict(zip(("1", "2", "5"), ROWS, strict=True)),
    },
}


@pytest.mark.parametrize("form", FOUND)
def test_maps_are_taken_wherever_placements_are(ok, trace, tmp_path, form):
    """Commands give the same of a map as of the placement that it is; EPLB's, vLLM's, SGLang's."""
    as_map, as_placement = tmp_path / "found.map", tmp_path / "placement.json"
    as_map.write_text(json.dumps(FOUND[form]))
    placement = mt.read_placement(as_map, devices=4)
    assert placement.slots.reshape(3, -1).tolist() == ROWS
    placement.save(as_placement)
    # A map that one engine alone loads is judged as that one serves; of a placement that is said.
    engine = WRITERS[find_form(as_map)].engine
    served = () if engine is None else ("--for", engine)
    texts = [
        ok("evaluate", of, trace, "--baseline", of, "--by-group", *served, "--devices", 4)
        for of in (as_map, as_placement)
    ]
    assert texts[0] == texts[1].replace(as_placement.name, as_map.name)
    out = tmp_path / "new.json"
    ok("solve", trace, "--devices", 4, "--initial", as_map, "--move-budget", 0, "--out", out)
    assert mt.Placement.load(out) == placement


def test_maps_and_distributions_of_others(data):
    """TensorRT-LLM's maps are placements; SGLang's distributions are loads, or nothing."""
    for devices, name in ((4, "prefill-ep4"), (16, "decode-ep16")):
        path = data / "maps" / f"trtllm-deepseek-v4-{name}.yaml"
        assert mt.read_placement(path, devices=devices).slots_per_device * devices == 384
    degenerate = mt.open_input(data / "maps" / "sglang-degenerate.pt")
    assert degenerate.left_out == (61, (0, 1, 2))
    assert "16 of 256 experts take" in list_warnings(degenerate)[0]
    with pytest.raises(ValueError, match="every count is zero"):
        mt.open_input(data / "maps" / "sglang-all-zero.pt")
