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
