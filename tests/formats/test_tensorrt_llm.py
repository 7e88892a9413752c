"""TensorRT-LLM: counts and choices of all ranks, slots or experts, and the balancer's YAML."""

from functools import partial

import numpy as np
import pytest
from engines_files import write_tensorrt as dump
from engines_files import write_tensorrt_about
from make import random_ids
from placements import full_slots

import moetuner as mt
from moetuner.files.opened import Opened
from moetuner.formats import find_reader, read_input, tensorrt_llm
from moetuner.formats.hints import Hints

EXPERTS, LAYERS = 6, (3, 4)
meta = partial(write_tensorrt_about, experts=EXPERTS)


def test_counts(tmp_path):
    """Iterations are windows; ranks are added; layers count MoE layers, so they are not dense."""
    load = np.random.default_rng(0).integers(0, 50, (2, 3, 2, EXPERTS))
    for rank in range(2):
        entries = {(10 + i, n): load[rank, i, at] for i in range(3) for at, n in enumerate(LAYERS)}
        dump(tmp_path, rank, entries)
    meta(tmp_path)
    files = sorted(tmp_path.glob("rank*.safetensors"))
    assert [find_reader(file) for file in (tmp_path, *files)] == ["tensorrt-llm"] * 3
    for source in (tmp_path, files):
        assert np.array_equal(mt.open_input(source).window_load, load.sum(axis=0))
    with pytest.raises(ValueError, match="layer 3 must be dense as dense_layers says"):
        mt.open_input(tmp_path, dense_layers=[3])


def test_what_stands_beside_counts_says_the_experts_of_a_token(tmp_path):
    """Counts and what is saved of them know it, so that no option has to say it."""
    for rank in range(2):
        dump(tmp_path, rank, {(0, 3): np.full(EXPERTS, 50)})
    meta(tmp_path, top_k=3)
    mt.open_input(tmp_path).save(tmp_path / "load.safetensors")
    for source in (tmp_path, tmp_path / "load.safetensors"):
        assert mt.open_input(source).top_k == 3
    assert mt.open_input([tmp_path, tmp_path / "load.safetensors"]).top_k == 3


def test_choices(tmp_path):
    """Raw dumps are a trace, and come before counts."""
    ids = random_ids(12, 2, 2, EXPERTS, dtype=np.int32)
    cuts = {(0, 0): slice(0, 3), (0, 1): slice(3, 7), (1, 0): slice(7, 9), (1, 1): slice(9, 12)}
    for rank in range(2):
        entries = {
            (i, layer): np.ascontiguousarray(ids[of, at])
            for (i, r), of in cuts.items()
            if r == rank
            for at, layer in enumerate(LAYERS)
        }
        dump(tmp_path, rank, entries, raw=True)
        dump(tmp_path, rank, {(0, 3): np.zeros(EXPERTS, np.int64)})
    meta(tmp_path)
    actual = mt.open_input(tmp_path)
    assert np.array_equal(actual.expert_ids, ids)
    assert actual.sequence.tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] * 3
    assert actual.group.tolist() == [0] * 3 + [1] * 4 + [0] * 2 + [1] * 3


def test_slots_are_translated(tmp_path):
    """With the balancer on slots are counted; the placement that ran says whose they are."""
    running = np.array([[0, 1, 2, 0], [2, 1, 0, 1]])
    load = np.arange(8).reshape(2, 4)
    dump(tmp_path, 0, {(0, 3): load[0], (0, 4): load[1]})
    meta(tmp_path, experts=4)
    with pytest.raises(ValueError, match="the load balancer was on, so slots are counted"):
        mt.open_input(tmp_path, num_experts=3)
    actual = read_input([tmp_path], Hints(num_experts=3, running=running))
    assert actual.window_load.tolist() == [[[0 + 3, 1, 2], [6, 5 + 7, 4]]]
    ids = np.array([[0, 2], [3, 1], [1, 2]], dtype=np.int32)
    dump(tmp_path, 0, {(0, 3): ids, (0, 4): ids[::-1].copy() % 3}, raw=True)
    trace = read_input([tmp_path], Hints(running=running))
    assert trace.expert_ids[:, 0].tolist() == [[0, 2], [0, 1], [1, 2]]
    assert trace.expert_ids[:, 1].tolist() == [[1, 0], [2, 1], [2, 0]]
    wider = np.array([[0, 1, 2, 2, 0, 1]] * 2)
    with pytest.raises(ValueError, match="counts 2x4 layers and slots, but the"):
        read_input([tmp_path], Hints(running=wider))


def test_maps_are_those_of_pyyaml(tmp_path):
    """PyYAML reads what is written, with the keys of the engine, and what it writes is read."""
    yaml = pytest.importorskip("yaml")
    slots, experts = full_slots(3)
    placement = mt.Placement(slots, num_experts=experts)
    path, hints = tmp_path / "map.yaml", Hints(dense_layers=(0, 3), devices=placement.devices)
    tensorrt_llm.write_map(placement, path, hints)
    numbers = [n for n in range(placement.layers + 2) if n not in (0, 3)][: placement.layers]
    assert tensorrt_llm.read_map(Opened(path), hints).layers == tuple(numbers)
    fields = yaml.safe_load(path.read_text())
    rows = placement.slots.reshape(placement.layers, -1).tolist()
    assert fields == {
        "num_slots": len(rows[0]),
        "initial_global_assignments": dict(zip(numbers, rows, strict=True)),
        "layer_updates_per_iter": 0,
    }
    for flow in (None, False):
        path.write_text(yaml.dump(fields, default_flow_style=flow))
        assert tensorrt_llm.read_map(Opened(path), hints).placement(hints) == placement


def test_convert_with_the_map_that_ran(tmp_path, run):
    """The command line takes the engine's own YAML to translate slots."""
    running, out = tmp_path / "map.yaml", tmp_path / "load.safetensors"
    placement = mt.Placement([[[0, 1], [2, 0]], [[2, 1], [0, 1]]], num_experts=3)
    tensorrt_llm.write_map(placement, running, Hints(dense_layers=(0, 1, 2)))
    dump(tmp_path, 0, {(0, 3): np.arange(4), (0, 4): np.arange(4, 8)})
    meta(tmp_path, experts=4)
    assert run("convert", tmp_path, "--running", running, "--out", out)[0] == 0
    assert mt.RoutingStatistics.load(out).window_load.tolist() == [[[3, 1, 2], [6, 12, 4]]]
