"""Moves from a running placement: caps and rules first, steps that gain most, never worse."""

from itertools import combinations, product

import numpy as np
import pytest

import moetuner as mt
from moetuner.solver.result import Limits
from moetuner.solver.search.layerwise import Search
from moetuner.solver.search.move_cost import lawful


def statistics(seed=0, windows=3, layers=3, experts=16, transitions=False):
    """Skewed loads in windows; with transitions between neighbouring experts if asked for."""
    random = np.random.default_rng(seed)
    load = np.round(random.lognormal(3, 1, (windows, layers, experts))).astype(np.int64) + 1
    table = random.integers(0, 50, (layers - 1, experts, experts)) if transitions else None
    return mt.RoutingStatistics(load, table)


def contiguous(layers, experts, devices):
    """Give the placement that engines start with."""
    device_of = np.tile(np.arange(experts) * devices // experts, (layers, 1))
    return mt.Placement.from_assignment(device_of, devices)


def excess(problem, placement):
    """By what part caps are exceeded, summed over layers."""
    return problem.caps.excess(placement).sum()


GOALS = [
    {"objective": "balance"},
    {"objective": "balance", "slots_per_device": 5},
    {"objective": "balance", "max_imbalance": 1.1},
    {"objective": "balance", "risk": 0.5},
    {"objective": "time", "regime": "dispatch"},
    {"objective": "time", "regime": "follow", "transitions": True},
    {"objective": "traffic", "regime": "follow", "max_imbalance": 1.3, "transitions": True},
    {"objective": "traffic", "regime": "follow", "slots_per_device": 5, "transitions": True},
]


def problem_of(goal, seed=0):
    """Make a problem of a goal, on four devices in two nodes."""
    rest = dict(goal)
    counts = statistics(seed, transitions=rest.pop("transitions", False))
    return mt.Problem(counts, mt.Topology(4, devices_per_node=2), **rest)


@pytest.mark.parametrize("goal", GOALS)
def test_figures_of_steps_are_what_placements_have(goal):
    """Moves and excess after every step are a fresh count's; a layer's own cost is exact, too."""
    problem, initial = problem_of(goal), contiguous(3, 16, 4)
    start = lawful(problem, initial)
    path, _ = Search(problem, 0).descend(start, initial, np.inf, Limits())
    assert len(path.moved) > 5
    for steps in range(len(path.moved)):
        placement = mt.Placement(path.after(steps), num_experts=16)
        assert path.moved[steps] == initial.diff(placement).experts_moved
        assert path.excess[steps] == pytest.approx(excess(problem, placement), abs=1e-9)
        if goal.get("objective") == "balance" and "risk" not in goal:
            gain = mt.Objective(problem).value(placement) - mt.Objective(problem).value(initial)
            assert path.value[steps] == pytest.approx(gain, abs=1e-5)


def test_steps_follow_traffic_between_layers():
    """A step in one layer changes what steps in the next are worth: figures stay right."""
    problem, initial = problem_of(GOALS[-1]), contiguous(3, 16, 4)
    start = lawful(problem, initial)
    path, _ = Search(problem, 0).descend(start, initial, np.inf, Limits())
    for steps in (1, len(path.moved) // 2, len(path.moved) - 1):
        placement = mt.Placement(path.after(steps), num_experts=16)
        gain = mt.Objective(problem).value(placement) - mt.Objective(problem).value(initial)
        # Balance counts a thousandth part, to decide between equals.
        assert path.value[steps] == pytest.approx(gain, rel=0.02, abs=0.002)


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_do_not_depend_on_threads(threads):
    """One start, one way down."""
    problem, initial = problem_of(GOALS[0]), contiguous(3, 16, 4)
    paths = [
        Search(problem, 0).descend(lawful(problem, initial), initial, 9, Limits(threads=n))[0]
        for n in (1, threads)
    ]
    assert np.array_equal(paths[0].places, paths[1].places)
    assert paths[0].moved[-1] <= 9


def plain_greedy(problem, initial, budget):
    """Make the exchange that gains most for a move, until the budget is used up: a plain loop."""
    now, value = initial.device_of.copy(), mt.Objective(problem).value(initial)
    while True:
        best = (1e-12, None, None)
        for layer, (e, f) in product(
            range(problem.layers), combinations(range(problem.experts), 2)
        ):
            if now[layer, e] == now[layer, f]:
                continue
            other = now.copy()
            other[layer, [e, f]] = other[layer, [f, e]]
            placement = mt.Placement.from_assignment(other, problem.devices)
            moves = (
                initial.diff(placement).experts_moved
                - initial.diff(mt.Placement.from_assignment(now, problem.devices)).experts_moved
            )
            found = mt.Objective(problem).value(placement)
            worth = (value - found) / (moves if moves > 0 else 1e-3)
            if worth > best[0] and initial.diff(placement).experts_moved <= budget:
                best = (worth, other, found)
        if best[1] is None:
            return value
        now, value = best[1], best[2]


@pytest.mark.parametrize("budget", [4, 12])
def test_a_budget_gains_what_a_plain_greedy_does(budget):
    """At the same budget, the objective is at least as low as by the best exchange each time."""
    counts = statistics(5, windows=4, layers=2, experts=12)
    problem = mt.Problem(counts, mt.Topology(3), objective="balance")
    initial = contiguous(2, 12, 3)
    result = mt.solve(problem, initial=initial, move_budget=budget, iterations=2000)
    assert initial.diff(result.placement).experts_moved <= budget
    assert result.objective <= plain_greedy(problem, initial, budget) * (1 + 1e-9)


def test_a_front_has_many_points():
    """From few moves to many, there is something to choose from."""
    problem = mt.Problem(statistics(2, layers=4, experts=32), mt.Topology(8), objective="balance")
    front = mt.pareto(problem, contiguous(4, 32, 8), iterations=500)
    assert len(front) >= 10
    assert front[1].experts_moved <= 2


@pytest.mark.parametrize("budget", [2, 6, 60])
def test_excess_comes_before_value(budget):
    """A running placement above the cap gets below it first, as far as a budget allows."""
    problem = mt.Problem(
        statistics(1),
        mt.Topology(4),
        max_imbalance=1.2,
        objective="traffic",
        regime="follow",
    )
    initial = contiguous(3, 16, 4)
    before = excess(problem, initial)
    result = mt.solve(problem, initial=initial, move_budget=budget, iterations=500)
    after = excess(problem, result.placement)
    assert 0 < result.details["experts_moved"] <= budget
    assert after < before
    told = result.details.get("caps_raised", {})
    assert bool(told) == (after > 0)
    assert len(told) == (problem.caps.excess(result.placement) > 0).sum()
    if budget == 60:
        assert not after


def test_a_front_goes_below_the_cap_first():
    """More moves exceed caps less, or as much at a lower objective; the last keep them."""
    problem = problem_of({**GOALS[6], "max_imbalance": 1.1})
    front = mt.pareto(problem, contiguous(3, 16, 4), iterations=500)
    ranks = [(excess(problem, each.placement), each.objective) for each in front]
    assert ranks == sorted(ranks, reverse=True)
    assert front[0].caps_raised
    assert not front[-1].caps_raised


def least_moves(problem, initial):
    """Try every placement of one copy each: the fewest moves to one that keeps the rules."""
    total = 0
    for layer in range(problem.layers):
        best = np.inf
        for device_of in product(range(problem.devices), repeat=problem.experts):
            held = np.zeros((problem.devices, problem.experts), dtype=bool)
            held[device_of, range(problem.experts)] = True
            rules = problem.rules
            if (held.sum(axis=1) > problem.capacity[layer]).any():
                continue
            if rules.pinned is not None and (rules.pinned[layer].T & ~held).any():
                continue
            if rules.forbidden is not None and (rules.forbidden[layer].T & held).any():
                continue
            best = min(best, (held & ~initial.held[layer]).sum())
        total += best
    return int(total)


@pytest.mark.parametrize("seed", range(12))
def test_rules_are_kept_by_the_fewest_moves(seed):
    """No placement that keeps the rules is nearer, and a budget of so many moves is enough."""
    random = np.random.default_rng(seed)
    counts = statistics(seed, layers=2, experts=6)
    rules = {"pinned": [], "forbidden": []}
    for _ in range(random.integers(1, 6)):
        where = (int(random.integers(2)), int(random.integers(6)), int(random.integers(3)))
        name = "pinned" if random.random() < 0.3 else "forbidden"
        trial = {**rules, name: [*rules[name], where]}
        layers = [at[:2] for at in trial["pinned"]]
        try:
            mt.Problem(counts, mt.Topology(3), **trial)
        except ValueError:
            continue
        if len(set(layers)) == len(layers):
            rules = trial
    problem = mt.Problem(counts, mt.Topology(3), objective="balance", **rules)
    initial = mt.Placement.from_assignment(
        np.stack([random.permutation(np.arange(6) % 3) for _ in range(2)]), 3
    )
    fewest = least_moves(problem, initial)
    placement = mt.Placement(lawful(problem, initial), num_experts=6)
    assert not problem.rules.violations(placement)
    assert initial.diff(placement).experts_moved == fewest
    result = mt.solve(problem, initial=initial, move_budget=fewest, iterations=200)
    assert not problem.rules.violations(result.placement)
    if fewest:
        with pytest.raises(
            ValueError, match=f"too small: .* to keep all rules takes {fewest} moves"
        ):
            mt.solve(problem, initial=initial, move_budget=fewest - 1)


def test_a_front_keeps_rules_from_its_first_point():
    """Where the running placement breaks a pin, no point of the front does."""
    problem = mt.Problem(
        statistics(3), mt.Topology(4), objective="balance", pinned=[(0, 0, 3), (2, 5, 0)]
    )
    front = mt.pareto(problem, contiguous(3, 16, 4), iterations=500)
    assert all(not problem.rules.violations(each.placement) for each in front)
    assert front[0].experts_moved == 4


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("limit", [0, 0.05])
def test_nothing_ends_worse_than_staying(goal, limit):
    """In any time, with moves at their price, what comes out is worth what it takes."""
    problem = problem_of(goal)
    initial = mt.solve(problem, "heuristic", iterations=2000).placement
    price = mt.Objective(problem).value(initial) / 1000
    for cost in (0.0, price):
        result = mt.solve(problem, initial=initial, move_cost=cost, time_limit=limit)
        moved = initial.diff(result.placement).experts_moved
        after = (excess(problem, result.placement), result.objective + cost * moved)
        assert after <= (excess(problem, initial), mt.Objective(problem).value(initial))


@pytest.mark.parametrize("goal", GOALS)
def test_an_initial_placement_is_no_handicap(goal):
    """Where moves are free, a poor one that runs costs nothing: the answer is a fresh solve's."""
    problem, initial = problem_of(goal), contiguous(3, 16, 4)
    fresh = mt.solve(problem, "heuristic", iterations=1000)
    result = mt.solve(problem, "heuristic", iterations=1000, initial=initial)
    assert (excess(problem, result.placement), result.objective) <= (
        excess(problem, fresh.placement),
        fresh.objective,
    )


def test_what_is_proven_from_nothing_is_proven_from_what_runs():
    """Where moves are free and the optimum can be proven, it is, whatever runs."""
    problem = mt.Problem(
        statistics(4, layers=2, experts=8, transitions=True),
        mt.Topology(4),
        max_imbalance=2.0,
        objective="traffic",
        regime="follow",
    )
    fresh = mt.solve(problem)
    for initial in (contiguous(2, 8, 4), fresh.placement):
        result = mt.solve(problem, initial=initial)
        assert (result.status, result.objective) == ("optimal", fresh.objective)
        assert result.bound == fresh.bound
