"""Neighbourhoods: never worse than the start, under its caps, and much better than a bad one."""

from __future__ import annotations

import numpy as np
import pytest
from brute_force import device_load, kept_caps, small_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_colocation import cost, shuffled

from moetuner.solver import neighbourhood as module
from moetuner.solver.exact.partitions import chain
from moetuner.solver.neighbourhood import neighbourhood
from moetuner.solver.result import Limits


@settings(max_examples=6)
@given(
    seed=st.integers(0, 10**6),
    regime=st.sampled_from(["follow", "dispatch"]),
    nodes=st.booleans(),
    slots=st.integers(2, 3),
    max_imbalance=st.sampled_from([1.3, None]),
    chains=st.booleans(),
)
def test_is_never_worse(seed, regime, nodes, slots, max_imbalance, chains) -> None:
    """In either regime, with nodes, spare slots and caps, by the chain or by HiGHS alone."""
    problem = small_problem(
        seed, 4, 8, 4, regime=regime, slots=slots, max_imbalance=max_imbalance,
        devices_per_node=2 if nodes else None,
    )  # fmt: skip
    start = shuffled(problem, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "heuristic", lambda problem, **_: start)
        if not chains:
            patch.setattr(module, "_by_chain", lambda part, steps, threads: None)
            patch.setattr(module, "ROWS", 1000)
            patch.setattr(module, "PASSES", 1)  # stretches of few layers
        found = neighbourhood(problem, seed=0, limits=Limits(), start=start)
    assert cost(problem, found) <= cost(problem, start)
    assert (device_load(problem, found.slots).max(axis=1) <= kept_caps(problem, start.slots)).all()


def test_comes_near_the_optimum() -> None:
    """From a random placement, the neighbourhoods alone come within 2 % of the optimum."""
    problem = small_problem(7, 12, 8, 4, max_imbalance=None)
    start = shuffled(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "heuristic", lambda problem, **_: start)
        found = neighbourhood(problem, seed=0, limits=Limits(), start=start)
    assert cost(problem, found) <= 1.02 * chain(problem).bound < cost(problem, start)
    assert found.details["neighbourhood"]["chain"]["better"] > 0


def test_no_time_gives_the_start() -> None:
    """A limit of zero seconds returns the placement that came in."""
    problem = small_problem(1, 3, 8, 4)
    start = shuffled(problem)
    found = neighbourhood(problem, seed=0, limits=Limits(time_limit=0.0), start=start)
    assert found.status == "time_limit"
    assert np.array_equal(found.slots, start.slots)


def test_same_seed_same_answer() -> None:
    """Without a time limit two runs agree."""
    problem = small_problem(3, 4, 8, 4, slots=3, max_imbalance=1.3)
    start = shuffled(problem)
    one, two = (neighbourhood(problem, seed=5, limits=Limits(), start=start) for _ in range(2))
    assert np.array_equal(one.slots, two.slots)


def test_stretches_by_highs_pay_too() -> None:
    """From a random placement, HiGHS on stretches between fixed layers finds much to save."""
    problem = small_problem(7, 8, 6, 3, slots=2, max_imbalance=None)
    start = shuffled(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "heuristic", lambda problem, **_: start)
        patch.setattr(module, "_by_chain", lambda part, steps, threads: None)
        patch.setattr(module, "ROWS", 700)
        found = neighbourhood(problem, seed=0, limits=Limits(), start=start)
    assert found.details["neighbourhood"]["highs"]["better"] > 2
    assert chain(problem).bound <= cost(problem, found) <= 1.05 * chain(problem).bound
