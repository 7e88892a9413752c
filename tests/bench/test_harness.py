"""What a recorded run is called, and what its record says."""

import json
import sys
from pathlib import Path

import harness
import pytest


@pytest.mark.parametrize(
    ("positional", "words", "name"),
    [
        (None, [], "some"),
        ({"parts": ["axes", "limits"]}, [], "some"),
        ({"parts": ["axes", "limits"]}, ["limits"], "some-limits"),
        ({"folder": Path, "files": [Path()]}, ["a", "x/b.npz", "c.npz"], "some"),
    ],
)
def test_a_record(positional, words, name, monkeypatch, tmp_path):
    """Parts are a record of their own, other files are not; folders are the reader's own."""
    script = harness.HERE / "some.py"
    monkeypatch.setattr(sys, "argv", [str(script), *words, "--record"])
    monkeypatch.setattr(harness, "RECORDS", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "RESULTS.md")
    with harness.benchmark("Title.\n\nAbout.", positional, repeat=3) as (given, report):
        report.table("Of three", "x 4d")(given.repeat)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.stem == name
    files = [word.rsplit("/", 1)[-1] for word in words]
    assert record["command"] == " ".join(["python bench/some.py", *files])
    assert record["title"] == "Title"
    assert record["about"] == "About."
    assert "| 3 |" in record["results"]
    assert record["results"] in harness.RESULTS.read_text()
