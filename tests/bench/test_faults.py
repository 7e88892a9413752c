"""bench/faults.py: what is broken is found, and nothing that the package writes is."""

import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import faults
import pytest
from harness import Report


def test_crashes_and_hangs_are_findings(monkeypatch):
    """Whatever a reader does to its process, the next target has its turn."""
    monkeypatch.setattr(faults, "HANG", 3600.0)
    assert faults.watched(lambda: None)[0] == []
    ((crash, _),) = faults.watched(os.abort)[0]
    monkeypatch.setattr(faults, "HANG", 0.3)
    ((hang, _),) = faults.watched(signal.pause)[0]
    assert (crash[:9], hang[:6]) == ("status -6", "no end")


@pytest.fixture
def few(monkeypatch):
    """Limit the bench to two commands, without functions and a file system of its own."""
    commands = faults.commands
    monkeypatch.setattr(faults, "functions", lambda inputs: [])
    monkeypatch.setattr(
        faults,
        "commands",
        lambda inputs: [of for of in commands(inputs) if of.name in ("convert", "export, eplb")],
    )
    monkeypatch.setattr(faults, "small_disk", lambda *_: nullcontext(False))
    return SimpleNamespace(kills=3, fills=2, seed=0)


def test_kills_break_nothing(few):
    """Old or new, and nothing left over; a file that is cut is neither."""
    report = Report()
    faults.kill(report, few)
    assert "0 files are broken (wanted: 0), 0 left over" in report.parts[-1]


def test_cut_files_are_broken(tmp_path):
    """The judge of kills and full disks notices what they could do."""
    inputs = faults.made(tmp_path)
    for path in (inputs / "t.safetensors", inputs / "p.json"):
        assert faults.whole(path)
        path.write_bytes(path.read_bytes()[:-3])
        assert not faults.whole(path)


def test_full_disks_are_said(few):
    """In one line; the old file stays."""
    report = Report()
    faults.disk(report, few)
    counts = report.parts[0].rows[-1]
    assert counts[2:] == ["4", "0", "0", "0", "0"]


def test_maps_follow_loads_that_drift():
    """The soak's own loads are worth following, and its recording stays bounded."""
    of = faults.soaked(60)
    assert of["imbalance"][1] < of["imbalance"][0]
    assert of["recorded"] == 60
