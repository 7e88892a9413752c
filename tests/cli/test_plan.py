"""``moetuner plan`` and ``evaluate --without``: what a stranger sees when a device is lost."""

import json
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.evaluation.losses import compute_imbalances_after_loss
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
    tiers = [{"devices": n, "bandwidth": 9e9 / n} for n in (1, 2, 4)]
    Path("nested.json").write_text(json.dumps({"devices": 4, "tiers": tiers}))
    return running, load.sum(axis=0)


def test_traffic_is_replayed_on_what_is_left(ok, as_json, files):
    """The load of every device is what the formula says of an even split."""
    _, load = files
    ok("solve", "load.npz", "--devices", DEVICES, "--slots-per-device", WIDTH, "--survive",
       "device", "--method", "quick", "--out", "two.json")  # fmt: skip
    placement = mt.Placement.load("two.json")
    for lost in range(DEVICES):
        answer = as_json("evaluate", "two.json", "load.npz", "--without", lost)
        after, _ = compute_imbalances_after_loss(placement, load, mt.Topology(DEVICES), "device")
        assert answer["imbalance_total"] == pytest.approx(after[lost].mean())
        assert answer["settings"]["without"] == [lost]


def test_bytes_are_of_the_placements_model(as_json, files):
    """Counts of an engine name no model; the placement that runs does, as it says to inspect."""
    running, _ = files
    settings = {"input": {"model": "deepseek-v3", "weight_bits": 16}}
    for name in ("running.json", "other.json"):
        running.with_names(model="deepseek-v3", settings=settings).save(name)
    planned = as_json("plan", "running.json", "load.npz", "--without", 1)
    assert planned["expert_bytes"] == 2 * 3 * 7168 * 2048
    plain = as_json("inspect", "running.json", "other.json")
    assert planned["expert_bytes"] == plain["expert_bytes"]


def test_a_file_of_plan_serves_as_what_ran(ok, as_json, files):
    """It carries machine, engine and windows, and drift solves with no plan."""
    ok("solve", "load.npz", "--devices", 4, "--devices-per-node", 2, "--for", "sglang",
       "--slots-per-device", 5, "--method", "eplb", "--out", "solved.json")  # fmt: skip
    ok("plan", "solved.json", "load.npz", "--without", 3, "--with", 1, "--out", "left.json")
    served = {
        name: as_json("evaluate", name, "load.npz")["settings"]
        for name in ("solved.json", "left.json")
    }
    assert served["left.json"] == served["solved.json"]
    assert served["left.json"]["devices_per_node"] == 2
    again = as_json("drift", "left.json", "load.npz", "--profile", "load.npz")["command"]
    assert "--method" not in again
    assert "--for sglang" in again


def test_the_last_tokens_of_a_trace_are_in_no_figure(make_trace):
    """Those that fill no window count where copies go, as all do, and in no mean of windows."""
    trace = make_trace(1300, experts=8)
    running = mt.Placement.from_assignment([np.arange(8) // 2] * 3, 4, slots_per_device=3)
    whole, cut = mt.plan(running, trace, without=[3]), trace.take(np.arange(1024))
    counts = mt.RoutingStatistics.from_trace(cut, window=512)
    even = mt.evaluate(whole.placement, counts, mixed=False).imbalance
    assert whole.imbalance_after == pytest.approx(even)


def test_more_moves_are_for_single_windows(files):
    """Where copies may move, what is even in sum but not in windows is not taken for even."""
    load = np.zeros((8, 1, 16))
    load[::2, :, :8] = load[1::2, :, 8:] = 100.0
    running = mt.Placement.from_assignment([np.arange(16) // 4], 4, slots_per_device=6)
    plan = mt.plan(running, mt.RoutingStatistics.from_load(load), without=[3], more_copies=40)
    assert plan.imbalance_after < 1.35


@pytest.mark.parametrize("start", ["contiguous", "round_robin", "eplb:12"])
def test_a_baseline_may_be_what_engines_begin_with(as_json, files, start):
    """As --initial takes it, whatever is shown of the judgement."""
    gains = [
        as_json("evaluate", "running.json", "load.npz", "--baseline", start, *more)["gain"]["gain"]
        for more in ((), ("--by-group",))
    ]
    assert gains[0] == pytest.approx(gains[1])


def test_later_commands_know_what_is_left_of_nodes(ok, as_json, files):
    """The file of a plan has the sizes of nodes; what is printed names them as an option."""
    ok("solve", "load.npz", "--devices", 4, "--devices-per-node", 2, "--slots-per-device", 6,
       "--method", "eplb", "--out", "solved.json")  # fmt: skip
    ok("plan", "solved.json", "load.npz", "--without", 1, "--out", "left.json")
    evaluated = as_json("evaluate", "left.json", "load.npz")
    assert evaluated["settings"]["devices_per_node"] == [1, 2]
    without = as_json("evaluate", "solved.json", "load.npz", "--without", 1)
    assert without["settings"]["devices_per_node"] == [1, 2]
    again = as_json("drift", "left.json", "load.npz", "--profile", "load.npz")["command"]
    assert "--devices-per-node 1,2" in again
    ok("solve", "load.npz", "--devices", 3, "--devices-per-node", "1,2", "--method", "eplb")


def test_fast_links_that_are_lost_are_said_to_be(ok, files):
    """Nodes of a machine of three tiers are of equal size, so a loss leaves the slow links."""
    ok("solve", "load.npz", "--topology", "nested.json", "--slots-per-device", 6,
       "--method", "eplb", "--out", "solved.json")  # fmt: skip
    lost = ("load.npz", "--without", 1)
    assert "slow links" in ok("plan", "solved.json", *lost)
    assert "slow links" in ok("evaluate", "solved.json", *lost)
    assert "slow links" not in ok("evaluate", "solved.json", "load.npz")
