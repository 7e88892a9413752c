"""The complete chain: its answer is the optimum, and it knows when it has none."""

from __future__ import annotations

import numpy as np
import pytest
from brute_force import device_load, kept_caps, optimum, small_problem
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt

SOURCE = "complete dynamic programme"


def check_is_the_optimum(problem: mt.Problem) -> None:
    """Hold what solve proves against every placement under the caps of the answer."""
    problem = problem.without_copies() or problem
    result = mt.solve(problem)
    best = optimum(problem, kept_caps(problem, result.placement.slots))
    assert (result.status, result.bound_source) == ("optimal", SOURCE)
    assert mt.Objective(problem).cost(result.placement) == result.certificate.cost == best


@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    experts=st.integers(4, 6),
    regime=st.sampled_from(["follow", "dispatch"]),
    max_imbalance=st.sampled_from([1.0, 1.1, 1.4, None]),
    slots=st.sampled_from([2, 3]),
)
def test_is_the_optimum(seed, layers, experts, regime, max_imbalance, slots) -> None:
    """No placement under the same caps costs less, with and without spare slots."""
    limits = {"regime": regime, "max_imbalance": max_imbalance}
    check_is_the_optimum(small_problem(seed, layers, experts, slots=slots, **limits))


@given(seed=st.integers(0, 10**6), max_imbalance=st.sampled_from([1.3, None]))
def test_is_the_optimum_with_nodes(seed, max_imbalance) -> None:
    """Devices within nodes are two nested partitions."""
    check_is_the_optimum(
        small_problem(seed, 3, 6, 4, slots=2, devices_per_node=2, max_imbalance=max_imbalance)
    )


def test_raises_a_cap_no_further_than_needed() -> None:
    """Where no placement keeps a cap, the least that one does keep is said and kept."""
    load = np.array([[[90, 10, 10, 10]]], dtype=np.uint64)
    statistics = mt.RoutingStatistics(load, np.zeros((0, 4, 4), np.uint64))
    problem = mt.Problem(statistics, mt.Topology(2), max_imbalance=1.05, regime="follow")
    result = mt.solve(problem)
    assert device_load(problem, result.placement.slots).max() == 100
    assert result.details.caps.raised == {0: pytest.approx(100 / 60)}
    assert result.status == "optimal"


def test_gives_up_where_partitions_are_too_many_or_time_too_short() -> None:
    """Other proofs, or none, take its place where it is out of reach."""
    assert mt.solve(small_problem(0, 2, 16, 4), iterations=100).bound_source != SOURCE
    assert mt.solve(small_problem(0, 3, 8, 4), time_limit=0).bound is None
