"""Mixed arrival: every token once, sequences in their own order, and a full batch."""

import make
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner.evaluation.arrival import (
    choose_batch_size,
    count_together,
    draw_mixed_order,
    find_places,
    mix,
    mix_windows,
    overlay,
)


@given(st.lists(st.integers(0, 20), max_size=200), st.integers(0, 3), st.booleans())
def test_sequences_advance_in_their_own_order(sequence, seed, labelled):
    """The order holds every token once, those of a sequence as they were; the same for one seed."""
    sequence = np.array(sequence, dtype=np.int32)
    given = sequence if labelled else None
    order = draw_mixed_order(given, len(sequence), seed=seed)
    assert sorted(order.tolist()) == list(range(len(sequence)))
    assert order.tolist() == draw_mixed_order(given, len(sequence), seed=seed).tolist()
    for label in set(sequence.tolist()) if labelled else ():
        assert (np.diff(order[sequence[order] == label]) > 0).all()


@given(
    st.lists(st.integers(-3, 12), max_size=120),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([7, 1 << 20]),
)
def test_the_order_is_that_of_a_plain_loop(sequence, seed, sorts, piece):
    """Sequences wait in random order; the place that is free first takes the next one.

    However many labels are looked at together.
    """
    sequence = np.array(sorted(sequence) if sorts else sequence, dtype=np.int32)
    tokens_of = [np.flatnonzero(sequence == label) for label in np.unique(sequence)]
    free_at = [0] * choose_batch_size(len(tokens_of))
    served = []
    for number in np.random.default_rng(seed).permutation(len(tokens_of)):
        place = int(np.argmin(free_at))
        served += [(free_at[place] + n, place, token) for n, token in enumerate(tokens_of[number])]
        free_at[place] += len(tokens_of[number])
    expected = [token for _, _, token in sorted(served)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetuner.recording.labelling.PIECE", piece)
        assert draw_mixed_order(sequence, len(sequence), seed=seed).tolist() == expected


def test_a_step_has_a_token_of_each_running_sequence():
    """Of forty sequences of equal length ten run at once, until all have run."""
    sequence = np.repeat(np.arange(40, dtype=np.int32), 5)
    order = draw_mixed_order(sequence, 200)
    steps = sequence[order].reshape(20, 10)
    assert all(len(set(step)) == 10 for step in steps.tolist())
    assert all((steps[i] == steps[i - i % 5]).all() for i in range(20))


@given(st.integers(1, 40))
def test_mixed_windows_are_means(windows):
    """As many as there were, with the same total where all are mixed, and never more extreme."""
    load = np.random.default_rng(windows).random((windows, 3))
    actual = np.concatenate([mixed for _, mixed in mix_windows(load)])
    assert actual.shape == load.shape
    assert (actual <= load.max(axis=0) + 1e-12).all()
    if windows <= 16:
        assert np.allclose(actual, load.mean(axis=0))


@given(st.integers(0, 60), st.integers(0, 99), st.sampled_from([None, 1, 7]))
def test_places_are_where_rows_are_in_the_order(length, seed, every):
    """Of all rows, or of some among these: a list says the same, also if those are mixed again."""
    rng = np.random.default_rng(seed)
    order, sequence = rng.permutation(length), rng.integers(0, 5, length).astype(np.int32)
    rows = np.arange(length) if every is None else np.flatnonzero(rng.integers(0, every, length))
    served = [row for row in order.tolist() if row in rows]
    place = find_places(order, rows)
    assert place.tolist() == [served.index(row) for row in rows.tolist()]
    again = draw_mixed_order(sequence[served], len(rows), seed=seed).tolist()
    mixed = mix(sequence, rows, place, seed=seed)
    assert mixed.tolist() == [again.index(place) for place in place.tolist()]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.sets(st.integers(0, 9)))
def test_what_is_laid_beside_each_other_is_there_once(sequence, kept):
    """Whatever sequences a part has, its order has each of its tokens once."""
    whole = np.array(sequence, np.int32)
    part = whole[np.isin(whole, [*kept])]
    order = overlay(part, whole)
    assert order is None or sorted(order.tolist()) == [*range(len(part))]


@pytest.mark.parametrize(("share", "times"), [(0.5, 2), (0.25, 4), (0.8, None)])
def test_held_out_sequences_meet_as_many_others(share, times):
    """Of sixty that are served at once a share is left, and in a step they are sixty again."""
    served = [np.tile(np.arange(first, first + 60), 100) for first in range(0, 600, 60)]
    whole = np.concatenate(served).astype(np.int32)
    part = whole[whole % 60 < 60 * share]
    order = overlay(part, whole)
    assert (order is None) == (times is None)
    if order is not None:
        # Some pieces have the end of a batch and the beginning of the next one.
        before, after, wanted = (
            count_together(tokens, 512) for tokens in (part, part[order], whole)
        )
        assert before < 1.4 * 60 / times
        assert max(1.5 * before, 0.65 * wanted) < after < 1.2 * wanted
        # What lies together is of times that follow each other.
        assert np.abs(np.diff(order)).max() < 0.6 * len(part)


@pytest.mark.parametrize("tokens", [None, 40])
def test_sequences_one_after_the_other_stay_so(tokens):
    """Held out, they keep their order; so do parts that are too short to tell.

    So do sequences that are all served together throughout.
    """
    sequence = np.repeat(np.arange(60), 50)[:tokens]
    throughout = np.tile(np.arange(60), 50).astype(np.int32)
    assert overlay(throughout[throughout < 30], throughout) is None
    trace = make.trace_of(np.zeros((len(sequence), 1, 1), int), 2, sequence=sequence)
    for part in mt.hold_out(trace, seed=1):
        assert np.array_equal(part.sequence, np.sort(part.sequence))
