"""Optima, bounds and certificates: never above the optimum, recomputable, of one problem only."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from brute_force import optimum, raised_caps, small_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import moetuner as mt
from moetuner.solver.bounds.certificate import ARRAYS, Proof
from moetuner.solver.bounds.pairs import COMPLETE, bound, recompute
from moetuner.solver.bounds.verification import verify
from moetuner.solver.budget import Budget

BUDGET = Budget()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 3),
    size=st.sampled_from([(4, 2, None), (6, 3, None), (6, 2, None), (5, 2, None), (4, 4, 2)]),
    spare=st.booleans(),
    regime=st.sampled_from(["follow", "dispatch"]),
    max_imbalance=st.sampled_from([1.0, 1.1, 1.2, 1.4, None]),
)
def test_joint_is_optimal_and_bounds_are_below(
    seed, layers, size, spare, regime, max_imbalance
) -> None:
    """Few partitions are all tried, also of nodes; other bounds are no higher; proofs hold."""
    experts, devices, per_node = size
    problem = small_problem(
        *(seed, layers, experts, devices),
        slots=-(-experts // devices) + spare,
        devices_per_node=per_node,
        regime=regime,
        max_imbalance=max_imbalance,
    )
    problem = problem.without_copies() or problem
    result = mt.solve(problem)
    caps = raised_caps(problem, result.placement.slots)
    best = optimum(problem, caps)
    assert (result.status, result.bound_source, result.gap) == ("optimal", COMPLETE, 0)
    assert problem.objective_function.cost(result.placement) == result.certificate.cost == best
    proven = bound(problem, caps, budget=BUDGET)
    assert (proven is None) == (regime == "follow" and layers == 1)
    if proven is not None:
        assert 0 <= proven.value <= best
        assert verify(proven.certificate, problem) == proven.value


def test_too_many_partitions_or_too_little_time() -> None:
    """Other proofs, or none, take the place of the programme where it is out of reach."""
    assert mt.solve(small_problem(0, 2, 16, 4), iterations=100).bound_source != COMPLETE
    assert mt.solve(small_problem(0, 3, 8, 4), time_limit=0).bound is None


# Problems whose bound is made of every part: cuts alone where devices have two slots.
PARTS = [small_problem(seed, 3, *size) for seed in range(2) for size in ((6, 2), (6, 3), (8, 4))]
# Cuts by their numbers: those from 6 on carry a choice for each expert of a side.
KINDS, LIFTED = 9, 6


@cache
def caps_of(at: int) -> np.ndarray:
    """Return the caps of one of the problems, raised to what a search keeps."""
    slots = mt.solve(PARTS[at], "heuristic", iterations=100).placement.slots
    return raised_caps(PARTS[at], slots)


@cache
def optimum_of(at: int) -> int:
    """Return the optimum of one of the problems under its caps."""
    return optimum(PARTS[at], caps_of(at))


def proven_by(at: int, proof: Proof) -> int | None:
    """Return what a proof proves of one of the problems; None if a cut in it is refused."""
    with contextlib.suppress(ValueError):
        return recompute(PARTS[at], caps_of(at), (proof,))
    return None


@pytest.mark.parametrize("at", range(len(PARTS)))
def test_early_bounds_are_below_the_optimum(at):
    """However early the method stops, no placement is below the bound, and its proof says so."""
    values = []
    for iterations in (0, 1, 10, 100):
        proven = bound(PARTS[at], caps_of(at), budget=BUDGET, iterations=iterations)
        assert proven.value <= optimum_of(at)
        (proof,) = proven.certificate.proofs
        assert bool(len(proof.contents)) <= (PARTS[at].slots > 2)
        assert recompute(PARTS[at], caps_of(at), (proof,)) == proven.value
        values.append(proven.value)
    assert values[-1] > 0.8 * optimum_of(at)


@settings(max_examples=150, deadline=None)
@given(
    at=st.integers(0, len(PARTS) - 1),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1.0, 1.03, 0.5, -1.0, 1e6, 1e200]),
    wild=st.sampled_from([0.01, 3.0, 1e9, np.nan, np.inf]),
    cuts=st.booleans(),
)
def test_forged_numbers_prove_nothing_false(at, seed, scale, wild, cuts):
    """Whatever is done to its numbers, a certificate that is accepted proves nothing false."""
    proven = bound(PARTS[at], caps_of(at), budget=BUDGET, iterations=30)
    (proof,), rng = proven.certificate.proofs, np.random.default_rng(seed)
    arrays = {name: getattr(proof, name).copy() for name in ARRAYS}
    for name in ("lambda_", "contents", "multipliers"):
        some = rng.random(arrays[name].shape) < 0.1
        arrays[name] *= scale if name != "multipliers" else 1.0
        arrays[name][some] += wild * rng.normal(size=int(some.sum()))
    if cuts and len(arrays["cuts"]):
        places = rng.integers(0, len(arrays["cuts"]), 3)
        arrays["cuts"][places] = rng.integers(0, 18, 3)
        arrays["choices"] = rng.integers(0, 3, arrays["choices"].shape).astype(np.uint8)
    assert (proven_by(at, replace(proof, **arrays)) or 0) <= optimum_of(at)
    assert cuts or proven_by(at, replace(proof, **arrays)) is not None


@settings(max_examples=150, deadline=None)
@given(
    at=st.integers(0, len(PARTS) - 1),
    kind=st.integers(0, KINDS - 1),
    items=st.lists(st.integers(0, 15), min_size=3, max_size=3),
    choices=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    multiplier=st.sampled_from([1.0, 100.0]),
)
def test_single_cuts_are_true(at, kind, items, choices, multiplier):
    """Every kind of cut holds at every feasible placement, whatever its choices."""
    problem, lifted = PARTS[at], kind >= LIFTED
    sides = {1: 1, 2: 1, 3: 0, 6: 2, 7: 2, 8: 2}
    if kind in sides:
        items[sides[kind]] %= 2
    none = np.zeros(0)
    chosen = np.array(choices[: problem.num_experts] if lifted else [], dtype=np.uint8)
    cut = np.array([kind, 0, *items], dtype=np.int32)
    proof = Proof(problem.devices, 1, none, none, np.array([multiplier]), cut, chosen, none)
    assert (proven_by(at, proof) or 0) <= optimum_of(at)


def test_bound_of_real_routing(data):
    """On recorded routing the gap is small, and threads change nothing."""
    trace = mt.RoutingTrace.load(data / "gpt-oss-20b-mini.npz").select(layers=range(2))
    statistics = mt.RoutingStatistics.from_trace(trace, coactivation=False)
    problem = mt.Problem(statistics, mt.Topology(4), regime="follow", max_imbalance=1.1)
    results = [mt.solve(problem, threads=threads, iterations=2_000) for threads in (1, 2)]
    assert [result.status for result in results] == ["feasible"] * 2
    assert results[0].placement == results[1].placement
    assert results[0].certificate == results[1].certificate
    assert results[0].gap < 0.05
