"""The emulated cluster: it runs, its results are right, and it leaves nothing behind."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt

torch = pytest.importorskip("torch", reason="torch is not installed")
# Two threads would only wait for each other.
torch.set_num_threads(1)

BENCH = Path(__file__).parents[2] / "bench" / "cluster"
COMMAND = [sys.executable, str(BENCH), "--quick"]

sys.path.append(str(BENCH))
from network import Network, why_not  # noqa: E402

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


# Stands for tc, which shapes the links of all ranks once they are there. At those of the second
# rank it waits until the test is over. What a run tries before has one rank.
TC = """#!/bin/sh
case "$*" in *gpu1*)
    : > "$0.held"
    exec cat "$0.pipe";;
esac
exec {tc} "$@"
"""


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Start a run that is held once its ranks are there."""
    tc, held = tmp_path / "tc", tmp_path / "tc.held"
    tc.write_text(TC.format(tc=shutil.which("tc")))
    tc.chmod(0o755)
    os.mkfifo(tmp_path / "tc.pipe")
    pipe = os.open(tmp_path / "tc.pipe", os.O_RDWR)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(COMMAND, env=environment, **pipes)
    while not held.exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)
    assert any(name.startswith("/proc") for name in left_of(run.pid))
    yield run
    run.kill()
    os.close(pipe)


def load(name: str) -> Any:
    """Import a module of the bench by another name, as tests have a module ``ranks`` too."""
    specification = importlib.util.spec_from_file_location(f"cluster_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run_bench(monkeypatch, capsys, brief) -> Callable[[], str]:
    """Return what runs the bench in this process, on a short trace, and returns what it prints."""
    monkeypatch.setitem(sys.modules, "ranks", load("ranks"))
    bench, short = load("__main__"), trace_of(random_ids(4400, 2, 2, 16), 16, length=20)
    monkeypatch.setattr(bench, "bundled", lambda: SimpleNamespace(traffic=short))
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", COMMAND[1:])

    def run() -> str:
        bench.main()
        return capsys.readouterr().out

    return run


@shaped
def test_a_run_prints_all_tables_and_removes_what_a_killed_one_left(started, run_bench):
    """The results are those of one process, or a rank fails; then nothing of either run is left."""
    started.kill()
    started.communicate()
    assert any("/run/netns" in name for name in left_of(started.pid))
    printed = run_bench()
    for regime in ("dispatch", "follow"):
        assert f"{regime}: % of a step saved, by link" in printed
        assert f"{regime}, 200 Mbit/s: ms of a layer, and of a step" in printed
    assert "a row for each device or expert of a token" in printed
    assert "two nodes of GPUs: all-to-all / processing, by presets" in printed
    assert "The paper's table" in printed
    assert "nan" not in printed
    assert not left_of(started.pid) | left_of(os.getpid())


@shaped
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_nothing_behind(started, number):
    """It ends quietly, with the status that shells give."""
    started.send_signal(number)
    assert started.communicate()[1] == ""
    assert started.returncode == 128 + number
    assert not left_of(started.pid)


def test_without_tools_bytes_are_counted_over_loopback(tmp_path, monkeypatch, run_bench):
    """It says why in a line; counts are those that `dispatch_rows` and `evaluate` give."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ip") is None
    printed = run_bench()
    assert "nothing is timed: ip and tc of iproute2 must be installed." in printed
    for regime in ("dispatch", "follow"):
        part = printed.split(f"{regime}: MB of a step")[1].split("\n\n")[0]
        rows = dict(re.findall(r"^(\w+) +([\d.]+)", part, re.MULTILINE))
        assert set(rows) == {"contiguous", "EPLB", "paper", "joint"}
        assert float(rows["joint"]) > 0
    assert not left_of(os.getpid())


@pytest.fixture
def small() -> Iterator[Any]:
    """Start two ranks over loopback; yield them and a function that replays a step on them."""
    ranks = load("ranks")

    def replay(running: Any, regime: str, layers: int, **more: Any) -> list[dict[str, Any]]:
        top_k = 1 if regime == "follow" else 2
        ids = random_ids(96, layers, top_k, 8)
        trace = trace_of(ids)
        work = ranks.Work("made", regime, trace, trace, 96, 64, 8)
        placement = mt.Placement(np.arange(8).reshape(1, 2, 4).repeat(layers, axis=0))
        return running.replay(work, ids[None], [placement], **more)

    with ranks.ranks_in(Network(2, 1)) as running:
        yield running, replay


def test_results_of_many_layers_are_those_of_one_process(small):
    """Rounding grows from layer to layer, and is not taken for a difference."""
    running, replay = small
    for regime, more in (("follow", {}), ("dispatch", {"regimes": ["dispatch", "pairs"]})):
        answers = replay(running, regime, 24, check=True, **more)
        assert [answer["sent"].shape for answer in answers] == [(1, 1 + len(more), 2)] * 2


def test_an_expert_that_is_another_one_is_a_difference():
    """However many layers there are, and also if it is one token's in the last layer alone."""
    worker, layers = load("worker"), 94
    numbers = torch.Generator().manual_seed(0)
    sizes = ((24, 64), (4, 16, 64), (4, 64, 8))
    x, up, down = (torch.randn(size, generator=numbers).double() for size in sizes)
    up, down, weights = up / 8, down / 8**0.5, torch.ones(24, 1).double()
    ids = torch.from_numpy(random_ids(24, layers, 1, 4)).long()
    expected = worker.alone(x, ids, weights, up, down)
    worker.compare(expected.clone(), expected, layers)
    ids[5, -1] = (ids[5, -1] + 1) % 4
    with pytest.raises(AssertionError, match="Mismatched elements"):
        worker.compare(worker.alone(x, ids, weights, up, down), expected, layers)


@pytest.mark.parametrize("how", ["its own error", "killed"])
def test_the_rank_that_failed_first_is_named(small, how):
    """With its own error: that of the others, who lose their peer, says nothing."""
    running, replay = small
    replay(running, "dispatch", 2)
    if how == "killed":
        running.processes[1].kill()
        words = "rank 1 failed first: ended with status -9"
    else:
        running.processes[1].stdin.write("no task\n")
        words = "rank 1 failed first: JSONDecodeError: Expecting value"
    with pytest.raises(RuntimeError, match=f"^{words}"):
        replay(running, "dispatch", 2)
