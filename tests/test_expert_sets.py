"""ExpertSets: counted like a plain dictionary would, adding up, and safe in files."""

from collections import Counter

import numpy as np
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt


def as_counters(statistics):
    """Give the sets of every layer as dictionaries."""
    return [
        Counter(dict(zip(map(tuple, of.ids.tolist()), of.counts.tolist(), strict=True)))
        for of in statistics.sets
    ]


@given(
    experts=st.sampled_from([1, 5, 40, 300]),
    top_k=st.integers(1, 5),
    tokens=st.integers(0, 60),
    cut=st.integers(0, 60),
    threads=st.sampled_from([1, 3]),
)
def test_counts_like_a_dictionary(experts, top_k, tokens, cut, threads):
    """Each set once, in order, whatever the threads; and the sets of parts add up."""
    ids = random_ids(tokens, 3, min(top_k, experts), experts, dtype=np.uint16)
    expected = [
        Counter(tuple(sorted(row)) for row in layer) for layer in ids.swapaxes(0, 1).tolist()
    ]
    trace = mt.RoutingTrace.from_arrays(ids, num_experts=experts)
    counted = mt.RoutingStatistics.from_trace(trace, sets=True, threads=threads)
    assert as_counters(counted) == expected
    for layer, of in enumerate(counted.sets):
        assert of.ids.tolist() == sorted(map(list, expected[layer]))
        assert np.array_equal(of.load(experts), counted.total_load[layer])
    parts = [mt.RoutingTrace.from_arrays(p, num_experts=experts) for p in (ids[:cut], ids[cut:])]
    both = mt.RoutingStatistics.sum(mt.RoutingStatistics.from_trace(p, sets=True) for p in parts)
    assert as_counters(both) == expected


def test_sets_are_optional(make_trace):
    """Not counted unless asked for; a sum has what both sides have; fingerprints differ."""
    plain = mt.RoutingStatistics.from_trace(make_trace())
    full = mt.RoutingStatistics.from_trace(make_trace(), sets=True)
    assert plain.sets is None
    assert (plain + full).sets is None
    assert plain.fingerprint != full.fingerprint
    assert "sets" in repr(full)
