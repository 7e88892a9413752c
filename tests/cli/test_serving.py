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


def test_solve_predicts_the_time_that_evaluate_predicts(as_json, trace, tmp_path):
    """It is the replayed one; inspect has that of blocks."""
    how, p = ("--devices", 4, "--window", 128, "--for", "vllm"), tmp_path / "p.json"
    solved = as_json("solve", trace, *how, "--out", p)["predicted_layer_us"]
    assert as_json("evaluate", p, trace, *how)["predicted_layer_us"] == solved
    blocks = as_json("solve", trace, *how, "--method", "contiguous", "--out", p)
    actual = as_json("inspect", trace, *how)["contiguous"]
    assert actual["predicted_layer_us"] == pytest.approx(blocks["predicted_layer_us"], rel=1e-12)
    assert "contiguous" not in as_json("inspect", trace)


def test_counts_are_evaluated_as_recorded(as_json, tmp_path):
    """A load table has the windows that it has; --arrival changes none of them."""
    load = np.random.default_rng(0).integers(0, 100, (40, 2, 16))
    np.savez(tmp_path / "load.npz", load=load)
    blocks(2, 16, 4).save(tmp_path / "p.json")
    arguments = ("evaluate", tmp_path / "p.json", tmp_path / "load.npz")
    mixed, plain = (as_json(*arguments, *how) for how in (("--arrival", "mixed"), ()))
    for figure in ("imbalance", "predicted_layer_us", "predicted_layer_us_p95"):
        assert mixed[figure] == plain[figure]


def test_an_engines_map_is_judged_as_that_engine_serves(as_json, ok, trace, tmp_path):
    """The map alone says as much as the placement that it was exported from; options win."""
    placed, exported = tmp_path / "p.json", tmp_path / "map.json"
    ok("solve", trace, "--devices", 4, "--for", "sglang", "--window", 128, "--out", placed)
    ok("export", placed, "--to", "sglang", "--dense-layers", "none", "--out", exported)
    judged = (trace, "--devices", 4, "--window", 128)
    names = ("engine", "regime", "split", "arrival")

    def served(file, *options):
        settings = as_json("evaluate", file, *judged, *options)["settings"]
        return [settings[name] for name in names]

    assert served(exported) == ["sglang", "dispatch", "nearest", "mixed"] == served(placed)
    assert served(exported, "--for", "vllm") == ["vllm", "dispatch", "even", "mixed"]
    assert served(exported, "--arrival", "bursts")[-1] == "bursts"


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


def test_compare_is_over_what_runs(as_json, ok, trace, tmp_path):
    """Over contiguous, which is a row though nobody names it, or over a placement that runs."""
    p, words = tmp_path / "p.json", ("compare", trace, "--devices", 4, "--methods", "lpt,eplb")
    words = (*words, "--splits", 2, "--window", 128)
    ok("solve", trace, "--devices", 4, "--method", "lpt", "--out", p, "--window", 128)
    plain, running = as_json(*words), as_json(*words, "--initial", p)
    assert list(plain["methods"]) == ["contiguous", "lpt", "eplb"]
    assert list(running["methods"]) == ["running", "lpt", "eplb"]
    for of, over in ((plain, "contiguous"), (running, "running")):
        assert {of["methods"][name]["gain"]["names"][0] for name in ("lpt", "eplb")} == {over}
        before = of["methods"]["eplb"]["gain"]["before"]
        assert before == of["methods"][over]["predicted_layer_us"]


def test_an_engine_has_no_order_for_counts(as_json, tmp_path):
    """Windows of a table are searched as they were recorded, as they are judged."""
    np.savez(tmp_path / "load.npz", load=np.random.default_rng(0).integers(0, 99, (40, 2, 16)))
    words = ("solve", tmp_path / "load.npz", "--devices", 4, "--method", "quick", "--out")
    own = as_json(*words, tmp_path / "a.json", "--for", "sglang")
    assert own["settings"]["arrival"] == "bursts"
    given = as_json(*words, tmp_path / "b.json", "--for", "sglang", "--arrival", "bursts")
    assert own["predicted_layer_us"] == given["predicted_layer_us"]
    mixed = as_json(*words, tmp_path / "d.json", "--for", "sglang", "--arrival", "mixed")
    assert mixed["settings"]["arrival"] == "mixed"


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
