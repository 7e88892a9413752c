"""What a recorded run is called, what its record says, and which of it RESULTS.md shows."""

import json
import subprocess
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
    monkeypatch.setattr(harness, "commit", lambda: "0123456789")
    monkeypatch.setattr(harness, "RECORDS", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "RESULTS.md")
    with harness.benchmark("Title.\n\nAbout.", positional, repeat=3) as (given, report):
        report.table("Of three", "x 4d")(given.repeat)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.stem == name
    files = [word.rsplit("/", 1)[-1] for word in words]
    assert record["command"] == " ".join(["python bench/some.py", *files])
    assert (record["title"], record["commit"]) == ("Title", "0123456789")
    assert record["about"] == "About."
    assert "| 3 |" in record["results"]
    assert record["results"] in harness.RESULTS.read_text()


@pytest.mark.parametrize("name", sorted(harness.HEADLINES))
def test_headlines_are_in_their_record(name):
    """All words of a headline are in the first line of some part; a cell leaves some rows."""
    path = harness.RECORDS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{name} has no record now")
    record = json.loads(path.read_text())
    parts = harness.parts_of(record["results"])
    for words, cell in harness.HEADLINES[name].items():
        shown = [part for part in parts if words in part.splitlines()[0]]
        assert shown, f"{name}: no table or sentence has {words!r}"
        for part in shown:
            table = harness.shortened(part, cell)
            assert not part.startswith("**") or table.count("\n|") > 2, (
                f"{name}: no row of {cell!r}"
            )


def test_a_table_is_shortened_to_the_rows_of_a_cell():
    """Rows without the cell are left out, which the title says; sentences stay as they are."""
    parts = harness.parts_of(
        "**Of two**\n\n| x | y |\n| --- | ---: |\n| a | 1 |\n| b | 2 |\n\nA word."
    )
    assert parts[1:] == ["A word."]
    shown = "**Of two** (rows: b)\n\n| x | y |\n| --- | ---: |\n| b | 2 |"
    assert harness.shortened(parts[0], "b") == shown
    assert harness.shortened(parts[1], "b") == "A word."


def git(folder, *words):
    """Run git there, as somebody."""
    somebody = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", folder, *somebody, *words], check=True, capture_output=True)


def test_a_record_is_of_a_commit(monkeypatch, tmp_path, capsys):
    """Nothing is run to be recorded where files differ from it, but for what records write."""
    bench = tmp_path / "bench"
    (bench / "results").mkdir(parents=True)
    monkeypatch.setattr(harness, "HERE", bench)
    with pytest.raises(SystemExit):
        harness.commit()
    (bench / "some.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "First.")
    for name in ("bench/results/some.json", "bench/RESULTS.md", "README.md"):
        (tmp_path / name).write_text("1")
    assert len(harness.commit()) == 10
    (bench / "some.py").write_text("2")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        harness.commit()
    assert capsys.readouterr().err == (
        "--record needs a commit that has what runs: M bench/some.py\n"
    )
