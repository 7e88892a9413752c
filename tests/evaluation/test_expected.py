"""What is expected of a placement: loads, visits and pairs, by the core and by plain sums."""

import itertools

import expectation as oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placements import random_slots

import moetuner as mt
from moetuner import _core
from moetuner.evaluation import copies
from moetuner.serving.splits import SPLITS


def close(actual, wanted):
    """Compare numbers that may be off by the rounding of a sum."""
    assert actual == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@st.composite
def cases(draw):
    """Draw a placement with copies, topology, split, its shares in two forms, and a generator."""
    layers = draw(st.integers(1, 3))
    devices, node = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3), (8, 8), (5, (3, 2))]))
    experts, rng = draw(st.integers(1, 9)), np.random.default_rng(draw(st.integers(0, 2**32)))
    slots = random_slots(rng, layers, devices, experts, draw(st.integers(0, 2)))
    placement = mt.Placement(slots, num_experts=experts)
    topology = mt.Topology(devices, devices_per_node=node)
    split = draw(st.sampled_from(SPLITS))
    share, each = (
        of(placement, topology, split) for of in (oracle.shares, copies.compute_slot_shares)
    )
    return placement, topology, split, share, each, rng


def some_sets(placement, rng):
    """Draw expert sets of every layer, none in some."""
    experts = placement.num_experts
    top_k, sets = int(rng.integers(1, min(experts, 4) + 1)), []
    for _ in range(placement.layers):
        ids = [rng.permutation(experts)[:top_k] for _ in range(rng.integers(0, 10))]
        counts = rng.integers(0, 1000, len(ids))
        sets.append(mt.ExpertSets(np.array(ids, dtype=int).reshape(-1, top_k), counts))
    return tuple(sets)


@given(cases(), st.sampled_from([np.float64, np.uint64, np.uint16, bool]))
def test_loads_and_pairs_are_plain_sums(case, kind):
    """What a slot serves is its device's share; loads and pairs follow, of counts of any type."""
    placement, _, _, share, each, rng = case
    for (layer, device, slot), expert in np.ndenumerate(placement.slots):
        wanted = share[layer, device, expert] if expert >= 0 else 0.0
        assert each[layer, device, slot] == pytest.approx(wanted)
    layers, experts = placement.layers, placement.num_experts
    load = rng.integers(0, 1000, (int(rng.integers(1, 4)), layers, experts)).astype(kind)
    close(copies.serve(placement, each, load), oracle.load(share, load.astype(float)))
    pairs = rng.integers(0, 1000, (layers, experts, experts)).astype(np.uint64)
    slots = placement.slots, each
    close(_core.expected_apart(slots, pairs), oracle.apart(share, pairs.astype(float)))
    actual = _core.expected_transitions(slots, pairs[1:])
    close(actual, oracle.followed(share, pairs[1:].astype(float)))


def test_many_windows_have_the_loads_of_each():
    """Windows so many that threads share them are each what they are alone."""
    rng = np.random.default_rng(0)
    placement = mt.Placement(random_slots(rng, 3, 4, 40, 2), num_experts=40)
    share = copies.compute_slot_shares(placement, mt.Topology(4), "even")
    load = rng.random((3000, 3, 40))
    actual = copies.serve(placement, share, load)
    for window in (0, 1, 1500, 2999):
        alone = copies.serve(placement, share, load[window : window + 1])
        assert actual[window].tolist() == alone[0].tolist()


@given(cases())
def test_visits_are_those_of_the_plain_loop(case):
    """With copies on any devices; exactly so where every expert has one."""
    placement, topology, split, share, _, rng = case
    sets, node = some_sets(placement, rng), topology.node_of_device
    actual = copies.count_visits(placement, topology, split, sets)
    if split == "even":
        expectation = oracle.hashed_visits(placement.slots, sets, node)
    else:
        expectation = oracle.visits(share, sets, node)
    for mine, plain in zip(actual, expectation, strict=True):
        close(mine, plain)
        assert placement.has_copies or mine.tolist() == plain.tolist()
    # Sums of every layer are in the order of its sets.
    one, two = (
        copies.count_visits(placement, topology, split, sets, threads) for threads in (1, 2)
    )
    assert [mine.tolist() for mine in one] == [mine.tolist() for mine in two]


@pytest.mark.parametrize("copies_of", [(3, 4, 6), (2, 3, 4, 6, 1), (3, 4, 6, 5, 7), (8, 7, 6)])
def test_visits_of_copies_whose_numbers_have_common_divisors(copies_of):
    """One hash chooses for all experts of a token, whatever its period over their copies is."""
    devices, topology = 8, mt.Topology(8, devices_per_node=2)
    slots = np.full((1, devices, len(copies_of)), -1)
    for expert, number in enumerate(copies_of):
        slots[0, (expert + np.arange(number)) % devices, expert] = expert
    placement = mt.Placement(slots, num_experts=len(copies_of))
    ids = np.array([*itertools.combinations(range(len(copies_of)), 3)])
    sets = (mt.ExpertSets(ids, np.arange(1, len(ids) + 1)),)
    actual = copies.count_visits(placement, topology, "even", sets)
    wanted = oracle.hashed_visits(placement.slots, sets, topology.node_of_device)
    for found, plain in zip(actual, wanted, strict=True):
        close(found, plain)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_costs_of_pairs_are_whole_numbers(seed, devices, experts, tables):
    """However large the counts are."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 2**63, (tables, experts, experts)).astype(np.uint64)
    here, there = (rng.integers(0, devices, (tables, experts)).astype(np.uint16) for _ in range(2))
    link_cost = rng.integers(0, 2**16, (devices, devices)).astype(np.uint64)
    actual = _core.pair_cost(here, there, pairs, link_cost)
    assert actual == oracle.cost(here, there, pairs, link_cost)
