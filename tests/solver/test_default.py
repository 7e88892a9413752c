"""The default is never behind cheaper methods, other goals or the plugins by its own objective."""

from dataclasses import replace

import numpy as np
import pytest
from instances import routing

import moetuner as mt
from moetuner.plugins import rebalance_experts
from moetuner.solver import EFFORTS

# Sums of floats in another order; and what a full search for the other goal may find by chance.
ROUNDING, CHANCE = 1 + 1e-9, 1.002
# One node of four devices, and two nodes of two.
ONE, TWO = mt.Topology(4), mt.Topology(4, devices_per_node=2)


def drawn_loads(windows, seed):
    """Draw a load table [W,2,16] of two kinds of traffic that take turns."""
    random = np.random.default_rng(seed)
    popular = random.lognormal(0, 1, (2, 2, 16))
    tokens = 4000 * popular / popular.sum(axis=2, keepdims=True)
    return random.poisson(tokens[np.arange(windows) % 2]).astype(np.uint64)


def shorten(monkeypatch, times):
    """Have the default search layers for a part of its work."""
    default = EFFORTS["default"]
    short = replace(default, layer_work=default.layer_work / times)
    monkeypatch.setitem(EFFORTS, "default", short)


def plugin_slots(problem):
    """Return what the engines' plugins make of the problem's windows, from the first map on."""
    devices, slots = problem.devices, problem.slots
    first = np.tile(np.arange(devices * slots) % problem.num_experts, (problem.layers, 1))
    loads = problem.statistics.window_load.astype(float)
    packed = rebalance_experts(loads, devices * slots, 1, 1, devices, first)
    return mt.Placement(
        packed.reshape(problem.layers, devices, slots), num_experts=problem.num_experts
    )


@pytest.mark.parametrize(
    ("machine", "slots", "windows"),
    [(ONE, 4, 12), (ONE, 5, 12), (TWO, 4, 1), (TWO, 5, 3)],
)
def test_no_other_method_is_better_by_the_goal_of_the_default(monkeypatch, machine, slots, windows):
    """What cheaper methods, the other goal and the plugins find is never better than the answer."""
    shorten(monkeypatch, 20)
    statistics = mt.RoutingStatistics.from_load(drawn_loads(windows, seed=windows + slots))
    problems = {
        goal: mt.Problem(statistics, machine, slots_per_device=slots, objective=goal)
        for goal in ("time", "balance")
    }
    answers = {goal: mt.solve(problem) for goal, problem in problems.items()}
    for goal, problem in problems.items():
        others = {
            method: mt.solve(problem, method).placement
            for method in ("quick", "eplb", "lpt", "paper")
        }
        others["plugins"] = plugin_slots(problem)
        objective = answers[goal].objective
        for name, placement in others.items():
            assert objective <= problem.value(placement) * ROUNDING, (goal, name)
        other = answers["balance" if goal == "time" else "time"].placement
        assert objective <= problem.value(other) * CHANCE, goal


@pytest.mark.parametrize(("devices", "slots"), [(16, 9), (8, 16)])
def test_balance_of_large_layers_is_no_better_by_time(monkeypatch, devices, slots):
    """Of 128 experts in 20 windows, with the work for each layer that 300 layers get."""
    shorten(monkeypatch, 100)
    random = np.random.default_rng(devices)
    kinds = random.lognormal(0, 0.8, (10, 3, 128))
    tokens = 5e5 * kinds / kinds.sum(axis=2, keepdims=True)
    loads = random.poisson(tokens[np.arange(20) % 10])
    counts, machine = mt.RoutingStatistics.from_load(loads), mt.Topology(devices)
    time, balance = (
        mt.Problem(counts, machine, slots_per_device=slots, objective=goal)
        for goal in ("time", "balance")
    )
    other = mt.solve(balance, "heuristic").placement
    assert mt.solve(time, "heuristic").objective <= time.value(other) * ROUNDING


@pytest.mark.parametrize(("layers", "experts", "top_k", "slots"), [(2, 64, 6, 9), (4, 32, 4, 5)])
def test_equally_fast_devices_have_no_better_placement(layers, experts, top_k, slots):
    """Two nodes of four devices, one of them a tenth faster: what serves equal ones is a start."""
    seen = routing(layers, experts, top_k, tokens=3000, types=12)
    statistics = mt.RoutingStatistics.from_trace(seen, window=500, sets=True)
    equal = mt.Topology(8, devices_per_node=4)
    simpler, problem = (
        mt.Problem(statistics, machine, slots_per_device=slots)
        for machine in (equal, replace(equal, speed=[1.0] * 4 + [1.1] * 4))
    )
    answers = [mt.solve(each, "heuristic", iterations=100) for each in (simpler, problem)]
    assert answers[1].objective <= problem.value(answers[0].placement) * ROUNDING
