"""The emulated cluster: it runs, its results are right, and it leaves nothing behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

BENCH = Path(__file__).parents[2] / "bench" / "cluster"
COMMAND = [sys.executable, str(BENCH), "--quick"]

sys.path.insert(0, str(BENCH))
from network import why_not  # noqa: E402

REFUSAL = why_not()
shaped = pytest.mark.skipif(REFUSAL is not None, reason=f"no emulated links: {REFUSAL}")


def left_of(process: int) -> set[str]:
    """Return namespaces, folders and ranks that a run has, or left behind."""
    name = f"moetuner-{process}-"
    places = (Path("/run/netns"), Path(tempfile.gettempdir()))
    names = {str(path) for place in places for path in place.glob(f"{name}*")}
    # Ranks are told their run's folder.
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        names |= {str(path)} if "worker.py" in words and name in words else set()
    return names


def started() -> subprocess.Popen:
    """Start a run, and give it when a rank of it is there."""
    run = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(name.startswith("/proc") for name in left_of(run.pid)):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return run


@shaped
@pytest.mark.timeout(300)
def test_a_run_prints_all_tables_and_removes_what_a_killed_one_left():
    """The results are those of one process, or a rank fails; then nothing of either run is left."""
    killed = started()
    killed.kill()
    killed.communicate()
    assert any("/run/netns" in name for name in left_of(killed.pid))
    run = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, errors = run.communicate()
    assert run.returncode == 0, errors
    for regime in ("dispatch", "follow"):
        assert f"{regime}: % of a step saved, by link" in printed
        assert f"{regime}, 200 Mbit/s: ms of a layer, and of a step" in printed
    assert "The paper's table" in printed
    assert "nan" not in printed
    assert not left_of(killed.pid) | left_of(run.pid)


@shaped
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.timeout(200)
def test_a_signal_in_the_middle_leaves_nothing_behind(number):
    """It ends quietly, with the status that shells give."""
    run = started()
    run.send_signal(number)
    assert run.communicate()[1] == ""
    assert run.returncode == 128 + number
    assert not left_of(run.pid)


@pytest.mark.timeout(200)
def test_without_tools_bytes_are_counted_over_loopback(tmp_path):
    """It says why in a line; counts are those that `dispatch_rows` and `evaluate` give."""
    environment = os.environ | {"PATH": str(tmp_path)}
    assert shutil.which("ip", path=str(tmp_path)) is None
    run = subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    printed, errors = run.communicate()
    assert run.returncode == 0, errors
    assert "nothing is timed: ip and tc of iproute2 must be installed." in printed
    for regime in ("dispatch", "follow"):
        part = printed.split(f"{regime}: MB of a step")[1].split("\n\n")[0]
        rows = dict(re.findall(r"^(\w+) +([\d.]+)", part, re.MULTILINE))
        assert set(rows) == {"contiguous", "EPLB", "paper", "joint"}
        assert float(rows["joint"]) > 0
    assert not left_of(run.pid)
