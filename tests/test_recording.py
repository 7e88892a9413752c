"""Recording: what traces and counts both answer, against plain indexing of their rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of

import moetuner as mt
from moetuner.trace import as_trace

TOKENS, WINDOW = 60, 5
IDS = random_ids(TOKENS, 2, 2, 6)


def make_trace(tmp_path=None):
    """Make a trace with labels, whose ids are in a file if there is a folder."""
    trace = trace_of(IDS, 6, length=7, group=np.arange(TOKENS) // 20 % 2)
    if tmp_path is None:
        return trace
    trace.save(tmp_path / "trace.safetensors")
    return mt.RoutingTrace.load(tmp_path / "trace.safetensors")


def make_counts():
    """Make counts in windows of every group."""
    return mt.RoutingStatistics.from_trace(
        make_trace(), window=WINDOW, by_group=True, transitions=False, coactivation=False
    )


def arrays_of(recording):
    """Return what a recording has by row."""
    if recording.ordered:
        return [as_trace(recording).expert_ids, recording.sequence, recording.group]
    return [recording.window_load, recording.group]


@pytest.mark.parametrize("kind", ["memory", "file", "counts"])
@given(data=st.data())
def test_rows_that_are_taken_are_those_that_are_numbered(kind, data, tmp_path_factory):
    """Of a mask, or of numbers in any order: ids, loads and labels are indexed alike."""
    folder = tmp_path_factory.mktemp("taken") if kind == "file" else None
    recording = make_counts() if kind == "counts" else make_trace(folder)
    numbers = st.lists(st.integers(0, recording.length - 1), min_size=1, unique=True)
    rows = np.array(data.draw(st.one_of(numbers, st.permutations(range(recording.length)))))
    mask = np.isin(np.arange(recording.length), rows)
    for wanted in (rows, mask):
        for taken, array in zip(
            arrays_of(recording.take(wanted)), arrays_of(recording), strict=True
        ):
            assert np.array_equal(taken, array[wanted])


def test_a_mask_that_changes_later_changes_nothing(tmp_path):
    """What is taken from a file stays what it was, though it is read later."""
    trace, mask = make_trace(tmp_path), np.arange(TOKENS) < 9
    part = trace.take(mask)
    mask[:] = True
    assert np.array_equal(part.expert_ids, IDS[:9])


def test_rows_of_groups_are_all_rows_once():
    """Every row is in its group, and a group without rows is left out."""
    for recording in (make_trace(), make_counts()):
        rows = recording.group_rows()
        assert np.array_equal(rows.pop(None), np.arange(recording.length))
        for name, own in rows.items():
            number = recording.group_names.index(name)
            assert np.array_equal(own, np.flatnonzero(recording.group == number))
        assert sum(map(len, rows.values())) == recording.length


def test_sets_of_a_sample_are_left_out_with_their_number():
    """Loads alone have no sets, and so no tokens whose sets were counted."""
    sampled = replace(make_counts(), set_tokens=40)
    assert sampled.without_pairs() == replace(sampled, sets=None, set_tokens=None)
    assert mt.advise(sampled, mt.Topology(2)).answer


def test_what_is_known_is_not_saved_copied_or_kept_by_a_part(tmp_path):
    """What has been computed of a recording belongs to it alone."""
    for recording in (make_trace(), make_counts()):
        recording.memo["secret"] = 1
        recording.save(tmp_path / "recording.safetensors")
        again = type(recording).load(tmp_path / "recording.safetensors")
        for other in (again, recording.take([0]), recording.without_pairs()):
            assert other is recording or "secret" not in other.memo
