"""Waterfill: a dispatcher gives the shared expert's tokens to devices that wait."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import trace_of

import moetuner as mt

DEVICES, EXPERTS = 3, 6
PLACEMENT = mt.Placement.from_assignment(np.arange(EXPERTS)[None] // 2, DEVICES)


def least_slowest(routed, tokens, speed):
    """Time of the slowest device, the least of all ways to give each token's work to a device."""
    return min(
        max((routed + filled) / speed)
        for filled in itertools.product(range(tokens + 1), repeat=DEVICES)
        if sum(filled) == tokens
    )


@given(st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_devices_are_filled_as_well_as_can_be(tokens, top_k, is_slow, seed):
    """The figure is the best of all fillings, but for the last token, which is not divided."""
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(EXPERTS)[:top_k] for _ in range(tokens)])
    speed = np.array([0.5, 1.0, 1.0] if is_slow else [1.0, 1.0, 1.0])
    topology = mt.Topology(DEVICES, speed=speed.tolist())
    trace = trace_of(ids[:, None], EXPERTS)
    found = mt.evaluate(PLACEMENT, trace, topology, window=None, waterfill=1).imbalance_filled
    routed = np.bincount(ids.ravel() // 2, minlength=DEVICES)
    even = tokens * (top_k + 1) / speed.sum()
    least = least_slowest(routed, tokens, speed) / even
    assert found <= least * (1 + 1e-12)
    assert least <= found + 1 / speed.min() / even + 1e-12


@pytest.mark.parametrize("loads", [[4, 0, 2, 0, 0, 0], [12, 0, 0, 0, 0, 0], [4, 4, 4, 4, 4, 4]])
def test_whole_parts_are_exact(loads):
    """Where an even part is whole tokens, or one device has more than that, nothing is rounded."""
    load, tokens = np.array(loads), sum(loads) // 2
    statistics = mt.RoutingStatistics.from_load(load[None], model="mixtral-8x7b")
    routed = load.reshape(DEVICES, 2).sum(axis=1)
    least = least_slowest(routed, tokens, np.ones(DEVICES)) * DEVICES / (load.sum() + tokens)
    filled = mt.evaluate(PLACEMENT, statistics, waterfill=1).imbalance_filled
    assert filled == pytest.approx(least)


@given(st.floats(0.01, 3), st.integers(0, 99))
def test_small_imbalances_cost_nothing(waterfill, seed):
    """Of k routed experts a token, what is within w / k of even is even; more is lessened by it."""
    load = np.random.default_rng(seed).poisson(50, (8, 2, EXPERTS)) + 1
    layers = mt.Placement(np.repeat(PLACEMENT.slots, 2, axis=0), num_experts=EXPERTS)
    statistics = mt.RoutingStatistics.from_load(load, model="mixtral-8x7b")
    by_device = load.reshape(8, 2, DEVICES, 2).sum(axis=3)
    imbalance = by_device.max(axis=2) / by_device.mean(axis=2)
    filled = np.maximum(imbalance / (1 + waterfill / 2), 1.0)
    evaluation = mt.evaluate(layers, statistics, waterfill=waterfill)
    assert evaluation.imbalance_filled == pytest.approx(filled.mean())
    assert evaluation.imbalance == pytest.approx(imbalance.mean())
    assert mt.evaluate(layers, statistics).imbalance_filled is None


def test_no_gain_is_promised_where_there_is_none():
    """A placement that is more even gains nothing where waterfill evens out the other one, too."""
    load = np.tile([[[105, 103, 100, 100, 97, 95]]], (12, 1, 1)) * 100
    statistics = mt.RoutingStatistics.from_load(load, model="mixtral-8x7b")
    even = mt.Placement([[[0, 5], [1, 4], [2, 3]]])
    before, after = (mt.evaluate(each, statistics, waterfill=1) for each in (PLACEMENT, even))
    judgement = mt.judge(before, after)
    assert judgement.whole["imbalance"].gain > 0.03
    assert judgement.whole["imbalance_filled"].gain == 0
    advice = mt.advise(statistics, mt.Topology(DEVICES), waterfill=1, copies=[0])
    line = next(line for line in advice.reasons if line.startswith("With waterfill"))
    assert line.endswith("even load is then worth 0.0 %.")
