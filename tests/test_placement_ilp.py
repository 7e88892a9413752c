"""The placement programme: exact on small problems with nodes, unequal caps and pinned experts."""

from __future__ import annotations

import numpy as np
import pytest
from brute_force import device_load, optimum, small_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_colocation import cost, shuffled

import moetuner as mt
from moetuner.solver.placement_ilp import placement_ilp
from moetuner.solver.result import Limits


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    regime=st.sampled_from(["follow", "dispatch"]),
    nodes=st.booleans(),
    slots=st.integers(2, 3),
)
def test_agrees_with_brute_force(seed, layers, regime, nodes, slots) -> None:
    """With caps that differ by device, and with two tiers of links."""
    problem = small_problem(
        seed, layers, 4, 4 if nodes else 3, devices_per_node=2 if nodes else None,
        regime=regime, slots=slots, max_imbalance=None,
    )  # fmt: skip
    random = np.random.default_rng(seed)
    start = shuffled(problem, seed)
    mean = problem.load.sum(axis=1) // problem.devices
    caps = (mean[:, None] * random.uniform(0.8, 2, (layers, problem.devices))).astype(np.uint64)
    found = placement_ilp(problem, seed=0, limits=Limits(), start=start, caps=caps)
    kept = np.maximum(caps, device_load(problem, start.slots))
    best = optimum(problem, kept)
    assert found.bound <= best <= cost(problem, found) <= cost(problem, start)
    assert (device_load(problem, found.slots) <= kept).all()
    assert found.status == "optimal"
    assert found.bound == best


def test_pinned_experts_stay() -> None:
    """A pinned expert keeps its device, and all but it move for a better cost."""
    problem = small_problem(5, 3, 6, 3, max_imbalance=None)
    start = shuffled(problem)
    device_of = mt.Placement(start.slots).device_of
    pinned = np.where(np.arange(6) < 2, device_of, -1)
    found = placement_ilp(problem, seed=0, limits=Limits(), start=start, pinned=pinned)
    after = mt.Placement(found.slots).device_of
    assert (after[:, :2] == device_of[:, :2]).all()
    assert optimum(problem) <= cost(problem, found) < cost(problem, start)
    with pytest.raises(ValueError, match="start must keep pinned experts: layer 0, expert 0"):
        wrong = (device_of + 1) % 3
        placement_ilp(problem, seed=0, limits=Limits(), start=start, pinned=wrong)


def test_no_time_gives_the_start() -> None:
    """A limit of zero seconds returns the placement that came in."""
    problem = small_problem(1, 3, 6, 3)
    start = shuffled(problem)
    found = placement_ilp(problem, seed=0, limits=Limits(time_limit=0.0), start=start)
    assert found.status == "time_limit"
    assert np.array_equal(found.slots, start.slots)
