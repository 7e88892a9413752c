"""The complete chain: its answer is the optimum, and it knows when it has none."""

from __future__ import annotations

import numpy as np
import pytest
from brute_force import device_load, kept_caps, optimum, small_problem
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner.solver.bounds.caps import told
from moetuner.solver.exact.partitions import chain
from moetuner.solver.result import Limits


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
    problem = small_problem(
        seed, layers, experts, slots=slots, regime=regime, max_imbalance=max_imbalance
    )
    found = chain(problem)
    assert found.status == "optimal"
    caps = kept_caps(problem, found.slots)
    assert (
        mt.Objective(problem).cost(mt.Placement(found.slots))
        == found.bound
        == optimum(problem, caps)
    )


@given(seed=st.integers(0, 10**6), max_imbalance=st.sampled_from([1.3, None]))
def test_is_the_optimum_with_nodes(seed, max_imbalance) -> None:
    """Devices within nodes are two nested partitions."""
    problem = small_problem(seed, 3, 6, 4, slots=2, devices_per_node=2, max_imbalance=max_imbalance)
    found = chain(problem)
    caps = kept_caps(problem, found.slots)
    assert (
        mt.Objective(problem).cost(mt.Placement(found.slots))
        == found.bound
        == optimum(problem, caps)
    )


def test_raises_a_cap_no_further_than_needed() -> None:
    """Where no placement keeps a cap, the least that one does keep is said and kept."""
    load = np.array([[[90, 10, 10, 10]]], dtype=np.uint64)
    problem = mt.Problem(
        mt.RoutingStatistics(load, np.zeros((0, 4, 4), np.uint64)),
        mt.Topology(2),
        max_imbalance=1.05,
    )
    found = chain(problem)
    assert device_load(problem, found.slots).max() == 100
    assert told(problem, found).raised == {0: pytest.approx(100 / 60)}


def test_gives_up_where_partitions_are_too_many_or_time_too_short() -> None:
    """None is the answer where a proof is out of reach."""
    assert chain(small_problem(0, 2, 16, 4)) is None
    assert chain(small_problem(0, 3, 8, 4), limits=Limits(time_limit=0.0)) is None
