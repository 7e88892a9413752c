"""Counts that engines record: checked before they are added, so that no sum wraps."""

import numpy as np
import pytest

from moetuner.formats import counts
from moetuner.formats.layout import Layout


def test_sums_that_would_wrap_are_refused():
    """Slots beyond 2**48 each, or slots and ranks beyond 2**63 together."""
    with pytest.raises(ValueError, match=r"2\*\*48"):
        counts.counts_in("load", np.full((1, 8), 1 << 62))
    wide = np.full((1, 1 << 16), (1 << 48) - 1)
    with pytest.raises(ValueError, match=r"2\*\*63"):
        counts.by_expert(wide, np.zeros_like(wide), None)
    large = np.full(2, 1 << 62)
    assert counts.added(None, large).tolist() == large.tolist()
    with pytest.raises(ValueError, match="must add up to less than 2"):
        counts.added(large, large)


def test_narrow_counts_are_added_in_64_bits():
    """Counts in 8 bits do not wrap at 256."""
    small = np.full(3, 200, dtype=np.uint8)
    assert counts.added(counts.added(None, small), small).tolist() == [400] * 3


def test_ids_beyond_64_bits_are_no_empty_slots():
    """2**64 - 1 is not -1."""
    with pytest.raises(ValueError, match="must be integers below 2"):
        Layout.of([[(1 << 64) - 1, 1 << 63]])


def test_a_slot_makes_no_large_table():
    """An expert beyond the slots of a layer is refused: every expert has one."""
    with pytest.raises(ValueError, match="slots must hold every expert"):
        counts.by_expert(np.ones((1, 1, 2), int), np.array([[0, 1 << 20]]), None)
