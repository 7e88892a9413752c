"""One number: every command tells the same gain of the same placement, and says what it is of."""

import json
import re

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner.serving.engines import ENGINES
from moetuner.serving.phases import PREFILL_SHARE

# What is left to a command line, by engine: those that --for decides, and an option against it.
HOW = {
    "vllm": ("--for", "vllm"),
    "sglang": ("--for", "sglang", "--arrival", 0.5),
    "none": ("--cost-model", "a100:512x256"),
}
# Method, engine or none, regime, and whether there are copies.
CASES = [
    ("eplb", "vllm", "follow", 0),
    ("eplb", "sglang", "dispatch", 1),
    ("eplb", "none", "dispatch", 0),
    ("eplb", "none", "follow", 1),
    ("joint", "vllm", "dispatch", 1),
    ("joint", "none", "follow", 0),
    *(("eplb", engine, "dispatch", 0) for engine in ENGINES if engine not in HOW),
]


@pytest.fixture
def trace(make_trace, brief, tmp_path):
    """File of a small trace of sixteen experts."""
    make_trace(600, layers=2, experts=16).save(tmp_path / "trace.safetensors")
    return tmp_path / "trace.safetensors"


@pytest.mark.parametrize(("method", "engine", "regime", "copies"), CASES)
def test_every_command_tells_the_same_gain(
    as_json, trace, tmp_path, method, engine, regime, copies
):
    """What solve was told is in the placement, so that the others need no options for it."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    p, page = tmp_path / "p.json", tmp_path / "page.html"
    devices = ENGINES[engine].devices if engine in ENGINES else None
    how = ("--devices", devices or 4, "--devices-per-node", 2, "--window", 50, "--regime", regime)
    how = (
        *how,
        *HOW.get(engine, ("--for", engine)),
        *(("--slots-per-device", 4 + copies) * bool(copies)),
    )
    again = () if copies else how  # options that repeat the settings change nothing
    how = (*how, "--seed", 3)
    solved = as_json("solve", trace, *how, "--method", method, "--holdout", 0.5, "--out", p)
    judging = {"groups": ("--by-group",), "evaluate": ()}
    if engine == "none":
        # A page is of the same judgement, whatever the engine.
        judging["page"] = ("--report", page)
    actual = {name: as_json("evaluate", p, trace, *more, *again) for name, more in judging.items()}
    methods = ("--methods", f"contiguous,{method}", "--splits", 1)
    compared = as_json("compare", trace, *how, *methods)["methods"][method]
    names, wanted = ("before", "after", "gain", "low", "high"), solved["gain"]
    assert wanted["measure"] == "predicted_layer_us"
    for gain in (compared["gain"], *(of["gain"] for of in actual.values())):
        assert [gain[of] for of in names] == pytest.approx([wanted[of] for of in names], rel=1e-9)
    times = [of["predicted_layer_us"] for of in (solved, actual["evaluate"], compared)]
    assert times == pytest.approx([wanted["after"]] * 3, rel=1e-9)
    for of in actual.values():
        assert of["judged_on"] == {**solved["judged_on"], "holdout": 0.5}
        assert of["judged_on"]["part"] == "unseen"


@pytest.mark.parametrize("share", [None, 0.2])
def test_both_phases_have_the_same_gain_everywhere(as_json, tmp_path, share):
    """What solve tells of windows of decode and prefill is what evaluate and compare tell."""
    trace, p = tmp_path / "trace.safetensors", tmp_path / "p.json"
    ids, sequence = random_ids(40_000, 1, 2, 8), np.arange(40_000) // 200
    trace_of(ids, sequence=sequence).save(trace)
    how = ("--devices", 4, *(("--prefill-share", share) if share else ()))
    solved = as_json("solve", trace, *how, "--method", "lpt", "--holdout", 0.5, "--out", p)
    prefill = share or PREFILL_SHARE
    weighed = {"512": 1 - prefill, "8192": prefill}
    assert solved["settings"]["phases"] == mt.Placement.load(p).settings["phases"] == weighed
    methods = ("--methods", "contiguous,lpt", "--splits", 1)
    compared = as_json("compare", trace, *how, *methods)["methods"]["lpt"]
    assert [gain["window"] for gain in solved["gains"]] == [512, 8192]
    for gain, other in zip(solved["gains"], compared["gains"], strict=True):
        judged = as_json("evaluate", p, trace, "--window", gain["window"])["gain"]
        for of in (judged, other):
            assert [of[name] for name in ("before", "after", "gain")] == pytest.approx(
                [gain[name] for name in ("before", "after", "gain")], rel=1e-9
            )


def test_a_scaled_table_is_judged_as_it_was_scaled(as_json, tmp_path):
    """Model and tokens per step of solve are defaults; another model's times are that model's."""
    table, p = tmp_path / "table.npz", tmp_path / "p.json"
    np.savez(table, load=np.random.default_rng(0).poisson(500, (40, 2, 8)) * np.arange(1, 9))
    how = ("--devices", 4, "--top-k", 2, "--tokens-per-step", 64, "--model", "mixtral-8x7b")
    solved = as_json("solve", table, *how, "--holdout", 0.5, "--method", "lpt", "--out", p)
    judged = as_json("evaluate", p, table)
    assert judged["gain"]["after"] == pytest.approx(solved["gain"]["after"], rel=1e-9)
    assert judged["judged_on"] == {**solved["judged_on"], "holdout": 0.5}
    assert as_json("drift", p, table)["answer"] == "not left"
    other = as_json("evaluate", p, table, "--model", "grok-1")["settings"]["cost_model"]
    assert "grok-1" in other["name"] != judged["settings"]["cost_model"]["name"]


def test_what_a_placement_was_judged_on_is_found_by_its_fingerprint(
    as_json, ok, trace, make_trace, tmp_path
):
    """The held-out part, all of other traffic, or what it was computed from."""
    p, other = tmp_path / "p.json", tmp_path / "other.safetensors"
    make_trace(600, layers=2, experts=16, seed=1).save(other)
    how = ("solve", trace, "--devices", 4, "--method", "lpt", "--out", p)

    def parts():
        judged = [as_json("evaluate", p, file)["judged_on"] for file in (trace, other)]
        return [(of["part"], of["is_seen"]) for of in judged]

    ok(*how, "--holdout", 0.5)
    assert parts() == [("unseen", False), ("all", False)]
    ok(*how)
    assert parts() == [("all", True), ("all", False)]
    again = p.read_bytes()
    ok(*how)
    assert again == p.read_bytes()
    # Files of older versions say nothing of all this, and are judged as they were.
    mt.Placement.load(p).with_names(settings={}).save(p)
    assert parts() == [("all", None)] * 2


def test_inspect_reads_what_solve_wrote(as_json, ok, run, trace, tmp_path):
    """The settings, and moves with their bytes."""
    a, b = (tmp_path / name for name in ("a.json", "b.json"))
    how = ("solve", trace, "--devices", 4, "--devices-per-node", 2, "--slots-per-device", 5)
    ok(*how, "--for", "vllm", "--method", "eplb", "--holdout", 0.5, "--out", a)
    ok(*how, "--method", "lpt", "--out", b)
    placed = [mt.Placement.load(path) for path in (a, b)]
    assert as_json("inspect", a)["settings"] == placed[0].settings
    diff = placed[0].diff(placed[1], topology=mt.Topology(4, 2), expert_bytes=10)
    actual = as_json("inspect", a, b, "--expert-bytes", 10)
    assert {name: actual[name] for name in diff.to_dict()} == diff.to_dict()


def test_a_number_has_the_same_digits_in_every_command(as_json, ok, trace, tmp_path):
    """Objectives of solve and inspect, times and imbalance of all and of groups, are one text."""
    p = tmp_path / "p.json"
    words = ("--devices", 4, "--slots-per-device", 8, "--survive", "device", "--out", p)
    solved = ok("solve", trace, *words)
    objective = solved.partition("Objective: ")[2].partition(",")[0]
    assert objective.endswith(" us per layer")
    assert f"Objective {objective}" in ok("inspect", p)
    figures, audited = (
        as_json("evaluate", p, trace),
        ok("evaluate", p, trace, "--by-group").splitlines(),
    )
    for title, text in (
        ("imbalance", f"{figures['imbalance']:.3f}"),
        ("layer us", f"{figures['predicted_layer_us']:,.1f}"),
    ):
        (line,) = (number for number, line in enumerate(audited) if line.startswith(f"{title} "))
        assert audited[line + 1].split()[2] == text


OTHER_TYPES = ("", "x", -1, 1.5, [], [5], ["x"], {}, {"a": 1})


@pytest.mark.parametrize(
    "command",
    ["inspect FILE", "drift FILE TRACE", "evaluate FILE TRACE --by-group"],
)
def test_settings_of_another_type_are_one_line(run, make_trace, tmp_path, command):
    """Each setting of a placement's file as each type: taken, or one line that names the file.

    Every command reads the same settings, so that only one tries all types with each of them.
    """
    make_trace(20).save(trace := tmp_path / "trace.safetensors")
    path = tmp_path / "placement.json"
    how = ("--method", "lpt", "--for", "vllm", "--holdout", 0.5, "--out", path)
    assert run("solve", trace, "--devices", 2, *how)[0] == 0
    values = json.loads(path.read_text())
    settings, recorded = values["settings"], values["settings"]["input"]
    recorded |= {"tokens": 20, "windows": 1, "tokens_per_step": 5, "top_k": 2, "model": "small"}
    names = {"FILE": path, "TRACE": trace}
    words = [names.get(word, word) for word in command.split()]
    for holder in (settings, recorded):
        for number, (name, value) in enumerate([*holder.items()]):
            for other in OTHER_TYPES if command == "inspect FILE" else OTHER_TYPES[number % 9 :: 9]:
                holder[name] = other
                path.write_text(json.dumps(values))
                status, out, err = run(*words)
                why = f"{name} {other!r}: {err}"
                assert "this is a bug" not in err, why
                if status:
                    assert (status, out) == (2, ""), why
                    assert re.fullmatch(r"moetuner: error: [^\n]+\n", err), why
            holder[name] = value


@pytest.mark.parametrize(("objective", "cap"), [("traffic", 1.05), ("balance", None)])
def test_solve_and_advice_have_the_same_load_cap(as_json, trace, tmp_path, objective, cap):
    """Without --max-imbalance both have the cap of the goal."""
    how = ("--devices", 4, "--objective", objective)
    solved = as_json("solve", trace, *how, "--method", "lpt", "--out", tmp_path / "p.json")
    assert solved["settings"]["max_imbalance"] == cap
    traffic = mt.RoutingTrace.load(trace)
    advice = mt.advise(traffic, mt.Topology(4), objective=objective, copies=(0,), splits=1)
    assert advice.problem.max_imbalance == cap
