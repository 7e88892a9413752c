"""dispatch_rows(): what a plain loop over tokens sends, from every home."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from make import random_ids, trace_of
from placements import random_slots
from served import rows

import moetuner as mt
from moetuner.evaluation.rows import dispatch_rows


@st.composite
def cases(draw):
    """Draw slots with replicas and empty ones, ids, homes and a node size."""
    layers, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    devices, node = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (8, 2), (8, 8)]))
    experts, seed = draw(st.integers(top_k, 9)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    slots = random_slots(rng, layers, devices, experts, draw(st.integers(0, 2)))
    tokens = draw(st.integers(0, 50))
    ids = random_ids(tokens, layers, top_k, experts, seed=seed)
    return slots, ids, experts, rng.integers(0, devices, tokens), node


@given(cases(), st.sampled_from(["even", "nearest"]), st.booleans())
def test_rows_are_those_of_the_plain_loop(case, split, hierarchical):
    """Replicas, empty slots, any homes, either rule, straight and through nodes."""
    slots, ids, experts, home, node = case
    if split == "nearest" and not hierarchical:
        node = slots.shape[1]
    expected = rows(slots, ids, home, node, split, hierarchical=hierarchical)
    trace = trace_of(ids, experts)
    placement = mt.Placement(slots, num_experts=experts)
    sent = dispatch_rows(
        placement, trace, home, split=split, devices_per_node=node if hierarchical else None
    )
    assert sent.tolist() == expected.tolist()


def test_evaluation_with_homes(make_trace):
    """The option replaces the dispatch traffic alone, in every group as on its own."""
    trace = make_trace()
    device_of = np.tile(np.arange(8) // 2, (3, 1))
    placement = mt.Placement.from_assignment(device_of, 4)
    home = np.arange(trace.tokens) % 4
    spread, sent = mt.evaluate(placement, trace), mt.evaluate(placement, trace, home=home)
    assert sent.traffic["dispatch"].tolist() == dispatch_rows(placement, trace, home).tolist()
    assert sent.traffic["follow"].tolist() == spread.traffic["follow"].tolist()
    assert sent.fanout == spread.fanout
    for i, name in enumerate(["even", "odd"]):
        alone = dispatch_rows(placement, trace.select(groups=name), home[trace.group == i])
        assert sent.by_group[name].traffic["dispatch"].tolist() == alone.tolist()


def test_positions_and_homes_that_are_given(make_trace):
    """Tokens in another order, at the positions and homes that they had, make the same rows.

    Blocks of homes are runs of tokens, the first ones longer.
    """
    trace, rng = make_trace(tokens=10), np.random.default_rng(0)
    placement = mt.Placement(random_slots(rng, 3, 4, 8, 2), num_experts=8)
    home, order = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3]), rng.permutation(10)
    other = trace_of(trace.expert_ids[order])
    expected = dispatch_rows(placement, trace).tolist()
    assert dispatch_rows(placement, trace, home).tolist() == expected
    assert dispatch_rows(placement, other, home[order], position=order).tolist() == expected
