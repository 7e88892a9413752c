"""Fewest visits: the optimum of tiny instances under the cap, better than pairs on real routing."""

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make import random_ids, trace_of
from test_visits import fewest

import moetuner as mt
from moetuner.solver import effort


@settings(max_examples=5)
# Searches of pairs and of one layer at a time missed these.
@example(seed=0, per_node=2, cap=1.2)
@example(seed=3, per_node=None, cap=1.2)
@given(
    seed=st.integers(0, 1000),
    per_node=st.sampled_from([None, 2, (3, 1)]),
    cap=st.sampled_from([None, 1.2]),
)
@mock.patch.object(effort, "POLISHED_SLOTS", 0)
def test_reaches_the_optimum(seed, per_node, cap):
    """Enumeration of all placements finds none with fewer visits under the cap."""
    trace = trace_of(random_ids(60, 2, 3, 8, seed=seed))
    statistics = mt.RoutingStatistics.from_trace(trace, sets=True)
    topology = mt.Topology(4, devices_per_node=per_node)
    problem = mt.Problem(statistics, topology, objective="traffic", max_imbalance=cap)
    result = mt.solve(problem, "heuristic", iterations=20_000)
    best = fewest(problem, problem.caps.raised_for(result.placement.slots))
    assert result.objective * problem.objective_function.tokens == pytest.approx(best)


def test_beats_pairs_on_real_routing(data):
    """On what it saw, under the same cap, and with tiers on nodes."""
    trace = mt.RoutingTrace.load(data / "gpt-oss-20b-mini.npz")
    statistics = mt.RoutingStatistics.from_trace(trace, transitions=False, sets=True)
    flat, tiers = mt.Topology(8), mt.Topology(8, devices_per_node=4)

    def judged(statistics, topology):
        problem = mt.Problem(statistics, topology, objective="traffic", max_imbalance=1.05)
        placement = mt.solve(problem, "heuristic", iterations=20_000).placement
        assert problem.violations(placement) == ()
        return mt.evaluate(placement, trace, tiers)

    pairs = judged(replace(statistics, sets=None), flat)
    exact, nodes = judged(statistics, flat), judged(statistics, tiers)
    assert exact.fanout < pairs.fanout
    assert nodes.node_fanout < exact.node_fanout
