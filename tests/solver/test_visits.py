"""Bounds of visits: below every placement's, recomputable, and of one problem only."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import random_ids, trace_of

import moetuner as mt
from moetuner.solver import effort
from moetuner.solver.bounds import visits
from moetuner.solver.bounds.loads import least_balance, least_shared
from moetuner.solver.budget import Budget

SIZES = st.sampled_from(
    [(6, 3, None), (6, 2, None), (5, 2, None), (7, 3, None), (6, 4, 2), (6, 3, (1, 2))]
)


def problem_of(seed, layers, size, top_k, cap=None, slots=None) -> mt.Problem:
    """Small counts of sets, some of which many tokens choose."""
    experts, devices, per_node = size
    ids = random_ids(40, layers, top_k, experts, seed=seed)
    statistics = mt.RoutingStatistics.from_trace(trace_of(ids, experts), sets=True)
    rng = np.random.default_rng(seed)
    sets = [
        mt.ExpertSets(of.ids, of.counts * rng.integers(1, 9, len(of), dtype=np.uint64))
        for of in statistics.sets
    ]
    load = np.array([[of.load(experts) for of in sets]])
    statistics = mt.RoutingStatistics(load, coactivation=statistics.coactivation, sets=tuple(sets))
    topology = mt.Topology(devices, devices_per_node=per_node)
    return mt.Problem(
        statistics,
        topology,
        regime="dispatch",
        objective="traffic",
        max_imbalance=cap,
        slots_per_device=slots,
    )


def fewest(problem: mt.Problem, caps: np.ndarray) -> float:
    """Fewest visits of all placements under caps [L], by trying every one."""
    ways = np.array(list(itertools.product(range(problem.devices), repeat=problem.num_experts)))
    node, price = problem.topology.node_of_device, problem.objective_function.visit_costs
    total = 0.0
    for layer, of in enumerate(problem.statistics.sets):
        members = [(ways == d) for d in range(problem.devices)]
        keep = np.all(
            [h.sum(1) <= problem.capacity[layer, d] for d, h in enumerate(members)], axis=0
        )
        load = [h @ problem.load[layer].astype(float) for h in members]
        here = ways[keep & (np.max(load, axis=0) <= caps[layer])]
        cost = np.zeros(len(here))
        for part_of, one in zip((here, node[here]), price, strict=True):
            for part in range(problem.devices):
                meets = (part_of[:, of.ids.astype(int)] == part).any(axis=2)
                cost += one * (meets @ of.counts.astype(float))
        total += cost.min()
    return total


def searched(problem: mt.Problem):
    """Return what the search finds, and the caps that it keeps."""
    slots = mt.solve(problem, "heuristic", iterations=200).placement.slots
    return slots, problem.caps.raised_for(slots)


def proven_by(problem, slots, caps, *, by_tangents: bool = False, steps: int = 3):
    """Return a bound by prices, or by tangents that make few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effort, "TANGENT_STEPS", steps)
        patch.setattr(effort, "TANGENT_TRIALS", 500)
        if by_tangents:
            patch.setattr(visits, "_bound_by_prices", lambda *_: None)
        return visits.bound(problem, slots, caps, budget=Budget())


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 2),
    size=SIZES,
    top_k=st.integers(1, 5),
    cap=st.sampled_from([None, 1.2]),
    slots=st.sampled_from([None, None, (3, 2, 1), (4, 1, 1), (2, 2, 2), (3, 3, 0)]),
    by_tangents=st.booleans(),
)
def test_bound_is_below_every_placement(seed, layers, size, top_k, cap, slots, by_tangents):
    """Prices or tangents, devices alike or not, nodes: never above the optimum; it verifies."""
    if slots is not None:
        size, top_k, cap = (6, 3, None), min(top_k, 4), None
    problem = problem_of(seed, layers, size, top_k, cap, slots)
    placed, caps = searched(problem)
    proven = proven_by(problem, placed, caps, by_tangents=by_tangents)
    best, tokens = fewest(problem, caps), problem.objective_function.tokens
    assert np.floor(visits.least_visits(problem) * tokens * 0.999999) <= proven.value
    assert proven.value <= best * (1 + 1e-12)
    if slots is None:
        certificate = proven.certificate
        assert mt.verify(certificate, problem) == certificate.cost == proven.value
    else:
        assert mt.solve(problem, iterations=200).bound * tokens <= best * (1 + 1e-9)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("capacity", [2, 3, 8])
@pytest.mark.parametrize("parts", [2, 4, 9])
def test_hull_is_below_every_partition(top_k, capacity, parts):
    """No way to lie on parts has fewer pairs for its parts, and each tangent touches one."""
    if capacity * parts < top_k:
        return
    together, spread = visits.find_hull(top_k, capacity, parts)
    least = dict(zip(spread.tolist(), together.tolist(), strict=True))
    seen: dict[int, int] = {}

    def split(left: int, largest: int, sizes: list[int]) -> None:
        if left == 0 and len(sizes) <= parts:
            pairs = sum(size * (size - 1) // 2 for size in sizes)
            seen[len(sizes)] = min(seen.get(len(sizes), pairs), pairs)
        for size in range(1, min(left, largest) + 1):
            split(left - size, size, [*sizes, size])

    split(top_k, capacity, [])
    assert least == seen


def test_forged_numbers_prove_nothing_false():
    """Whatever prices and slopes are, what they prove is true."""
    problem = problem_of(3, 2, (6, 3, None), 3)
    slots, caps = searched(problem)
    best, rng = fewest(problem, caps), np.random.default_rng(0)
    certificate = proven_by(problem, slots, caps).certificate
    (level,) = certificate.visits
    for scale in (0.1, 5.0, 1e6, np.nan):
        wild = level.prices + scale * rng.normal(size=level.prices.shape)
        forged = replace(certificate, visits=(replace(level, prices=wild),))
        assert mt.verify(forged, problem) <= best
    certificate = proven_by(problem, slots, caps, by_tangents=True).certificate
    (level,) = certificate.visits
    for _ in range(5):
        wild = rng.integers(0, 256, level.slopes.shape).astype(np.uint8)
        forged = replace(certificate, visits=(replace(level, slopes=wild),))
        assert mt.verify(forged, problem) <= best


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([(6, 3, None), (5, 2, None), (7, 3, None), (4, 1, None)]),
    top_k=st.integers(1, 4),
    cap=st.sampled_from([None, 1.0, 1.2]),
    slots=st.sampled_from([None, (3, 2, 1), (2, 2, 2)]),
)
def test_prices_prove_what_trying_every_content_proves(seed, size, top_k, cap, slots):
    """The sum of prices, and of the least that a device can hold by visits less prices."""
    if slots is not None:
        size, cap = (6, 3, None), None
    problem = problem_of(seed, 1, size, min(top_k, size[0]), cap, slots)
    (level,) = visits._levels(problem, problem.caps.whole)
    (of,), capacities, load = (
        problem.statistics.sets,
        problem.capacity[0],
        problem.load[0].astype(int),
    )
    prices = np.random.default_rng(seed).integers(-60, 60, problem.num_experts).astype(float)
    most, total = min(int(level.caps[0]), int(load.sum())), 0
    for capacity in capacities:
        values = [np.inf]
        for content in itertools.product((0, 1), repeat=problem.num_experts):
            members = np.flatnonzero(content)
            fewest = problem.num_experts - capacities.sum() + capacity
            others = load.sum() - most * (len(capacities) - 1)
            if fewest <= len(members) <= capacity and others <= load[members].sum() <= most:
                meets = np.isin(of.ids, members).any(axis=1)
                values.append(of.counts[meets].sum() - prices[members].sum())
        total += min(values)
    least = int(of.counts.sum()) * -(-of.top_k // int(capacities.max()))
    proven = visits._core.verify_visits(level.seen, prices)
    assert proven[0] == (max(least, prices.sum() + total) if np.isfinite(total) else least)


@pytest.mark.parametrize("more", [-1, 1, 6])
def test_prices_are_one_for_each_expert(more):
    """Fewer or more of them prove nothing."""
    problem = problem_of(5, 1, (6, 3, None), 2)
    (level,) = visits._levels(problem, problem.caps.whole)
    with pytest.raises(ValueError, match=f"must have 6 prices, got {6 + more}"):
        visits._core.verify_visits(level.seen, np.ones(6 + more))


def test_copies_leave_capacity():
    """Where slots may hold copies, a token visits as many devices as its experts need at least."""
    problem = problem_of(5, 1, (14, 4, None), 6, slots=5)
    result = mt.solve(problem, iterations=500)
    assert result.bound == pytest.approx(2.0)
    assert result.bound_source == "capacity"
    assert result.certificate is None


def test_bound_of_real_routing(data):
    """On recorded routing next to nothing is left to win, and threads change nothing."""
    trace = mt.RoutingTrace.load(data / "gpt-oss-20b-mini.npz").select(layers=range(3))
    statistics = mt.RoutingStatistics.from_trace(trace, transitions=False, sets=True)
    problem = mt.Problem(statistics, mt.Topology(8), regime="dispatch", objective="traffic")
    one, two = [mt.solve(problem, threads=threads, iterations=20_000) for threads in (1, 2)]
    assert one.bound == two.bound
    assert one.certificate == two.certificate
    assert one.gap < 0.06
    assert mt.verify(one.certificate, problem) == one.certificate.cost
    slots, caps = one.placement.slots, problem.caps.whole
    weaker = proven_by(problem, slots, caps, by_tangents=True, steps=effort.TANGENT_STEPS)
    assert one.objective * 0.8 < weaker.value / problem.objective_function.tokens <= one.bound


def test_heavy_experts_share_a_device():
    """Of three heavy experts on two devices two share one, unless they have copies."""
    load = np.array([[9.0, 9, 9, 1, 1, 1]])
    for devices, copied, least in ((2, 0, 18), (2, 1, 10), (3, 0, 10), (6, 0, 0)):
        assert least_shared(load, devices, copied) == [least]
    statistics = mt.RoutingStatistics.from_load(load.astype(int))
    problem = mt.Problem(statistics, mt.Topology(2), objective="balance")
    assert least_balance(problem) == pytest.approx(18 / 15)
