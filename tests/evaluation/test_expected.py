"""What is expected of expert sets: visits, by the core and by a plain loop."""

import numpy as np
import pytest
import visits as oracle
from hypothesis import given
from hypothesis import strategies as st
from placements import random_slots

import moetuner as mt
from moetuner.evaluation import copies, expected


@st.composite
def cases(draw):
    """Draw shares of a placement with copies, and expert sets of every layer."""
    layers, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    devices, node = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (8, 8)]))
    experts, seed = draw(st.integers(top_k, 9)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    slots = random_slots(rng, layers, devices, experts, draw(st.integers(0, 2)))
    placement = mt.Placement(slots, num_experts=experts)
    topology = mt.Topology(devices, devices_per_node=node)
    split = draw(st.sampled_from(copies.SPLITS))
    share = copies.shares(placement, topology, split)
    sets = []
    for _ in range(layers):
        ids = [rng.permutation(experts)[:top_k] for _ in range(draw(st.integers(0, 9)))]
        counts = rng.integers(0, 1000, len(ids))
        sets.append(mt.ExpertSets(np.array(ids, dtype=int).reshape(-1, top_k), counts))
    return placement, share, tuple(sets), topology.node_of_device


@given(cases())
def test_visits_are_those_of_the_plain_loop(case):
    """With copies on any devices; exactly so where every expert has one."""
    placement, share, sets, node = case
    found, wanted = expected.visits(share, sets, node), oracle.visits(share, sets, node)
    for mine, plain in zip(found, wanted, strict=True):
        assert mine == pytest.approx(plain, rel=1e-9, abs=1e-9)
        assert placement.has_copies or mine.tolist() == plain.tolist()


@given(cases())
def test_visits_do_not_depend_on_threads(case):
    """Sums of every layer are in the order of its sets."""
    _, share, sets, node = case
    one, two = (expected.visits(share, sets, node, threads) for threads in (1, 2))
    assert [each.tolist() for each in one] == [each.tolist() for each in two]
