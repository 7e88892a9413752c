"""Groups of a router placed whole."""

import numpy as np
import pytest
from make import random_ids, trace_of

import moetuner as mt
from moetuner import router_groups

EXPERTS = 16


def count(ids, experts=EXPERTS):
    """Count routed experts [T,L,K]."""
    trace = trace_of(ids, experts)
    return mt.RoutingStatistics.from_trace(trace, window=64, sets=False)


STATISTICS = count(random_ids(400, 3, 2, EXPERTS, seed=0))


def test_groups_are_counted_as_a_trace_of_groups_is():
    """With one expert per token, merging is what counting the groups gives."""
    ids = random_ids(400, 3, 1, EXPERTS, seed=1)
    one = router_groups.merge(count(ids), 4)
    assert one.fingerprint == count(ids // 4, 4).fingerprint


@pytest.mark.parametrize("devices", [2, 4])
def test_a_placement_of_groups_is_worth_the_same_as_one_of_experts(devices):
    """Cost and loads of groups are those of their experts, and groups stay whole."""
    counted, topology = STATISTICS, mt.Topology(devices)
    rules = {"regime": "follow", "max_imbalance": 2.0}
    groups = mt.Problem(router_groups.merge(counted, 4), topology, **rules)
    result = mt.solve(groups, iterations=1000)
    placement = router_groups.expand(result.placement, EXPERTS)
    fine = mt.Problem(counted, topology, **rules)
    assert fine.objective_function.cost(placement) == groups.objective_function.cost(
        result.placement
    )
    assert fine.objective_function.value(placement) == result.objective
    device_of = placement.device_of.reshape(-1, 4, 4)
    assert (device_of == device_of[:, :, :1]).all()


def test_with_more_devices_than_groups_each_keeps_to_its_own():
    """Four groups on eight devices: two for each."""
    rules = router_groups.forbid(EXPERTS, 4, 8)
    problem = mt.Problem(STATISTICS, mt.Topology(8), max_imbalance=2.0, forbidden=rules)
    placement = mt.solve(problem, iterations=1000).placement
    assert (placement.device_of // 2 == np.arange(EXPERTS) // 4).all()
