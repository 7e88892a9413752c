"""Messages name the option or the file that is at fault, and quote no more than a line holds."""

import json

import numpy as np
import pytest

import moetuner as mt


@pytest.fixture
def trace(make_trace, tmp_path):
    """File of a small trace."""
    make_trace(200).save(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def placement(path, **fields):
    """Write a placement of eight experts of three layers, some fields replaced."""
    mt.Placement.from_assignment(np.tile(np.arange(8) // 4, (3, 1)), 2).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--slots-per-device", 1), "--slots-per-device must be at least 4"),
        (("--groups", "none=1"), "--groups names 'none'"),
        (("--pin", "0:99:0"), "--pin: expert must be from 0 to 7, got 99"),
        (("--risk", 1), "--risk must be"),
        (("--expert-bytes", "inf", "--initial", "p.json"), "'--expert-bytes': must be a finite"),
    ],
)
def test_what_is_refused_is_named_as_an_option(run, trace, tmp_path, monkeypatch, arguments, words):
    """Nobody has typed the name of an argument of Python."""
    monkeypatch.chdir(tmp_path)
    placement(tmp_path / "p.json")
    status, _, err = run("solve", trace, "--devices", 2, *arguments)
    assert status == 2
    assert words in err


@pytest.mark.parametrize("share", ["inf", "nan", "-1"])
def test_a_gate_that_cannot_close_is_refused(run, trace, tmp_path, share):
    """--fail-if-worse inf would pass whatever got worse."""
    status, _, err = run("audit", placement(tmp_path / "p.json"), trace, "--fail-if-worse", share)
    assert status == 2
    assert "'--fail-if-worse'" in err


@pytest.mark.parametrize("value", [12.5, "8", " 8", 8.9, 0, None, True, [8]])
def test_a_placement_has_a_number_of_experts(tmp_path, value):
    """A text or half an expert is none."""
    path = placement(tmp_path / "p.json", num_experts=value)
    with pytest.raises(ValueError, match=r"p\.json: not a placement: num_experts must be"):
        mt.Placement.load(path)


@pytest.mark.parametrize("field", ["objective", "bound"])
def test_figures_of_a_placement_are_numbers(tmp_path, field):
    """As they are where one is made."""
    with pytest.raises(ValueError, match=f"{field} must be a finite number, got '12'"):
        mt.Placement.load(placement(tmp_path / "p.json", **{field: "12"}))


@pytest.mark.parametrize("command", ["evaluate", "audit", "report"])
def test_a_placement_of_another_model_is_named(run, trace, tmp_path, command):
    """The message says which of the files it is about."""
    other = placement(tmp_path / "other.json", slots=[[[0, 1, 2, 3], [4, 5, 6, 7]]])
    mine = placement(tmp_path / "mine.json")
    assert "other.json: placement must have 3 layers" in run(command, other, trace)[2]
    if command != "evaluate":
        err = run(command, mine, trace, "--baseline", other)[2]
        assert "other.json: placement must have 3 layers" in err


def test_long_names_make_no_long_lines(ok, make_trace, tmp_path):
    """A name of 120,000 letters with spaces is cut wherever it is shown."""
    long = "x y " * 30000
    trace = make_trace(400)
    labels = {"sequence": trace.sequence, "group": trace.group, "group_names": ["a", long, "c"]}
    path = tmp_path / "t.safetensors"
    mt.RoutingTrace.from_arrays(trace.expert_ids, num_experts=8, model=long, **labels).save(path)
    p = placement(tmp_path / "p.json")
    for line in (("inspect", path), ("audit", p, path, "--resamples", 9), ("evaluate", p, path)):
        assert max(map(len, ok(*line).splitlines())) < 5000


@pytest.mark.parametrize("command", ["compare", "advise"])
def test_the_largest_seed_is_one(ok, trace, command):
    """Seeds of further splits go on from 0."""
    quick = {"compare": ("--methods", "lpt,eplb"), "advise": ("--copies", "0")}[command]
    ok(command, trace, "--devices", 2, "--splits", 2, "--seed", 2**63 - 1, *quick)
