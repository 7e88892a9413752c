"""What audit claims where nothing is the case: bench/chance.py in small, with fixed seeds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import chance


@pytest.mark.parametrize("shape", ["one window each", "crossing windows", "many windows each"])
def test_intervals_of_five_sequences_hold_the_truth(shape):
    """Of forty intervals of no change at most five miss; plain percentiles miss about eight."""
    missed = chance.measure_misses(5, shape, 40)
    assert dict(zip(chance.MEASURES, missed, strict=True)) == pytest.approx(
        dict.fromkeys(chance.MEASURES, 0.0), abs=5 / 40
    )


def test_null_audits_of_seven_groups_name_nobody():
    """Of eight audits of seven groups with five sequences at most one names somebody."""
    *_, either, _ = chance.measure_alarms(5, "one window each", 8)
    assert either <= 1 / 8


def test_one_sequence_names_nobody():
    """A group of one sequence is never worse, whatever its sign."""
    assert chance.measure_alarms(1, "many windows each", 5)[2] == 0


def test_a_group_that_is_served_much_worse_is_named():
    """Of five audits, four or more name the one of seven groups whose experts share a device."""
    *_, actual = chance.measure_alarms(8, "crossing windows", 5, served_worse=2.0)
    assert actual >= 4 / 5


def test_sequences_of_one_window_hold_the_truth():
    """Of forty intervals at most five miss, where ten sequences are in a window and a rest."""
    missed = chance.measure_misses(10, "many in a window", 40)
    assert dict(zip(chance.MEASURES, missed, strict=True)) == pytest.approx(
        dict.fromkeys(chance.MEASURES, 0.0), abs=5 / 40
    )
