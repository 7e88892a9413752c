"""Balance, time and their terms against every placement of tiny problems."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from brute_force import every_placement
from hypothesis import given, settings
from hypothesis import strategies as st

import moetuner as mt

SPLITS = ("even", "nearest", "round_robin")
# Joined layers are searched from many starts: fewer examples do.
few = settings(max_examples=max(settings.default.max_examples // 3, 1))


def loads(windows, experts, layers=1):
    """Strategy of load tables [W,L,E] without an empty window."""
    cells = st.integers(1, 60)
    size = windows * layers * experts
    return st.lists(cells, min_size=size, max_size=size).map(
        lambda flat: np.array(flat, dtype=np.uint64).reshape(windows, layers, experts)
    )


def optimum(problem):
    """Least ``Problem.value`` of all placements."""
    return min(problem.value(placement) for placement in every_placement(problem))


def solved(problem, **arguments):
    """Objective of the search, after checking what must hold of every answer."""
    result = mt.solve(problem, **arguments)
    assert result.objective == problem.value(result.placement)
    held = (result.placement.slots >= 0).sum(axis=2)
    assert (held <= problem.rooms).all()
    if result.bound is not None:
        assert result.bound <= result.objective * (1 + 1e-9)
    for rules, there in ((problem.pinned, True), (problem.forbidden, False)):
        for layer, expert, device in rules:
            layers = range(problem.layers) if layer is None else [layer]
            assert all(result.placement.held[at, device, expert] == there for at in layers)
    return result.objective


@st.composite
def problems(draw, *, risks=("mean",), minimax=False):
    """One layer, up to four experts on up to three devices, with every term that there is."""
    experts, devices = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    count = draw(st.integers(1, 3))
    group = np.arange(count) % 2 if minimax else None
    statistics = mt.RoutingStatistics.from_load(
        draw(loads(count, experts)),
        **({} if group is None else {"group": group, "group_names": ("a", "b")}),
    )
    speed = draw(st.sampled_from([None, [1.0, 2.0, 1.5][:devices]]))
    nodes = draw(st.sampled_from([None, 1]))
    fewest = -(-experts // devices)
    return mt.Problem(
        statistics,
        mt.Topology(devices, nodes, speed=speed),
        slots_per_device=draw(st.integers(fewest, 2)),
        objective="balance",
        split=draw(st.sampled_from(SPLITS)),
        risk=draw(st.sampled_from(risks)),
        groups=None if group is None else "minimax",
    )


@given(problems())
def test_balance_is_the_optimum(problem):
    """One window or few, any speeds, nodes and split: nothing is better."""
    best = optimum(problem)
    assert solved(problem) == pytest.approx(best, rel=1e-9)
    assert mt.objective.least_balance(problem) <= best * (1 + 1e-9)


@given(st.one_of(problems(risks=(0.5, 0.9)), problems(minimax=True)))
def test_risk_is_near_the_optimum(problem):
    """Windows are weighed anew, which finds what is best for some weights: not always the best."""
    best = optimum(problem)
    assert best * (1 - 1e-9) <= solved(problem) <= best * 1.1
    assert mt.objective.least_balance(problem) <= best * (1 + 1e-9)


@given(problems(), st.data())
def test_rules_are_kept_at_the_optimum(problem, data):
    """With a pin and a ban the answer is the best of what they leave."""
    cells = st.tuples(
        st.just(0), st.integers(0, problem.experts - 1), st.integers(0, problem.devices - 1)
    )
    pin, ban = data.draw(cells), data.draw(cells)
    try:
        ruled = replace(problem, pinned=[pin], forbidden=[ban])
    except ValueError:
        # A ban may leave too little room; then no placement keeps the rules.
        every = list(every_placement(problem))
        assert not any(kept(each, pin) and not kept(each, ban) for each in every)
        return
    every = [each for each in every_placement(problem) if kept(each, pin) and not kept(each, ban)]
    assert every
    assert solved(ruled) == pytest.approx(min(map(ruled.value, every)), rel=1e-9)


def kept(placement, rule):
    """Whether a rule's expert is on its device."""
    layer, expert, device = rule
    return placement.held[layer, device, expert]


@given(problems())
def test_another_slot_never_hurts(problem):
    """What a placement can be only grows with the slots."""
    more = replace(problem, slots_per_device=problem.slots + 1)
    assert optimum(more) <= optimum(problem) * (1 + 1e-12)
    assert solved(more) <= optimum(problem) * (1 + 1e-9)


@given(problems(), st.integers(0, 2), st.floats(1.01, 3))
def test_a_faster_device_never_hurts(problem, device, factor):
    """Time, not imbalance: the mean that the latter is of falls as well."""
    speed = problem.topology.speed_of_device.copy()
    speed[device % problem.devices] *= factor
    faster = replace(problem, topology=replace(problem.topology, speed=speed.tolist()))
    assert slowest(faster) <= slowest(problem) * (1 + 1e-9)


def slowest(problem):
    """Least mean of the slowest device's time over windows, as tokens at speed 1."""
    scale = float((problem.windows.weight * mt.objective.mean_time(problem)).sum())
    return optimum(problem) * scale if problem.windows.is_mean else 0.0


@few
@given(st.data())
def test_time_on_joined_layers(data):
    """Compute and links together: the objective is ``Problem.value``, and nothing is better."""
    problem = data.draw(joined())
    best = optimum(problem)
    found = solved(problem, iterations=3000)
    assert found == pytest.approx(best, rel=1e-9)


@st.composite
def joined(draw):
    """Two layers of three or four experts on two devices, joined by transitions."""
    experts, layers = draw(st.integers(2, 4)), 2
    counts = st.lists(st.integers(0, 30), min_size=experts**2, max_size=experts**2)
    table = np.array(draw(counts), dtype=np.uint64).reshape(layers - 1, experts, experts)
    load = draw(loads(draw(st.integers(1, 2)), experts, layers))
    slots = draw(st.integers(-(-experts // 2), min(experts, 3)))
    return mt.Problem(
        mt.RoutingStatistics(load, table),
        mt.Topology(2, draw(st.sampled_from([None, 1]))),
        slots_per_device=slots,
        objective="time",
        cost_model=mt.CostModel.preset("h100"),
        split=draw(st.sampled_from(SPLITS)),
    )


def test_eight_experts_with_copies():
    """The example of the requirements: no placement of sixteen slots is below 196.67."""
    load = np.array([[600, 560, 120, 120, 20, 10, 10, 10]])
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(8),
        slots_per_device=2,
        objective="balance",
    )
    assert solved(problem) * load.sum() / 8 == pytest.approx(590 / 3, abs=1e-9)


@given(loads(2, 6, 3), st.integers(2, 4), st.integers(0, 12))
def test_extra_slots_are_even(load, devices, extra):
    """As many slots as asked for; no device has two more than another over all layers."""
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(devices),
        extra_slots=extra,
        objective="balance",
    )
    assert problem.rooms.sum() == 3 * 6 + extra
    assert np.ptp(problem.rooms.sum(axis=0)) <= 1
    assert (problem.rooms.sum(axis=1) >= 6).all()
    assert (problem.rooms.sum(axis=1) <= 6 * devices).all()
    solved(problem, iterations=500)


@given(loads(2, 6, 2), st.integers(0, 5), st.integers(0, 2**31), st.sampled_from([6, 9]))
def test_migration_keeps_its_budget(load, budget, seed, slots):
    """No more experts move than may, those that stay keep their slots, and nothing gets worse."""
    problem = mt.Problem(
        mt.RoutingStatistics.from_load(load),
        mt.Topology(3),
        slots_per_device=slots // 3,
        objective="balance",
    )
    random = np.random.default_rng(seed)
    initial = np.full((2, 3, slots // 3), -1)
    for layer in range(2):
        initial[layer, :, :2] = random.permutation(6).reshape(3, 2)
    initial = mt.Placement(initial, num_experts=6)
    result = mt.solve(
        problem, initial=initial, move_budget=budget * 10.0, expert_bytes=10.0, iterations=500
    )
    diff = initial.diff(result.placement)
    assert diff.experts_moved <= budget
    assert diff.experts_moved == result.details["experts_moved"]
    assert result.objective <= problem.value(initial) * (1 + 1e-12)
    stays = initial.held & result.placement.held
    for layer, device, slot in itertools.product(range(2), range(3), range(slots // 3)):
        expert = initial.slots[layer, device, slot]
        if expert >= 0 and stays[layer, device, expert]:
            assert result.placement.slots[layer, device, slot] == expert
    if budget == 0:
        assert result.placement == initial or result.objective < problem.value(initial)


def test_bound_of_visits_is_in_visits(make_trace):
    """A token visits at least one device, and the bound says so."""
    stats = mt.RoutingStatistics.from_trace(make_trace(300), window=64, sets=True)
    problem = mt.Problem(stats, mt.Topology(4), regime="dispatch", max_imbalance=1.3)
    result = mt.solve(problem, iterations=500)
    assert 1 - 1e-6 <= result.bound <= result.objective
