"""Problem: exact costs, exact caps, and limits that make sense."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt


def statistics(seed=0, layers=3, experts=6, top=50):
    """Random counts with pairs."""
    rng = np.random.default_rng(seed)
    together = rng.integers(0, top, (layers, experts, experts))
    together = np.triu(together, 1) + np.triu(together, 1).swapaxes(1, 2)
    return mt.RoutingStatistics(
        rng.integers(0, top, (2, layers, experts)),
        rng.integers(0, top, (layers - 1, experts, experts)),
        together,
    )


@given(st.integers(0, 10**6), st.sampled_from([2, 50, 2**54]), st.sampled_from([None, 1, 2]))
def test_cost_is_the_plain_sum(seed, top, node):
    """Both regimes' costs equal a loop over pairs in Python integers, also of huge counts."""
    stats = statistics(seed, top=top)
    topology = mt.Topology(4, node)
    device_of = np.random.default_rng(seed).integers(0, 4, (3, 6))
    placement = mt.Placement.from_assignment(device_of, 4)
    follow = dispatch = 0
    for layer, e, f in np.ndindex(3, 6, 6):
        if layer < 2:
            cost = topology.cost[device_of[layer, e], device_of[layer + 1, f]]
            follow += int(stats.transitions[layer, e, f]) * int(cost)
        if e < f and device_of[layer, e] != device_of[layer, f]:
            dispatch += int(stats.coactivation[layer, e, f])
    assert mt.Problem(stats, topology, 6).cost(placement) == follow
    assert mt.Problem(stats, topology, 6, regime="dispatch").cost(placement) == dispatch


@given(st.integers(0, 10**6), st.fractions(1, 4, max_denominator=100))
def test_caps_are_the_largest_whole_load_allowed(seed, ratio):
    """A device may carry floor(ratio * mean), up to the rounding of the ratio itself."""
    stats = statistics(seed)
    problem = mt.Problem(stats, mt.Topology(3), max_imbalance=float(ratio))
    for total, cap in zip(
        stats.total_load.sum(axis=1).tolist(), problem.caps.tolist(), strict=True
    ):
        exact = min(ratio * total / 3, Fraction(total))
        assert exact - 1 <= cap <= exact + Fraction(1, 10**6)


def test_cap_admits_a_placement_at_the_cap_exactly():
    """1.05 of a mean of 100 is 105, though 1.05 is not a binary fraction."""
    stats = mt.RoutingStatistics.from_load(np.array([[105, 95, 100, 100]]))
    assert mt.Problem(stats, mt.Topology(4), max_imbalance=1.05).caps.tolist() == [105]
    assert mt.Problem(stats, mt.Topology(4)).caps.tolist() == [400]
    assert mt.Problem(stats, mt.Topology(4), max_imbalance=float("inf")).caps.tolist() == [400]


def test_slots_are_just_enough_by_default():
    """Seven experts on three devices need three slots each."""
    stats = mt.RoutingStatistics.from_load(np.ones((1, 7), dtype=int))
    assert mt.Problem(stats, mt.Topology(3)).slots_per_device == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots_per_device": 1}, "slots_per_device must be at least 2 for 6 experts on 4 devices"),
        ({"regime": "pull"}, "regime must be 'follow' or 'dispatch', got 'pull'"),
        ({"max_imbalance": 0.9}, "max_imbalance must be at least 1, got 0.9"),
        ({"max_imbalance": float("nan")}, "max_imbalance must be at least 1, got nan"),
    ],
)
def test_wrong_limits_are_named(fields, words):
    """A message names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=words):
        mt.Problem(statistics(), mt.Topology(4), **fields)
