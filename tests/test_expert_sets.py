"""ExpertSets: counted like a plain dictionary would, adding up, and safe in files."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import random_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import moetuner as mt
from moetuner.statistics import ExpertSets


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


def test_save_and_load(make_trace, tmp_path):
    """What is saved is loaded."""
    path = tmp_path / "s.safetensors"
    counted = mt.RoutingStatistics.from_trace(make_trace(), sets=True)
    counted.save(path)
    loaded = mt.RoutingStatistics.load(path)
    assert loaded.fingerprint == counted.fingerprint
    assert as_counters(loaded) == as_counters(counted)

    tensors, about = load_file(path), {"format": "moetuner.statistics", "version": "1"}
    cases = [
        ({"set_ids": None}, "expert sets must have set_ids, set_counts, sets_per_layer"),
        ({"sets_per_layer": tensors["sets_per_layer"] + 1}, "sets_per_layer must add up to"),
        ({"sets_per_layer": np.array([len(tensors["set_ids"])])}, "sets must be those of 3 layers"),
        ({"set_ids": tensors["set_ids"] + 7}, "sets must have expert ids below 8, layer 0"),
        ({"set_ids": tensors["set_ids"] * 0}, "ids of an expert set must differ"),
        ({"set_ids": tensors["set_ids"].astype(float)}, "ids of expert sets must be"),
        ({"set_counts": tensors["set_counts"][1:]}, "set_counts must be"),
    ]
    for change, text in cases:
        broken = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(broken, path, metadata=about)
        with pytest.raises(ValueError, match=re.escape(text)) as caught:
            mt.RoutingStatistics.load(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_bad_sets():
    """What is no set of experts is named."""
    one = ExpertSets([[1, 0], [0, 1]], [2, 3])
    assert one.ids.tolist() == [[0, 1]]
    assert one.counts.tolist() == [5]
    for ids, counts, text in (
        ([[0, -1]], [1], "from 0 to 65535"),
        ([0, 1], [1], "must be [sets, top_k]"),
        ([[0, 1]], [-1], "counts of expert sets must be"),
        ([[0, 1]], [1, 2], "counts of expert sets must be"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            ExpertSets(ids, counts)
    with pytest.raises(ValueError, match="same number of experts"):
        one + ExpertSets([[1]], [1])
