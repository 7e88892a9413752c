"""What a placement breaks is said: by the problem, by solve, and on the command line."""

import itertools

import numpy as np
import pytest

import moetuner as mt
from moetuner import _core, solver

SLOTS = (7, 7, 9, 9)
PINNED = [(0, 0, 3), (0, 9, 0), (2, 30, 1)]
FORBIDDEN = [(1, 20, 2), (1, 5, 1), (2, 1, 0), (2, 1, 3)]
KEEP_ALL = ("joint", "heuristic", "lpt", "eplb", "exflow")


def ruled(**given):
    """Three layers of 32 experts on four devices with unequal slots, pins and bans."""
    random = np.random.default_rng(0)
    load = random.integers(10, 100, (1, 3, 32))
    table = random.integers(0, 30, (2, 32, 32))
    rules = {"slots_per_device": SLOTS, "pinned": PINNED, "forbidden": FORBIDDEN} | given
    statistics = mt.RoutingStatistics(load, table)
    return mt.Problem(statistics, mt.Topology(4), objective="traffic", **rules)


@pytest.mark.parametrize("method", solver.METHODS)
def test_methods_keep_rules_or_say_what_they_break(method):
    """Slots, pins and bans; methods that ignore loads keep the slots at least."""
    result = mt.solve(ruled(), method, iterations=2000)
    slots = result.placement.slots
    broken = {
        "slots": ((slots >= 0).sum(axis=2) > SLOTS).any(),
        "pinned": any(expert not in slots[layer, device] for layer, expert, device in PINNED),
        "forbidden": any(expert in slots[layer, device] for layer, expert, device in FORBIDDEN),
    }
    said = {line.split(":")[0] for line in result.violations}
    assert said == {rule for rule, is_broken in broken.items() if is_broken}
    assert (result.status == "violates rules") == bool(said)
    assert not (method in KEEP_ALL and said)
    assert method == "paper" or "slots" not in said


def test_each_rule_is_named_with_its_first_case():
    """One sentence a rule; nothing for a placement that keeps them."""
    block = np.tile(np.arange(32).reshape(1, 4, 8), (3, 1, 1))
    lines = ruled(max_imbalance=1.01).violations(mt.Placement(block))
    rules = ["slots", "pinned", "forbidden", "max_imbalance"]
    assert [line.split(":")[0] for line in lines] == rules
    assert "layer 0 has 8 experts on device 0, which has 7 slots, and 5 more" in lines[0]
    assert "expert 0 of layer 0 is not on device 3, and 2 more" in lines[1]
    keeps = mt.solve(ruled(max_imbalance=1.3), "heuristic", iterations=2000).placement
    assert ruled(max_imbalance=1.3).violations(keeps) == ()


@pytest.mark.parametrize("seed", range(3))
def test_caps_are_raised_for_all_methods_alike(seed):
    """A cap that none can keep is no rule that a method breaks, but as far as it goes beyond."""
    rng = np.random.default_rng(seed)
    load = rng.integers(5, 20, (1, 3, 16))
    load[0, 1, 3] = 300  # more than a device may carry, wherever it is
    load[0, 2] = np.where(np.arange(16) < 4, 300, 5)  # together under contiguous
    problem = mt.Problem(mt.RoutingStatistics(load), mt.Topology(4), max_imbalance=1.2)
    cap = 1.2 * load[0].sum(axis=1) / 4
    results = {name: mt.solve(problem, name) for name in ("joint", "paper", "lpt", "contiguous")}
    over = {
        name: [
            layer
            for layer, slots in enumerate(result.placement.slots)
            if max(load[0, layer, row].sum() for row in slots) > cap[layer] * (1 + 1e-9)
        ]
        for name, result in results.items()
    }
    assert [over[name] for name in ("joint", "paper", "lpt")] == [[1]] * 3
    for name, result in results.items():
        assert bool(result.violations) == bool(over[name])
        is_broken = name == "contiguous"
        assert (result.status == "violates rules") == is_broken, name
        assert [*result.details.caps.raised] == ([] if is_broken else [1])


def test_caps_are_told_of_slots_that_were_filled():
    """What is told of a cap is true of the answer, whose empty slots were filled at the end."""
    statistics = mt.RoutingStatistics.from_load(np.array([[[10, 5, 5, 5, 5]]]))
    problem = mt.Problem(statistics, mt.Topology(3), max_imbalance=1.2, fill_slots=True)
    initial = mt.Placement(np.array([[[0, -1], [1, 2], [3, 4]]], dtype=np.int32), num_experts=5)
    result = mt.solve(problem, initial=initial, time_limit=0)
    assert result.details.caps.raised == {0: pytest.approx(1.25)}
    assert result.status == "time_limit"


def test_caps_are_kept_where_nothing_else_counts():
    """Without pairs balance is all there is to do, and is done."""
    random = np.random.default_rng(0)
    load = np.stack([1 + random.multinomial(7992, random.dirichlet([2.0] * 8)) for _ in range(16)])
    load = random.permuted(load.reshape(1, 4, 32), axis=2)
    problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(4), max_imbalance=1.001)
    assert mt.solve(problem, "heuristic").violations == ()


@pytest.mark.parametrize("regime", ["dispatch", "follow"])
def test_tables_without_traffic_are_no_reason_to_fail(regime):
    """Pairs without tokens, or a layer that nothing follows: all placements are as good."""
    load, table = np.zeros((1, 2, 4), dtype=np.int64), np.ones((2, 4, 4), np.int64)
    statistics = mt.RoutingStatistics(load, None, table - np.eye(4, dtype=np.int64))
    if regime == "follow":
        statistics = mt.RoutingStatistics([[[3, 4, 5, 6]]], np.zeros((0, 4, 4), dtype=np.int64))
    problem = mt.Problem(statistics, mt.Topology(2), regime=regime, objective="time")
    assert mt.solve(problem, iterations=100).violations == ()


@pytest.mark.parametrize("seed", range(40))
def test_experts_short_of_slots_are_found(seed):
    """Experts that may be nowhere else are named with their devices, if any lack slots (Hall)."""
    random = np.random.default_rng([34, seed])
    experts, devices = int(random.integers(1, 7)), int(random.integers(1, 4))
    forbidden = random.random((experts, devices)) < random.choice([0.2, 0.5, 0.7])
    capacity = random.integers(0, 4, devices)
    shortage = _core.find_shortage(forbidden, capacity.tolist())
    # Devices to which so many experts are confined that slots do not suffice.
    subsets = [np.array(subset) for subset in itertools.product((False, True), repeat=devices)]
    short = [
        subset
        for subset in subsets
        if (forbidden | subset).all(axis=1).sum() > capacity[subset].sum()
    ]
    assert (shortage is not None) == bool(short)
    if shortage is not None:
        count, found = shortage
        confined = forbidden[:, np.setdiff1d(np.arange(devices), found)].all(axis=1)
        assert count == capacity[found].sum() + 1 <= confined.sum()
