"""Answers are those of the scorecard; what changes one says so by storing it anew."""

import json

import pytest
import scorecard

CASES = scorecard.list_cases(quick=True)


@pytest.mark.parametrize("name", CASES)
def test_answer_is_as_stored(name: str) -> None:
    """Slots, objective, bound and figures of a case are those in bench/scorecard.json."""
    stored = json.loads(scorecard.STORED.read_text())
    different = scorecard.find_differences(stored[name], scorecard.flatten(CASES[name]()))
    assert not different, f"{different}; if meant: python bench/scorecard.py --write '{name}'"


def test_a_worse_answer_is_told() -> None:
    """A larger objective, a smaller bound and other slots are differences, the first two worse."""
    before = {"slots": "00", "objective": 1.25, "bound": 1.0, "moves": 3, "status": "optimal"}
    after = before | {"slots": "01", "objective": 1.2501, "bound": 0.99}
    rows = scorecard.find_differences(before, after)
    assert [row[0] for row in rows] == ["bound", "objective", "slots"]
    assert [row[3].endswith("worse") for row in rows] == [True, True, False]
    assert scorecard.find_differences(before, dict(before)) == []


def test_every_case_is_stored() -> None:
    """The stored cases are those that the scorecard has, so that none is compared with nothing."""
    assert set(json.loads(scorecard.STORED.read_text())) == set(scorecard.list_cases(quick=False))
