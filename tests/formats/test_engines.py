"""What engines do, as settings of a problem: they can load what comes out, with full slots."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner.formats import WRITERS, write_placement
from moetuner.formats.layout import check_placement
from moetuner.serving.engines import ENGINES

STATISTICS = mt.RoutingStatistics.from_load(np.random.default_rng(0).integers(1, 99, (2, 3, 12)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["joint", "eplb", "contiguous"])
def test_an_engine_can_load_it(tmp_path, engine, method):
    """Placements of problems with an engine's settings break none of its constraints."""
    spare = {"slots_per_device": 4} if ENGINES[engine].may_copy else {}
    topology = mt.Topology(ENGINES[engine].devices or 4)
    actual = mt.engine_settings(engine, STATISTICS, topology, **spare)
    problem = mt.Problem(STATISTICS, topology, objective="balance", **actual)
    result = mt.solve(problem, method, iterations=200)
    check_placement(result.placement, engine)
    for name, writer in WRITERS.items():
        if writer.engine == engine:
            path = tmp_path / f"map{writer.suffixes[0]}"
            write_placement(result.placement, name, path, dense_layers=())


def test_facts():
    """The regime of all; the splits that engines have."""
    splits = {"vllm": "even", "sglang": "nearest", "tensorrt-llm": "round_robin"}
    for engine in ENGINES:
        devices = ENGINES[engine].devices or 4
        actual = mt.engine_settings(engine, STATISTICS, mt.Topology(devices))
        assert actual["regime"] == "dispatch"
        assert actual["split"] == splits.get(engine, "even")
        serves = engine not in ("megatron", "deepspeed", "transformers")
        assert actual["arrival"] == ("mixed" if serves else "bursts")
        assert actual["fill_slots"] is (serves and engine != "memra")
        assert actual["slots_per_device"] == 12 // devices


def test_slots_over_all_layers():
    """As many as make equal slots are taken as those."""
    actual = mt.engine_settings("vllm", STATISTICS, mt.Topology(4), extra_slots=12)
    assert actual["slots_per_device"] == 4
    topology = mt.Topology(4, slots_per_device=[5, 5, 5, 5])
    assert mt.engine_settings("vllm", STATISTICS, topology)["slots_per_device"] == 5


def test_groups_of_the_router():
    """They stay whole where experts are renumbered, and are nobody's business elsewhere."""
    topology = mt.Topology(4)
    actual = mt.engine_settings("megatron", STATISTICS, topology, router_groups=2)
    result = mt.solve(mt.Problem(STATISTICS, topology, objective="balance", **actual))
    assert np.array_equal(result.placement.device_of // 2, np.tile(np.arange(12) // 6, (3, 1)))
    assert "forbidden" not in mt.engine_settings("vllm", STATISTICS, topology, router_groups=2)


@given(st.data())
def test_filled_placements_add_copies_and_nothing_else(data):
    """Placement itself refuses two copies of an expert on a device; what was there stays."""
    experts, devices = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 4))
    slots = data.draw(st.integers(-(-experts // devices), experts))
    seed = data.draw(st.integers(0, 99))
    device_of = np.arange(experts)[None] % devices
    before = mt.Placement.from_assignment(device_of, devices, slots_per_device=slots)
    load = np.random.default_rng(seed).integers(0, 9, (1, experts))
    for after in (before.filled(), before.filled(load)):
        assert (after.slots >= 0).all()
        assert (after.held >= before.held).all()
        assert after == after.filled()


def test_experts_without_tokens_come_first():
    """Their copies change nothing."""
    placement = mt.Placement([[[0, 1, -1], [2, 3, -1]]])
    assert placement.filled([[5, 0, 7, 0]]).slots.tolist() == [[[0, 1, 3], [2, 3, 1]]]


def test_a_map_is_filled_by_the_loads_that_solve_knew(tmp_path):
    """What fills a map of an engine costs little, though nobody passes loads to the export."""
    random = np.random.default_rng(3)
    load = random.poisson(random.lognormal(4, 1.2, (2, 32)), (8, 2, 32))
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(4),
        slots_per_device=11,
        cost_model=mt.CostModel.preset("h100"),
        objective="time",
    )
    found = mt.solve(problem, effort="brief").placement
    assert (found.slots < 0).any()
    found.save(tmp_path / "placement.json")
    stored = mt.Placement.load(tmp_path / "placement.json")
    assert stored.filled() == found.filled(load.sum(axis=0))
    write_placement(stored, "eplb", tmp_path / "map.npz")
    assert mt.read_placement(tmp_path / "map.npz", devices=4) == stored.filled()
    without = mt.Placement(found.slots).filled()
    empty, full, blind = (problem.value(each) for each in (found, stored.filled(), without))
    assert empty < full < 0.95 * blind


def test_a_running_placement_fills_slots_without_moves():
    """What is there already comes before what has few tokens."""
    statistics = mt.RoutingStatistics(np.array([[[9, 1, 5, 5]]]))
    problem = mt.Problem(
        statistics, mt.Topology(2), slots_per_device=3, objective="balance", fill_slots=True
    )
    running = mt.Placement([[[0, 1, 2], [2, 3, 0]]])
    slots = np.array([[[0, 1, -1], [2, 3, -1]]], dtype=np.int32)
    assert problem.filled(slots, running).tolist() == [[[0, 1, 2], [2, 3, 0]]]


def test_export_fills_what_engines_have_no_word_for(run, tmp_path):
    """And its JSON has how many slots it filled."""
    placement, out, report = (tmp_path / name for name in ("p.json", "e.npz", "r.json"))
    mt.Placement([[[0, 1], [2, -1]], [[0, 2], [1, -1]]]).save(placement)
    assert run("export", placement, "--to", "eplb", "--out", out, "--json", report)[0] == 0
    assert json.loads(report.read_text())["filled_slots"] == 2
    with np.load(out) as arrays:
        assert arrays["physical_to_logical_map"].tolist() == [[0, 1, 2, 0], [0, 2, 1, 0]]
