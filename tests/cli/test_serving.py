"""What one command names under options, the others repeat under the same options."""

import numpy as np
import pytest

import moetuner as mt
from moetuner.cli import moetuner
from moetuner.files.cells import distinct
from moetuner.placement import blocks

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

SERVING = ("--for", "--cost-model", "--regime", "--split", "--arrival")


@pytest.fixture
def trace(make_trace, tmp_path):
    """File of a trace whose windows in mixed order differ from those recorded."""
    make_trace(1200, experts=16).save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


def test_counts_are_evaluated_as_recorded(as_json, tmp_path):
    """A load table has the windows that it has; --arrival changes none of them."""
    load = np.random.default_rng(0).integers(0, 100, (40, 2, 16))
    np.savez(tmp_path / "load.npz", load=load)
    blocks(2, 16, 4).save(tmp_path / "p.json")
    arguments = ("evaluate", tmp_path / "p.json", tmp_path / "load.npz")
    mixed, plain = (as_json(*arguments, *how) for how in (("--arrival", "mixed"), ()))
    for figure in ("imbalance", "predicted_layer_us", "predicted_layer_us_p95"):
        assert mixed[figure] == plain[figure]


@pytest.mark.parametrize("command", ["compare", "advise", "evaluate", "inspect"])
def test_serving_is_said_alike_everywhere(command):
    """Options that say how traffic is served are the same objects in all commands."""
    mine, wanted = (
        {item.opts[-1]: item.to_info_dict() for item in moetuner.commands[name].params}
        for name in (command, "solve")
    )
    assert {name: mine[name] for name in SERVING} == {name: wanted[name] for name in SERVING}


@pytest.mark.parametrize("by", [1.0, 1e-1, 1e-3, 1e-6, 0.0])
def test_times_that_differ_are_written_apart(by):
    """A warning that one time is longer shows by what, however little; equal ones are alike."""
    one, other = distinct(62.24 + by, 62.24, 1)
    assert (float(one) > float(other)) == (by > 0)
    assert len(one) == len(other) <= 4 + max(0, round(-np.log10(by or 1)))


def test_solve_starts_from_what_engines_begin_with(as_json, trace, tmp_path):
    """EPLB's placement with redundant experts is that of method eplb in as many slots."""
    out, running = tmp_path / "p.json", tmp_path / "running.json"
    words = ("solve", trace, "--devices", 4, "--slots-per-device", 5, "--time-limit", 0.05)
    as_json(*words, "--method", "eplb", "--out", running)
    moves = [
        as_json(*words, "--move-budget", 0, "--initial", initial, "--out", out)["moves"]
        for initial in ("eplb:4", running)
    ]
    assert mt.Placement.load(out) == mt.Placement.load(running)
    assert moves[0] == moves[1]


def test_what_was_held_out_is_found_where_windows_are_divided(as_json, trace, tmp_path):
    """It is held out of what was recorded, however that is counted then."""
    how = ("--devices", 4, "--slots-per-device", 6, "--split", "lp", "--objective", "balance")
    solved = as_json("solve", trace, *how, "--holdout", 0.5, "--out", tmp_path / "p.json")
    judged = as_json("evaluate", tmp_path / "p.json", trace)
    assert judged["judged_on"]["part"] == "unseen"
    assert judged["imbalance"] == pytest.approx(solved["imbalance"])


def test_solve_takes_machine_and_engine_of_the_running_placement(ok, run, tmp_path, monkeypatch):
    """Options go before the file of --initial; slots are those of its engine."""
    monkeypatch.chdir(tmp_path)
    np.savez("loads.npz", load=np.random.default_rng(0).poisson(50, (20, 2, 8)))
    machine = ("--devices", 4, "--devices-per-node", 2)
    ok("solve", "loads.npz", *machine, "--for", "vllm", "--slots-per-device", 3, "--out", "a.json")
    made = {}
    for name, options in {
        "same": (),
        "engine": ("--for", "sglang"),
        "nodes": ("--devices", 4, "--devices-per-node", 4),
        "slots": ("--slots-per-device", 4),
    }.items():
        ok("solve", "loads.npz", "--initial", "a.json", *options, "--out", f"{name}.json")
        placement = mt.Placement.load(f"{name}.json")
        per_node = placement.settings["topology"]["devices_per_node"]
        made[name] = (placement.settings["engine"], per_node, placement.slots_per_device)
        assert (placement.slots >= 0).all()
    assert made == {
        "same": ("vllm", 2, 3),
        "engine": ("sglang", 2, 3),
        "nodes": ("vllm", 4, 3),
        "slots": ("vllm", 2, 4),
    }
    assert "devices" in run("solve", "loads.npz", "--initial", "a.json", "--devices", 2)[2]
