"""``moetuner plan`` and ``evaluate --without``: what a stranger sees when a device is lost."""

import json
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.evaluation.losses import loads_after
from moetuner.plugins import rebalance_experts

LAYERS, EXPERTS, DEVICES, WIDTH = 3, 12, 4, 6


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write a load table, and a placement with two copies of each expert; return both values."""
    monkeypatch.chdir(tmp_path)
    load = np.random.default_rng(0).integers(1, 100, (6, LAYERS, EXPERTS))
    np.savez("load.npz", load=load)
    slots = rebalance_experts(load.sum(axis=0), DEVICES * WIDTH, None, 1, DEVICES)
    running = mt.Placement(slots.reshape(LAYERS, DEVICES, WIDTH))
    running.save("running.json")
    return running, load.sum(axis=0)


def test_a_loss_is_planned_and_written(ok, files):
    """The placement serves all experts on what is left, and the steps make it of what ran."""
    running, _ = files
    out = ok("plan", "running.json", "load.npz", "--without", 1, "--out", "left.json",
             "--steps", "steps.json")  # fmt: skip
    assert "device 1 lost: 3 devices serve" in out
    steps = json.loads(Path("steps.json").read_text())
    slots = running.slots.reshape(LAYERS, -1).copy()
    slots[:, WIDTH : 2 * WIDTH] = -1
    for layer, expert, _, device, slot, _ in steps["steps"]:
        slots[layer, device * WIDTH + slot] = expert
    assert slots.tolist() == steps["physical_to_logical_map"]
    left = np.delete(slots.reshape(LAYERS, DEVICES, WIDTH), 1, axis=1)
    assert np.array_equal(mt.Placement.load("left.json").slots, left)
    assert f"to move: {len(steps['steps'])} expert" in out


def test_a_table_has_a_plan_for_every_loss(ok, as_json, files):
    """By the number of the device, and each as the loss alone is planned."""
    ok("plan", "running.json", "load.npz", "--every-loss", "device", "--table", "losses.json")
    table = json.loads(Path("losses.json").read_text())
    assert [*table["losses"]] == [str(device) for device in range(DEVICES)]
    alone = as_json("plan", "running.json", "load.npz", "--without", 2)
    planned = table["losses"]["2"]
    assert planned == {name: alone[name] for name in planned}


def test_traffic_is_replayed_on_what_is_left(ok, as_json, files):
    """The load of every device is what the formula says of an even split."""
    _, load = files
    ok("solve", "load.npz", "--devices", DEVICES, "--slots-per-device", WIDTH, "--survive",
       "device", "--method", "quick", "--out", "two.json")  # fmt: skip
    placement = mt.Placement.load("two.json")
    for lost in range(DEVICES):
        answer = as_json("evaluate", "two.json", "load.npz", "--without", lost)
        after, _ = loads_after(placement, load, mt.Topology(DEVICES), "device")
        left = np.delete(after[lost], lost, axis=1)
        expected = (left.max(axis=1) / left.mean(axis=1)).mean()
        assert answer["imbalance_total"] == pytest.approx(expected)
        assert answer["settings"]["without"] == [lost]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("plan running.json load.npz", "Missing option '--without'"),
        ("plan running.json load.npz --without 4", "--without must be from 0 to 3, got 4"),
        ("plan running.json load.npz --without x", "device numbers and ranges of them"),
        ("plan running.json load.npz --without 0-2", "at least 2 devices of 6 slots, got 1"),
        ("plan running.json load.npz --retire 1 --every-loss device", "each loss by itself"),
        ("plan running.json load.npz --every-loss device", "'--every-loss' and '--table'"),
        ("plan running.json load.npz --every-loss node --table t.json", "no loss of a node"),
        ("evaluate running.json load.npz --without 0-3", "--without must leave"),
    ],
)
def test_what_makes_no_plan_is_one_line(run, files, arguments, line):
    """It says what was wrong, and what would be right."""
    status, _, errors = run(*arguments.split())
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert line in errors


def test_bytes_are_of_the_placements_model(as_json, files):
    """Counts of an engine name no model; the placement that runs does, as it says to diff."""
    running, _ = files
    settings = {"input": {"model": "deepseek-v3", "weight_bits": 16}}
    running.with_names(model="deepseek-v3", settings=settings).save("running.json")
    planned = as_json("plan", "running.json", "load.npz", "--without", 1)
    assert planned["expert_bytes"] == 2 * 3 * 7168 * 2048
    plain = as_json("diff", "running.json", "running.json")
    assert planned["expert_bytes"] == plain["expert_bytes"]
