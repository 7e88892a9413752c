"""Slots that would stay empty are filled for engines, where it changes least."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt


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
    """And says how many slots it filled."""
    placement, out, report = (tmp_path / name for name in ("p.json", "e.npz", "r.json"))
    mt.Placement([[[0, 1], [2, -1]], [[0, 2], [1, -1]]]).save(placement)
    status, text, err = run("export", placement, "--to", "eplb", "--out", out, "--json", report)
    assert (status, err) == (0, "")
    assert "filled 2 empty slots of 8" in text
    assert json.loads(report.read_text())["filled_slots"] == 2
    with np.load(out) as arrays:
        assert arrays["physical_to_logical_map"].tolist() == [[0, 1, 2, 0], [0, 2, 1, 0]]


def test_solve_fills_slots_on_the_command_line(run, make_trace, tmp_path):
    """What it writes needs no filling any more."""
    trace, out = tmp_path / "t.safetensors", tmp_path / "p.json"
    make_trace().save(trace)
    options = ("--devices", 3, "--fill-slots", "--max-imbalance", "1.5", "--out", out)
    assert run("solve", trace, *options, "--method", "heuristic")[0] == 0
    assert (mt.Placement.load(out).slots >= 0).all()
