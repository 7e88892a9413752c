"""The co-location programme: exact where it says so, never worse than its start, bounds below."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from brute_force import kept_caps, optimum, small_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import moetuner as mt
from moetuner import _core
from moetuner.solver.bounds.caps import cap_report
from moetuner.solver.milp.colocation import CoLocationData, Model, colocation, entries_of, fits
from moetuner.solver.milp.highs import Ilp, Solution
from moetuner.solver.result import Candidate, Limits


def shuffled(problem: mt.Problem, seed: int = 0) -> Candidate:
    """Make a start that is far from good, and may break caps."""
    random = np.random.default_rng(seed)
    P = problem.devices * problem.slots
    entries = np.array([random.permutation(P) for _ in range(problem.layers)], dtype=np.int32)
    entries[entries >= problem.experts] = -1
    return Candidate(entries.reshape(problem.layers, problem.devices, problem.slots))


def cost(problem: mt.Problem, found: Candidate) -> int:
    return mt.Objective(problem).cost(mt.Placement(found.slots, num_experts=problem.experts))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    experts=st.integers(4, 6),
    regime=st.sampled_from(["follow", "dispatch"]),
    max_imbalance=st.sampled_from([1.2, 1.4, None]),
)
def test_agrees_with_brute_force(seed, layers, experts, regime, max_imbalance) -> None:
    """From any start it ends at the optimum of the caps that the start keeps."""
    problem = small_problem(seed, layers, experts, regime=regime, max_imbalance=max_imbalance)
    start = shuffled(problem, seed)
    found = colocation(problem, seed=0, limits=Limits(), start=start)
    assert found.status == "optimal"
    best = optimum(problem, kept_caps(problem, start.slots))
    assert cost(problem, found) == found.bound == best


@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), max_imbalance=st.sampled_from([1.3, None]))
def test_two_tiers_are_two_relations(seed, max_imbalance) -> None:
    """With nodes it agrees with brute force, and with the chain."""
    problem = small_problem(seed, 2, 6, 4, devices_per_node=2, max_imbalance=max_imbalance)
    start = shuffled(problem, seed)
    found = colocation(problem, seed=0, limits=Limits(), start=start)
    assert found.status == "optimal"
    assert cost(problem, found) == found.bound
    assert found.bound == optimum(problem, kept_caps(problem, start.slots))
    if max_imbalance is None:
        assert mt.solve(problem).certificate.cost == found.bound


def broken_triangles(model: Model, values: np.ndarray, slack: float) -> set[tuple[int, int, int]]:
    """Try all triples of experts of two neighbouring layers: ``a + b - c <= 1``, as columns."""
    found = set()
    layers, P = model.layers, model.entries
    items = [(layer, e) for layer in range(layers) for e in range(P)]
    for tier in range(len(model.joint.relations)):

        def column(one: tuple[int, int], two: tuple[int, int], tier: int = tier) -> int:
            (l, e), (m, f) = one, two  # noqa: E741
            return int(model.s[tier, l, e, f] if l == m else model.z[tier, l, e, f])

        for i, j, k in itertools.combinations(items, 3):
            if k[0] - i[0] > min(model.joint.boundaries, 1):
                continue
            sides = column(i, j), column(i, k), column(j, k)
            for c in range(3):
                a, b = (sides[at] for at in range(3) if at != c)
                if values[a] + values[b] - values[sides[c]] - 1 > slack:
                    found.add((min(a, b), max(a, b), sides[c]))
    return found


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    nodes=st.booleans(),
    regime=st.sampled_from(["follow", "dispatch"]),
)
def test_separation_finds_the_broken_triangles(seed, layers, nodes, regime) -> None:
    """All of them and no others; fewer if fewer are asked for, and then the worst."""
    problem = small_problem(
        seed, layers, 6, 4, devices_per_node=2 if nodes else None, regime=regime
    )
    joint = CoLocationData.of(problem, problem.caps.whole)
    model = Model(joint)
    values = np.random.default_rng(seed).integers(0, 5, model.columns) / 4
    sizes = [relation.devices * joint.slots for relation in joint.relations]
    shape = sizes, model.layers, model.entries, joint.boundaries
    one, *_ = _core.separate(values, *shape, slack=1e-3, most=10**9, threads=1)
    two, *_ = _core.separate(values, *shape, slack=1e-3, most=7, threads=2)
    found = {(min(a, b), max(a, b), c) for a, b, c in one.tolist()}
    assert found == broken_triangles(model, values, 1e-3)
    assert len(found) == len(one)
    assert two.tolist() == one[:7].tolist()
    worth = values[one[:, 0]] + values[one[:, 1]] - values[one[:, 2]]
    assert (np.diff(worth) <= 0).all()


def test_no_placement_breaks_what_was_added() -> None:
    """Rows found at fractional values hold at every placement, gatherings included."""
    problem = small_problem(5, 3, 8, 4, max_imbalance=None)
    model = Model(CoLocationData.of(problem, problem.caps.whole))
    random = np.random.default_rng(0)
    for _ in range(5):
        assert model.separate(random.random(model.columns))
    assert min(model.rows.values()) > 0
    for seed in range(20):
        device_of = entries_of(shuffled(problem, seed).slots, problem.experts)
        assert model.ilp.broken(model.values(device_of)) is None


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), slots=st.integers(2, 3), nodes=st.booleans())
def test_values_and_placement_are_one(seed, slots, nodes) -> None:
    """A placement turned into values costs the same, keeps all rows, and reads back as itself."""
    problem = small_problem(
        seed, 3, 6, 4, slots=slots, devices_per_node=2 if nodes else None, max_imbalance=None
    )
    start = shuffled(problem, seed)
    model = Model(CoLocationData.of(problem, problem.caps.whole))
    device_of = entries_of(start.slots, problem.experts)
    values = model.values(device_of)
    assert model.ilp.broken(values) is None
    assert model.ilp.objective(values) * model.unit == pytest.approx(cost(problem, start))
    back = model.device_of(values)
    assert (model.values(back) == values).all()


def test_the_first_incumbent_is_the_start() -> None:
    """HiGHS begins at the cost that `Objective.cost` gives the start."""
    problem = small_problem(1, 3, 8, 4, max_imbalance=None)
    start = shuffled(problem)
    found = colocation(problem, seed=0, limits=Limits(), start=start)
    assert found.details.search.colocation["first_incumbent"] == cost(problem, start)


def test_no_time_gives_the_start() -> None:
    """A limit of zero seconds returns the placement that came in."""
    problem = small_problem(1, 3, 8, 4)
    start = shuffled(problem)
    found = colocation(problem, seed=0, limits=Limits(time_limit=0.0), start=start)
    assert found.status == "time_limit"
    assert np.array_equal(found.slots, start.slots)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_an_interrupt_gives_the_best_so_far() -> None:
    """Ctrl-C ends the solve, not the program; bound and placement are kept."""
    problem = small_problem(2, 24, 8, 4, max_imbalance=None, largest=1000)
    start = shuffled(problem)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    found = colocation(problem, seed=0, limits=Limits(), start=start)
    timer.join()
    assert found.status == "interrupted"
    assert cost(problem, found) <= cost(problem, start)
    assert found.bound <= mt.solve(problem).certificate.cost <= cost(problem, found)


def test_progress_reports_incumbent_and_bound() -> None:
    """Every report has a bound that is below the objective."""
    seen = []
    problem = small_problem(2, 24, 8, 4, max_imbalance=None, largest=1000)
    limits = Limits(time_limit=2.0, progress=seen.append)
    colocation(problem, seed=0, limits=limits, start=shuffled(problem))
    assert seen
    assert all(line.phase == "co-location" and line.bound <= line.objective for line in seen)


def test_caps_of_the_start_are_said() -> None:
    """A start that breaks a cap raises it, and the answer says so."""
    problem = small_problem(3, 2, 6, 3, max_imbalance=1.0)
    found = colocation(problem, seed=0, limits=Limits(), start=shuffled(problem))
    raised = cap_report(problem, found.slots).raised
    assert set(raised) <= {0, 1}
    assert min(raised.values()) > 1


def test_an_interrupt_is_heard_as_the_relaxation_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the method also where HiGHS had just solved the relaxation."""
    problem, relax = small_problem(3, 2, 6, 3, max_imbalance=2.0), Ilp.relax

    def interrupted(self: Ilp, **how: Any) -> Solution:
        return replace(relax(self, **how), status="interrupted")

    monkeypatch.setattr(Ilp, "relax", interrupted)
    found = colocation(problem, seed=0, limits=Limits(), start=shuffled(problem))
    assert found.status == "interrupted"


def test_knows_what_fits() -> None:
    """The paper's size fits, 64 experts in 26 layers do not."""
    assert fits(small_problem(0, 32, 8, 4))
    assert not fits(small_problem(0, 26, 64, 8))
