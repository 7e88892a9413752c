"""Counts that engines record: checked before they are added, so that no sum wraps."""

import numpy as np
import pytest

from moetuner.formats import counts


def test_sums_that_would_wrap_are_refused():
    """Slots and ranks beyond 2**63 together."""
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
