"""The command line: what it prints, what it writes, and one line for everything that goes wrong."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from make import trace_of

import moetuner as mt
from moetuner.cli import MENU, moetuner, options
from moetuner.serving.settings import list_settings

# Searches are short, as they are not what is asked about.
pytestmark = pytest.mark.usefixtures("brief")

METHODS = "contiguous,lpt,joint"
# Where the number of splits does not matter.
ONCE = ("--splits", 1)


@pytest.fixture
def recorded(trace):
    """Give what the file holds."""
    return mt.RoutingTrace.load(trace)


@pytest.fixture
def solved(ok, trace, tmp_path):
    """Solve for a file, and give the JSON, and the placement in p.json."""

    def solved(*arguments, of=trace):
        out, report = tmp_path / "p.json", tmp_path / "r.json"
        ok("solve", of, *arguments, "--out", out, "--json", report)
        return json.loads(report.read_text()), mt.Placement.load(out)

    return solved


SHOWN = [name for name, command in moetuner.commands.items() if not command.hidden]


def test_every_command_ends_its_help_with_an_example_that_runs(
    ok, make_trace, tmp_path, monkeypatch
):
    """They run one after the other; those that need a model or a GPU have options that exist.

    The demo runs in the next test.
    """
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("trace", "newer")):
        make_trace(800, seed=seed).save(f"{name}.safetensors")
    certify = ("--max-imbalance", 2, "--objective", "traffic", "--certificate", "proof.json")
    ok("solve", "trace.safetensors", "--devices", 8, *certify, "--out", "other.json")
    main = re.findall(r"^    moetuner (.*)$", ok("--help"), re.MULTILINE)
    assert len(main) == 4
    for name in SHOWN:
        words = ok(name, "--help").split("Example:")[1].split()
        assert words[:2] == ["moetuner", name]
        if name in ("collect", "demo", "fit"):
            main.append(" ".join(words[1:]))
        else:
            ok(*words[1:])
    for name, *words in map(str.split, main):
        there = {flag for parameter in moetuner.commands[name].params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= there


LOADED = """
import sys
from moetuner.cli import main
status = main(sys.argv[1:])
commands = [name for name in sys.modules if name.startswith("moetuner.cli.")]
print(status, "numpy" in sys.modules, *sorted(commands), file=sys.stderr)
"""
LIGHT = "False moetuner.cli.interrupts moetuner.cli.streams"


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ("--help", f"0 {LIGHT}"),
        ("--version", "0 False moetuner.cli.interrupts moetuner.cli.release moetuner.cli.streams"),
        ("advize", f"2 {LIGHT}"),
    ],
)
def test_the_menu_loads_no_command(words, loaded):
    """Help, the version and an unknown command need neither a command's module nor numpy."""
    command = [sys.executable, "-c", LOADED, words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == loaded


@pytest.mark.parametrize("name", MENU)
def test_the_menu_says_how_a_command_begins(name):
    """A line of the menu is the first of the command's help, which is loaded later."""
    command = moetuner.commands[name]
    assert command.name == name
    assert command.help.partition("\n\n")[0].replace("\n", " ") == MENU[name]
    assert not command.hidden


def test_solve_takes_every_term(solved, recorded):
    """Options become the problem's terms, and the objective is told with its unit."""
    terms = (
        "--devices 4 --objective balance --slots-per-device 3,3,2,2 --split nearest --arrival 0.5 "
        "--risk 0.5 --groups even=2,odd=0.5 --window 64 --pin *:3:0 --forbid 1:2:3 --forbid 0:2:3"
    )
    actual, placement = solved(*terms.split())
    how = {"slots_per_device": [3, 3, 2, 2], "objective": "balance", "split": "nearest"}
    how |= {"arrival": 0.5, "risk": 0.5, "groups": {"even": 2, "odd": 0.5}}
    how |= {"pinned": [(None, 3, 0)], "forbidden": [(1, 2, 3), (0, 2, 3)]}
    problem = mt.Problem(recorded, mt.Topology(4), phases={64: 1.0}, **how)
    assert placement == mt.solve(problem).placement
    value = problem.objective_function.value(placement)
    assert (actual["unit"], actual["objective"]) == ("max / mean load", value)
    assert actual["settings"]["pinned"] == [[None, 3, 0]]


def test_every_field_of_a_problem_is_an_option(solved):
    """Declared once: there is an option in a group, its help, and its value in the JSON."""
    names = {of.name for of in fields(mt.Problem)} - {"statistics", "topology", "window"}
    declared = list_settings(mt.Problem, mt.Serving)
    settings = {name: declared[name] for name in names}
    assert set(settings) <= set(solved("--devices", 2, "--method", "lpt")[0]["settings"])
    for command in ("solve", "compare"):
        mine = {option.name: option for option in moetuner.commands[command].params}
        for name, setting in settings.items():
            assert mine[name].group == setting["group"] in options.GROUPS
            assert mine[name].help == setting["help"]


@pytest.mark.parametrize("name", moetuner.commands)
def test_help_has_every_option_once(ok, name):
    """In a sentence, in one group or below "Other", in the order that a newcomer needs."""
    text = ok(name, "--help")
    for option in (of for of in moetuner.commands[name].params if of.opts[0].startswith("--")):
        assert option.help.split("  [")[0].endswith("."), option.name
        assert len(re.findall(rf"^  (-\w, )?{option.opts[0]}\b(?![-.])", text, re.MULTILINE)) == 1
    if name in ("solve", "compare", "advise"):
        assert text.index("Begin with:") < text.index("The machine:")


def test_a_gate_on_the_gain_takes_the_lower_end_of_its_interval(
    as_json, run, solved, trace, tmp_path
):
    """It fails below that, and where the gain may be chance: a placement against itself."""
    solved("--devices", 4, "--method", "lpt")
    words = ("evaluate", tmp_path / "p.json", trace, "--window", 40, "--measure", "imbalance")
    gain, gate = as_json(*words)["gain"], "--fail-if-gain-below"
    assert 0 < gain["low"] < gain["gain"]
    for least, status in ((100 * gain["low"] - 1e-6, 0), (100 * gain["low"] + 1e-6, 3)):
        actual, out, err = run(*words, gate, least, "--json", "-")
        assert (actual, json.loads(out)["failed"], err) == (status, status == 3, "")
    assert run(*words, gate, 0.1, "--baseline", tmp_path / "p.json")[0] == 3


def compare(methods, *arguments):
    """Give the words of a comparison."""
    return ("compare", *arguments, "--devices", 4, "--methods", methods)


def test_compare_judges_on_unseen_sequences(as_json, trace, recorded):
    """The numbers are those of the library: statistics of one half, replay of the other."""
    words = compare(METHODS, trace, "--window", 64, "--max-imbalance", 1.05, *ONCE)
    rows = as_json(*words)["methods"]
    assert list(rows) == METHODS.split(",")
    seen, unseen = recorded.split(0.5, seed=0)
    stats = mt.RoutingStatistics.from_trace(seen, window=64, sets=True)
    problem = mt.Problem(stats, mt.Topology(4), max_imbalance=1.05)
    for method, row in rows.items():
        result = mt.solve(problem, method)
        evaluation = mt.evaluate(result.placement, unseen, window=64)
        assert row["objective"] == result.objective
        for name in ("crossing", "imbalance", "fanout", "tokens"):
            assert row[name] == getattr(evaluation, name)
        assert {"bound", "gap", "status", "solve_seconds"} <= set(row)


TWO = ("--window", 64, "--objective", "balance", "--baseline", "contiguous")


def test_compare_tells_gains_over_splits(as_json, trace):
    """Each is solved and judged by itself: the first, with its interval, and the range of all."""
    words = compare("contiguous,lpt", trace, *TWO)
    actual = as_json(*words, "--splits", 3)
    singles = [as_json(*words, *ONCE, "--seed", seed)["methods"] for seed in range(3)]
    gain, one = (of["lpt"]["gain"] for of in (actual["methods"], singles[0]))
    wanted = [1 - of["lpt"]["imbalance"] / of["contiguous"]["imbalance"] for of in singles]
    assert gain["splits"] == pytest.approx(wanted)
    assert len(set(wanted)) == 3
    assert (gain["mean"], gain["range"]) == (np.mean(wanted), [min(wanted), max(wanted)])
    assert (gain["measure"], gain["names"][0]) == ("imbalance", "contiguous")
    alike = one.keys() - {"mean", "splits", "range"}
    assert {of: gain[of] for of in alike} == {of: one[of] for of in alike}
    assert (actual["settings"]["splits"], actual["methods"]["contiguous"]["gain"]) == (3, None)
    assert actual["methods"]["lpt"]["imbalance"] == singles[0]["lpt"]["imbalance"]
    assert (one["range"], one["splits"]) == (None, [one["mean"]])
    assert one["low"] < one["gain"] < one["high"]


def test_long_names_make_no_long_lines(ok, solved, make_trace, tmp_path):
    """A name of 120,000 letters with spaces is cut wherever it is shown."""
    trace, long = make_trace(400), "x y " * 30000
    labels = {"sequence": trace.sequence, "group": trace.group, "group_names": ["a", long, "c"]}
    path, p = tmp_path / "t.safetensors", tmp_path / "p.json"
    trace_of(trace.expert_ids, model=long, **labels).save(path)
    solved("--devices", 2, "--method", "lpt", of=path)
    for line in (("inspect", path), ("evaluate", p, path, "--by-group")):
        assert max(map(len, ok(*line).splitlines())) < 5000


@pytest.mark.parametrize("how", ["compare --methods lpt,eplb", "advise --copies 0"])
def test_the_largest_seed_is_one(ok, trace, how):
    """Seeds of further splits go on from 0."""
    ok(*how.split(), trace, "--devices", 2, "--splits", 2, "--seed", 2**63 - 1)
