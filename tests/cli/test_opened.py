"""A file is identified once and read once, whatever the command."""

import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import moetuner as mt
from moetuner.cli import moetuner
from moetuner.cli.options.kinds import InFile

BUNDLED = Path(mt.__file__).parent / "data" / "small-moe.safetensors"
# The bytes that tell what a file is, its header or list of names, and its content, once for a
# command that compares a file with itself.
MOST = 4
LINES = [
    "inspect TRACE",
    "inspect placement.json",
    "inspect placement.json map.npz --devices 4",
    "solve TRACE --devices 4 --initial placement.json --out out.json",
    "advise TRACE --devices 4 --initial placement.json --copies 0 --splits 1",
    "compare TRACE --devices 4 --methods lpt,contiguous --splits 1 --initial placement.json",
    "evaluate placement.json TRACE",
    "evaluate map.npz TRACE --devices 4 --baseline placement.json",
    "drift placement.json TRACE --profile TRACE",
    "plan placement.json TRACE --with 1 --out more.json",
    "verify proof.json TRACE --devices 4 --placement placement.json",
    "convert TRACE --out joined.safetensors",
    "convert TRACE --count --out counted.safetensors",
    "export placement.json --to eplb --out again.npz",
    "export --check map.npz --devices 4",
]
FILES = ("placement.json", "map.npz", "proof.json")
# Commands whose files are neither traffic nor placements.
OTHERS = {"fit", "collect"}
# Files that are counted now, and how often each was opened.
WATCHED: set[str] = set()
OPENED: Counter[str] = Counter()


def is_pass():
    """Return whether ids of a trace are read, which stay in their file: every replay is a pass."""
    frame = sys._getframe(2)
    while frame is not None:
        if Path(frame.f_code.co_filename).match("files/ids/stored.py"):
            return True
        frame = frame.f_back
    return False


def watch(event, arguments):
    """Count a file that is opened, if it is watched."""
    if event == "open" and WATCHED and isinstance(arguments[0], str | os.PathLike):
        name = Path(arguments[0]).name
        if name in WATCHED and not is_pass():
            OPENED[name] += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the bundled trace in two formats, a placement, a map of it, and a proof."""
    sys.addaudithook(watch)  # it stays until the process ends
    folder = tmp_path_factory.mktemp("opened")
    trace = mt.RoutingTrace.load(BUNDLED)
    trace.save(folder / "trace.safetensors")
    np.savez(folder / "trace.npz", expert_ids=trace.expert_ids, num_experts=trace.num_experts)
    problem = mt.Problem(trace, mt.Topology(4), objective="traffic", max_imbalance=2)
    result = mt.solve(problem, iterations=100)
    result.placement.save(folder / "placement.json")
    result.certificate.save(folder / "proof.json")
    mt.write_placement(result.placement, "eplb", folder / "map.npz")
    return folder


@pytest.mark.parametrize("trace", ["trace.safetensors", "trace.npz"])
@pytest.mark.parametrize("line", LINES)
def test_no_command_asks_a_file_again(run, brief, monkeypatch, folder, line, trace):
    """Whatever is asked of a file comes from what was read at first."""
    monkeypatch.chdir(folder)
    words = line.replace("TRACE", trace).split()
    files = {word for word in words if word in (trace, *FILES)}
    OPENED.clear()
    WATCHED.update(files)
    try:
        status, _, err = run(*words)
    finally:
        WATCHED.clear()
    assert status in (0, 3), err
    assert OPENED.keys() == files
    assert max(OPENED.values()) <= MOST, OPENED


def test_every_command_is_watched():
    """Every command with files of traffic or placements is among the lines."""
    commands = {
        name
        for name, command in moetuner.commands.items()
        if any(isinstance(item.type, InFile) for item in command.params)
    }
    assert commands - OTHERS == {line.split()[0] for line in LINES}
