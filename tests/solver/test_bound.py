"""Bounds and certificates: below the optimum, recomputable, and of one problem only."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from brute_force import optimum, small_problem
from hypothesis import given, settings
from hypothesis import strategies as st

import moetuner as mt
from moetuner.solver.bounds.certificate import Certificate
from moetuner.solver.bounds.pairs import bound
from moetuner.solver.bounds.verification import verify
from moetuner.solver.budget import Budget

BUDGET = Budget()


def random_problem(seed: int, layers: int, experts: int, topology: mt.Topology) -> mt.Problem:
    """Small counts with structure, under a cap that matters."""
    rng = np.random.default_rng(seed)
    load = rng.integers(1, 40, (1, layers, experts))
    transitions = rng.integers(0, 30, (layers - 1, experts, experts)) ** 2
    statistics = mt.RoutingStatistics(load, transitions)
    return mt.Problem(statistics, topology, regime="follow", max_imbalance=1.3)


def best_cost(problem: mt.Problem, caps: np.ndarray) -> int:
    """Least cost of all placements under the caps, by trying every layer's and chaining them."""
    even = sorted(set(itertools.permutations(np.arange(problem.devices).repeat(problem.slots))))
    choices = np.array(even)[:, : problem.experts]
    value: np.ndarray | None = None
    before = None
    for layer in range(problem.layers):
        load = np.stack([(choices == d) @ problem.load[layer] for d in range(problem.devices)])
        here = choices[(load <= caps[layer]).all(axis=0)]
        if value is None:
            value = np.zeros(len(here), dtype=np.int64)
        else:
            table = problem.statistics.transitions_or_empty[layer - 1].astype(np.int64)
            moved = problem.topology.cost[before[:, None, :, None], here[None, :, None, :]]
            value = (value[:, None] + np.einsum("abef,ef->ab", moved, table)).min(axis=0)
        before = here
    return int(value.min())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    layers=st.integers(2, 3),
    size=st.sampled_from([(4, 2, None), (6, 3, None), (6, 2, None), (5, 2, None), (4, 4, 2)]),
)
def test_bound_is_below_the_optimum_and_verifies(seed, layers, size):
    """Joint finds the optimum; every bound is below it; a certificate proves what was claimed."""
    experts, devices, per_node = size
    problem = random_problem(seed, layers, experts, mt.Topology(devices, per_node))
    result = mt.solve(problem)
    caps = problem.caps.raised_for(result.placement.slots)
    optimum = best_cost(problem, caps)
    assert mt.Objective(problem).cost(result.placement) == optimum
    proven = bound(problem, caps, budget=BUDGET)
    assert proven is not None
    assert proven.value <= optimum
    assert verify(proven.certificate, problem) == proven.value
    assert result.bound is None or result.bound <= result.objective
    assert result.status != "optimal" or result.gap == 0


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), layers=st.integers(1, 3), slots=st.sampled_from([None, 3]))
def test_bound_of_co_activation(seed, layers, slots):
    """With dispatch, too, no placement of single copies is below the bound, as its proof says."""
    problem = small_problem(seed, layers, 6, 3, regime="dispatch", slots=slots)
    single = problem.without_copies() or problem
    caps = problem.caps.raised_for(mt.solve(single).placement.slots)
    proven = bound(problem, caps, budget=BUDGET)
    assert proven is not None
    assert 0 <= proven.value <= optimum(problem, caps)
    assert verify(proven.certificate, single) == proven.value


def test_certificate_round_trip_and_refusals(tmp_path):
    """What is saved verifies; another problem's, a cut-off or a false certificate is refused."""
    problem = random_problem(1, 3, 8, mt.Topology(2))
    proven = bound(problem, problem.caps.whole, budget=BUDGET)
    path = tmp_path / "proof.safetensors"
    proven.certificate.save(path)
    again = Certificate.load(path)
    assert verify(again, problem) == proven.value
    with pytest.raises(ValueError, match="of these statistics"):
        verify(again, random_problem(2, 3, 8, mt.Topology(2)))
    flat, tiered = (replace(problem, topology=mt.Topology(4, node)) for node in (None, 2))
    four = bound(flat, flat.caps.whole, budget=BUDGET)
    with pytest.raises(ValueError, match="parts and prices"):
        verify(four.certificate, tiered)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a certificate"):
        Certificate.load(path)


def test_tampered_multipliers_prove_less_not_more():
    """Any numbers give a valid bound: none rises above the optimum."""
    problem = random_problem(3, 3, 6, mt.Topology(3))
    optimum = best_cost(problem, problem.caps.whole)
    proven = bound(problem, problem.caps.whole, budget=BUDGET)
    rng = np.random.default_rng(0)
    for scale in (0.01, 0.3, 3.0):
        (proof,) = proven.certificate.proofs
        noise = rng.normal(0, scale, proof.lambda_.shape)
        wrong = replace(proof, lambda_=proof.lambda_ * (1 + noise))
        certificate = replace(proven.certificate, proofs=(wrong,))
        assert verify(certificate, problem) <= optimum


def test_bound_of_real_routing(data):
    """On recorded routing the gap is small, and threads change nothing."""
    trace = mt.RoutingTrace.load(data / "gpt-oss-20b-mini.npz").select(layers=range(5))
    statistics = mt.RoutingStatistics.from_trace(trace, coactivation=False)
    problem = mt.Problem(statistics, mt.Topology(4), regime="follow", max_imbalance=1.1)
    results = [mt.solve(problem, threads=threads) for threads in (1, 2)]
    assert [result.status for result in results] == ["feasible"] * 2
    assert results[0].placement == results[1].placement
    assert results[0].bound == results[1].bound
    assert results[0].gap < 0.05


@pytest.mark.parametrize("seed", range(6))
def test_bound_holds_for_any_link_cost(seed):
    """Whatever a pair of devices costs, nothing or much, no bound is above the optimum."""
    problem = small_problem(seed, layers=2, experts=4, max_imbalance=None, slots=2)
    random = np.random.default_rng(seed)
    cost = np.triu(random.integers(seed % 2, 5, (3, 3)) + np.eye(3, k=1, dtype=int), 1)
    problem = replace(problem, topology=mt.Topology(3, link_cost=cost + cost.T))
    result = mt.solve(problem, "joint", time_limit=0.5)
    best = optimum(problem)
    assert mt.Objective(problem).cost(result.placement) >= best
    assert result.bound is None or result.bound * mt.Objective(problem).scale <= best * (1 + 1e-12)
