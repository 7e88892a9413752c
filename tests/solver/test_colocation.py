"""The co-location programme: exact where it says so, never worse than its start, bounds below."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from brute_force import kept_caps, optimum, small_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import moetuner as mt
from moetuner.solver.bounds.caps import cap_report
from moetuner.solver.budget import Budget
from moetuner.solver.milp.colocation import Programme, colocation, fits
from moetuner.solver.result import Candidate


def shuffled(problem: mt.Problem, seed: int = 0) -> Candidate:
    """Make a start that is far from good, and may exceed caps."""
    random = np.random.default_rng(seed)
    P = problem.devices * problem.slots
    entries = np.array([random.permutation(P) for _ in range(problem.layers)], dtype=np.int32)
    entries[entries >= problem.experts] = -1
    return Candidate(entries.reshape(problem.layers, problem.devices, problem.slots))


def cost(problem: mt.Problem, candidate: Candidate) -> int:
    return mt.Objective(problem).cost(mt.Placement(candidate.slots, num_experts=problem.experts))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(2, 3),
    experts=st.integers(4, 6),
    max_imbalance=st.sampled_from([1.2, 1.4, None]),
)
def test_agrees_with_brute_force(seed, layers, experts, max_imbalance) -> None:
    """From any start it ends at the optimum of the caps that the start keeps, warm-started."""
    problem = small_problem(seed, layers, experts, max_imbalance=max_imbalance)
    start = shuffled(problem, seed)
    best = colocation(problem, seed=0, budget=Budget(), start=start)
    assert best.status == "optimal"
    assert cost(problem, best) == best.bound == optimum(problem, kept_caps(problem, start.slots))
    size = best.details.search.colocation
    assert size["first_incumbent"] in (None, cost(problem, start))
    raised = cap_report(problem, best.slots).raised
    assert all(ratio > max_imbalance for ratio in raised.values())


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), slots=st.integers(2, 3))
def test_every_placement_is_a_solution_and_no_other(seed, slots) -> None:
    """A placement keeps all rows, costs the same and reads back; what breaks triangles does not."""
    problem = small_problem(seed, 3, 6, 4, slots=slots, max_imbalance=None)
    start = shuffled(problem, seed)
    model = Programme(problem, problem.caps.whole)
    device_of = np.argsort(np.where(start.slots < 0, 99, start.slots).reshape(3, -1), kind="stable")
    values = model.values(device_of // slots)
    assert model.ilp.broken(values) is None
    assert model.ilp.objective(values) * model.unit == pytest.approx(cost(problem, start))
    assert (model.values(model.device_of(values)) == values).all()
    pair = model.column[0, 0, 1]
    values[pair] = 1 - values[pair]
    assert model.ilp.broken(values) is not None
    assert model.device_of(values) is None


def test_it_begins_with_the_start() -> None:
    """HiGHS begins at the cost that `Objective.cost` gives the start; without time it stays."""
    problem = small_problem(1, 3, 8, 2, max_imbalance=None)
    start = shuffled(problem)
    best = colocation(problem, seed=0, budget=Budget(), start=start)
    assert best.details.search.colocation["first_incumbent"] == cost(problem, start)
    none = colocation(problem, seed=0, budget=Budget(time_limit=0.0), start=start)
    assert none.status == "time_limit"
    assert none.slots is start.slots


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_gives_the_best_so_far() -> None:
    """Ctrl-C ends the solve, not the program; every report has a bound below the objective."""
    problem = small_problem(2, 6, 12, 4, max_imbalance=None, largest=1000)
    start, seen = shuffled(problem), []
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    budget = Budget(progress=seen.append)
    best = colocation(problem, seed=0, budget=budget, start=start)
    timer.join()
    assert best.status == "interrupted"
    assert best.bound <= cost(problem, best) <= cost(problem, start)
    assert seen
    assert all(line.phase == "co-location" and line.bound <= line.objective for line in seen)


def test_knows_what_fits() -> None:
    """Sixteen experts in three layers fit; the sizes of models, nodes and single layers do not."""
    assert fits(small_problem(0, 3, 16, 8))
    assert not fits(small_problem(0, 32, 8, 4))
    assert not fits(small_problem(0, 2, 8, 4, devices_per_node=2))
    assert not fits(small_problem(0, 1, 8, 4))
    assert not fits(small_problem(0, 2, 8, 4, regime="dispatch"))
