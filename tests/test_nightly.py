"""The nightly loop of examples/nightly, as a user runs it, on drawn loads of an engine's plugin."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt

FOLDER = Path(__file__).parents[1] / "examples" / "nightly"
BUDGET = 6
TOOLS = ("bash", "flock")
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def moetuner(tmp_path_factory):
    """Command that runs this moetuner."""
    path = tmp_path_factory.mktemp("bin") / "moetuner"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m moetuner "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def night(tmp_path, moetuner):
    """Return a function that records loads of a law, by its seed, and runs the script once."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    random = np.random.default_rng(0)

    def run(law=None, **variables):
        if law is not None:
            mean = np.random.default_rng(law).lognormal(5, 1, (2, 16))
            np.savez(recordings / "load-1-2x16.npz", load=random.poisson(mean, (24, 2, 16)))
        settings = {
            "STATE_DIRECTORY": tmp_path,
            "MOETUNER": moetuner,
            "OPTIONS": "--devices 4 --for vllm",
            "MOVE_BUDGET": BUDGET,
        }
        environment = os.environ | {n: str(v) for n, v in (settings | variables).items()}
        command = ["bash", str(FOLDER / "nightly.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def test_a_placement_is_made_kept_and_replaced_within_the_budget(night, tmp_path):
    """The same traffic keeps it; other traffic replaces it by few moves, and the old one stays."""
    assert "nightly: replaced" in night(law=1).stdout
    first = (tmp_path / "placement.json").read_bytes()
    same = night(law=1)
    assert (same.returncode, same.stdout.split()[:2]) == (0, ["nightly:", "kept"])
    assert (tmp_path / "placement.json").read_bytes() == first
    assert "nightly: replaced" in night(law=2).stdout
    assert (tmp_path / "placement.json.previous").read_bytes() == first
    before = mt.Placement.load(tmp_path / "placement.json.previous")
    after = mt.Placement.load(tmp_path / "placement.json")
    assert 0 < before.diff(after).experts_moved <= BUDGET
    assert (tmp_path / "status").read_text().split()[1] == "replaced"


@pytest.mark.parametrize("prune", [14, 1])
def test_whatever_fails_leaves_the_old_placement(night, tmp_path, prune):
    """One line names the step, and the status is not 0; old nights are deleted, not what serves."""
    night(law=1)
    served = (tmp_path / "placement.json").read_bytes()
    recordings = tmp_path / "recordings"
    nothing = night(KEEP=prune)
    (recordings / "load-2-2x16.npz").write_bytes(b"PK torn")
    torn = night(KEEP=prune)
    other = night(law=1, OPTIONS="", KEEP=prune)
    wrong = night(law=2, OPTIONS="--devices 4 --for nothing", KEEP=prune)
    (tmp_path / "placement.json").write_text("{")
    broken = night(law=2, KEEP=prune)
    assert (tmp_path / "placement.json").read_text() == "{"
    steps = ["collect", "convert", "settings", "solve", "drift"]
    for step, run in zip(steps, [nothing, torn, other, wrong, broken], strict=True):
        assert run.returncode != 0
        assert (run.stdout, run.stderr.count("\n")) == ("", 1)
        assert f"failed at {step} " in run.stderr
        assert run.stderr.endswith("placement.json stays as it is\n")
    if prune == 14:
        (tmp_path / "placement.json").write_bytes(served)
        assert night(law=1).returncode == 0


def test_the_gate_keeps_what_serves(night, tmp_path):
    """A gain that is not sure, or below the wish, replaces nothing."""
    night(law=1)
    served = (tmp_path / "placement.json").read_bytes()
    refused = night(law=2, GAIN=90)
    assert (refused.returncode, refused.stdout.split()[:2]) == (0, ["nightly:", "kept"])
    assert "does not surely gain 90 %" in refused.stdout
    assert (tmp_path / "placement.json").read_bytes() == served


def test_a_second_run_waits_for_nobody(night, tmp_path):
    """A run that finds the lock taken ends at once."""
    night(law=1)
    held = subprocess.Popen(["flock", str(tmp_path / "lock"), "sh", "-c", "echo; read x"], **PIPES)
    assert held.stdout.readline() == "\n"
    refused = night(law=2)
    held.communicate("\n")
    assert refused.returncode == 1
    assert "another run holds" in refused.stderr
