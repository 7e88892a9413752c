"""Names that commands had go on until 0.2: they print what the new ones print, and say which."""

import json

import numpy as np
import pytest

import moetuner as mt

FORMER = {
    "audit placement.json trace.safetensors --baseline running.json --measure imbalance": (
        "evaluate placement.json trace.safetensors --baseline running.json --measure imbalance "
        "--by-group"
    ),
    "audit placement.json trace.safetensors --fail-if-worse 0": (
        "evaluate placement.json trace.safetensors --by-group --fail-if-worse 0"
    ),
    "report placement.json trace.safetensors --baseline running.json --out page.html": (
        "evaluate placement.json trace.safetensors --baseline running.json --report page.html"
    ),
    "show placement.json": "inspect placement.json",
    "diff running.json placement.json --expert-bytes 1e6": (
        "inspect running.json placement.json --expert-bytes 1e6"
    ),
}


@pytest.mark.parametrize("old", FORMER)
def test_a_former_name_prints_what_the_new_one_prints(
    run, ok, brief, make_trace, tmp_path, monkeypatch, old
):
    """The same lines, JSON that the new one has, and the status."""
    pytest.importorskip("plotly", reason="the extra report is not installed")
    monkeypatch.chdir(tmp_path)
    make_trace(1200).save("trace.safetensors")
    ok("solve", "trace.safetensors", "--devices", 4, "--window", 100, "--out", "placement.json")
    assignment = np.tile(np.arange(8) % 4, (3, 1))
    mt.Placement.from_assignment(assignment, 4).save("running.json")
    name, new = old.split()[0], FORMER[old]
    status, out, err = run(*old.split(), "--json", "old.json")
    assert run(*new.split(), "--json", "new.json")[0] == status
    assert err.startswith(f'moetuner: "moetuner {name}" is "moetuner {new.split()[0]}')
    assert err.count("\n") == 1
    assert run(*old.split(), "--quiet") == (status, out, "")
    lines = run(*new.split())[1].splitlines()
    # The new name says what all traffic gains above its figures.
    wanted = [line for line in out.splitlines() if not line.startswith("All traffic: ")]
    assert [line for line in wanted if line not in lines] == []
    former, now = (json.loads((tmp_path / f"{when}.json").read_text()) for when in ("old", "new"))
    assert former["schema"] == f"moetuner.{name}/1"
    now = {**now.get("judgement", {}), **now}
    shared = former.keys() & now.keys() - {"schema", "settings", "running"}
    assert {key: former[key] for key in shared} == {key: now[key] for key in shared}
    assert len(shared) >= 3
