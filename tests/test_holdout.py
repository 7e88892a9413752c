"""hold_out(): what is judged on has not been seen."""

import numpy as np
import pytest

import moetuner as mt
from moetuner.evaluation.units import hold_out


def test_sequences_are_on_one_side(make_trace):
    """A quarter of the sequences is held out, each whole, none lost."""
    trace = make_trace(400)
    seen, unseen = hold_out(trace, 0.25, seed=1)
    assert not set(seen.sequence) & set(unseen.sequence)
    assert (seen.tokens, unseen.tokens) == (300, 100)


def test_windows_are_on_one_side():
    """Windows of a load table go with their groups."""
    load = np.arange(24).reshape(6, 2, 2)
    table = mt.RoutingStatistics.from_load(load, group=np.arange(6), group_names=tuple("abcdef"))
    seen, unseen = hold_out(table, 0.5, seed=1)
    assert sorted([*seen.group, *unseen.group]) == list(range(6))
    for part in (seen, unseen):
        assert part.window_load.tolist() == load[part.group].tolist()


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.3, 3), (0.8, 8), (0.99, 9)])
def test_the_share_is_what_is_held_out(share, held):
    """Of ten windows the unseen part has so many, and each part has one at least."""
    table = mt.RoutingStatistics.from_load(np.arange(20).reshape(10, 1, 2))
    seen, unseen = hold_out(table, share)
    assert (seen.windows, unseen.windows) == (10 - held, held)


def test_nothing_held_out_is_the_whole(make_trace):
    """Both parts of a split by 0 are the input."""
    trace = make_trace()
    assert hold_out(trace, 0) == (trace, trace)
