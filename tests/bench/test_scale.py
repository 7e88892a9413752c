"""bench/scale.py: peers find the same, sizes double, limits are kept, and shards are links."""

from types import SimpleNamespace

import pytest
import scale
from harness import Report


def test_speeds_are_of_equal_answers(monkeypatch):
    """Every table has its rows; peers are held against ours before they are timed."""
    monkeypatch.setattr(scale, "LINES", (256, 4, 8, 64))
    report, asked = Report(), SimpleNamespace(turns=1, share=0.005, megabytes=1)
    scale.transitions(report, asked)
    scale.sets(report, asked)
    scale.replay(report, asked)
    scale.text(report, asked)
    transitions, sets, replay, text = report.parts
    assert len(transitions.rows) == 1 + len(scale.TRANSITIONS)
    # Sets of 8 of 256 experts and more are no numbers of 64 bits.
    assert len(sets.rows) == 1 + sum(
        experts**top_k < 2**63 for *_, top_k, experts in scale.TRANSITIONS
    )
    assert len(replay.rows) == 1 + 2 * len(scale.REPLAYS)
    assert [row[0] for row in text.rows[1:]][-1] == "CSV"


def test_axes_have_slopes(monkeypatch, brief):
    """A row for every size, answers no worse than contiguous, and a slope of every axis."""
    small = scale.Point(2, 16, 4, 2, 400, 2)
    monkeypatch.setattr(scale, "BASE", small)
    # In this process, where searches are brief; `test_a_limit_is_kept` solves in another one.
    monkeypatch.setattr(scale, "alone", lambda work, *arguments: scale._measured(work, arguments))
    monkeypatch.setattr(scale, "AXES", {"layers": [2, 4], "experts": [16, 32]})
    report = Report()
    scale.axes(report, SimpleNamespace(doublings=1, goals=["crossing"], repeat=1))
    points, slopes = report.parts
    assert len(points.rows) == 5
    assert all(float(row[5]) <= 1 for row in points.rows[1:])
    assert [row[1] for row in slopes.rows[1:]] == ["layers", "experts"]


def test_a_limit_is_kept():
    """The answer is no worse than where every search starts."""
    report = Report()
    names = ["24x32 on 8, crossing"]
    scale.limits(report, SimpleNamespace(names=names, limits=[0.05]))
    (row,) = report.parts[0].rows[1:]
    assert float(row[6]) <= float(row[7])
    assert "worse" not in row[8]


def test_shards_are_links_and_are_read_from_the_disk(tmp_path, monkeypatch):
    """Links are counted like files, in memory that is not of the process that asks for it."""
    layers, top_k, _ = model = (12, 8, 256)
    monkeypatch.setattr(scale, "MODEL", model)
    monkeypatch.setattr(scale, "BLOCK", 64)
    paths, real = scale.shards(tmp_path, 6_000_000, 2_000_000)
    assert len({path.stat().st_ino for path in paths}) == 1
    assert len(paths) == 3
    assert scale.from_disk(paths, scale.read_each)[0] == 3 * real
    assert scale.count_as_one(paths) * layers * top_k == pytest.approx(3 * real, rel=0.01)
    report = Report()
    scale.count_shards(report, paths, real)
    table, said = report.parts
    assert 30 < float(table.rows[2][4]) < 512
    assert "2 of 3 shards are links" in said
