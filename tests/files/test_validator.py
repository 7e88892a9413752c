"""Validation of ids: just the arrays that follow the rules pass; the first fault is named."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from make import random_ids

import moetuner as mt


@settings(max_examples=settings().max_examples * 4)
@given(
    hnp.arrays(
        hnp.integer_dtypes(endianness="?") | hnp.unsigned_integer_dtypes(endianness="?"),
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    ),
    st.integers(-1, 300),
)
def test_from_arrays_agrees_with_numpy(ids, experts):
    """The validator accepts exactly the arrays that follow the rules."""
    right = (
        ids.ndim == 3
        and ids.shape[1] > 0
        and 1 <= ids.shape[2] <= experts
        and bool(((ids >= 0) & (ids < experts)).all())
        and bool((np.diff(np.sort(ids, axis=2)) != 0).all())
    )
    if right:
        trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
        assert np.array_equal(trace.expert_ids, ids)
    else:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            mt.RoutingTrace.from_arrays(ids, num_experts=experts)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 1 << 20), st.data())
def test_validator_finds_the_first_fault(experts, top_k, seed, data):
    """One fault in a long shard, at any place and top-k, is the one that is named."""
    top_k = min(top_k, experts)
    ids = random_ids(300, 2, top_k, experts, seed=seed, dtype=np.uint16)
    token, layer = data.draw(st.integers(0, 299)), data.draw(st.integers(0, 1))
    k = data.draw(st.integers(0, top_k - 1))
    twice = top_k > 1 and data.draw(st.booleans())
    ids[token, layer, k] = ids[token, layer, k - 1] if twice else experts
    ids[token + 1 :, 1, 0] = 65535
    with pytest.raises(ValueError, match=f"^expert_ids: token {token}, layer {layer}: ") as caught:
        mt.RoutingTrace.from_arrays(ids, num_experts=experts)
    assert ("appears twice" if twice else f"id {experts} is not below") in str(caught.value)
