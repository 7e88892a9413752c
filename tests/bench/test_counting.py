"""bench/counting.py: both sides find the same, and figures are those of what ran."""

import counting
from harness import Report


def test_speeds_are_of_equal_answers():
    """Every table has its rows; peers are held against ours before they are timed."""
    report = Report()
    counting.transitions(report, 1, 0.005)
    counting.replay(report, 1, 0.005)
    counting.text(report, 1, 1)
    transitions, replay, text = report.parts
    assert len(transitions.rows) == 1 + len(counting.TRANSITIONS)
    assert len(replay.rows) == 1 + 2 * len(counting.REPLAYS)
    assert [row[0] for row in text.rows[1:]][-1] == "CSV"


def test_a_file_is_counted_in_little_memory(tmp_path):
    """Far below the size of the file and what the imports take."""
    report = Report()
    counting.all_statistics(report, 1, 20_000_000)
    (table,) = report.parts
    assert 30 < float(table.rows[1][-1]) < 512
