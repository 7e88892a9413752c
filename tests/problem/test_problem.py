"""Problem: exact costs, exact caps, and limits that make sense."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt


def statistics(seed=0, layers=3, experts=6, top=50):
    """Random counts with pairs."""
    rng = np.random.default_rng(seed)
    together = rng.integers(0, top, (layers, experts, experts))
    together = np.triu(together, 1) + np.triu(together, 1).swapaxes(1, 2)
    return mt.RoutingStatistics(
        rng.integers(0, top, (2, layers, experts)),
        rng.integers(0, top, (layers - 1, experts, experts)),
        together,
    )


@given(st.integers(0, 10**6), st.sampled_from([2, 50, 2**54]), st.sampled_from([None, 1, 2]))
def test_cost_is_the_plain_sum(seed, top, node):
    """Both regimes' costs equal a loop over pairs in Python integers, also of huge counts."""
    stats = statistics(seed, top=top)
    topology = mt.Topology(4, node)
    device_of = np.random.default_rng(seed).integers(0, 4, (3, 6))
    placement = mt.Placement.from_assignment(device_of, 4)
    follow = dispatch = 0
    for layer, e, f in np.ndindex(3, 6, 6):
        if layer < 2:
            cost = topology.cost[device_of[layer, e], device_of[layer + 1, f]]
            follow += int(stats.transitions[layer, e, f]) * int(cost)
        if e < f and device_of[layer, e] != device_of[layer, f]:
            dispatch += int(stats.coactivation[layer, e, f])
    for regime, cost in (("follow", follow), ("dispatch", dispatch)):
        problem = mt.Problem(stats, topology, slots_per_device=6, regime=regime)
        assert problem.objective_function.cost(placement) == cost


@given(st.integers(0, 10**6), st.fractions(1, 4, max_denominator=100))
def test_caps_are_the_largest_whole_load_allowed(seed, ratio):
    """A device may carry floor(ratio * mean), up to the rounding of the ratio itself."""
    stats = statistics(seed)
    problem = mt.Problem(stats, mt.Topology(3), max_imbalance=float(ratio))
    for total, cap in zip(
        stats.total_load.sum(axis=1).tolist(), problem.caps.whole.tolist(), strict=True
    ):
        exact = min(ratio * total / 3, Fraction(total))
        assert exact - 1 <= cap <= exact + Fraction(1, 10**6)


def test_cap_admits_a_placement_at_the_cap_exactly():
    """1.05 of a mean of 100 is 105, though 1.05 is not a binary fraction."""
    stats = mt.RoutingStatistics.from_load(np.array([[105, 95, 100, 100]]))
    for cap, wanted in (
        ({"max_imbalance": 1.05}, 105),
        ({"max_imbalance": np.inf}, 400),
        ({}, 400),
    ):
        assert mt.Problem(stats, mt.Topology(4), **cap).caps.whole.tolist() == [wanted]


def test_slots_are_just_enough_by_default():
    """Seven experts on three devices need three slots each."""
    stats = mt.RoutingStatistics.from_load(np.ones((1, 7), dtype=int))
    assert mt.Problem(stats, mt.Topology(3)).slots == 3


WORDS = """
time dispatch sets | us per layer | 1.2 us per layer | predicted_layer_us |
time dispatch pairs | us per layer | 1.2 us per layer | predicted_layer_us | no expert sets:
time follow sets | us per layer | 1.2 us per layer | predicted_layer_us |
balance dispatch sets | max / mean load | imbalance 1.2346 | imbalance |
traffic dispatch sets | fanout | fanout 1.2346 | fanout |
traffic follow sets | share of the traffic | crossing 1.2346 | crossing |
traffic dispatch pairs | share of the traffic | 1.2346 of the co-activations apart | fanout | sets:
"""


@pytest.mark.parametrize("line", WORDS.strip().splitlines())
def test_the_objective_says_what_it_counts(make_trace, line):
    """Unit, words, figure and what is counted beside load are of the goal and the regime."""
    of, unit, text, figure, lacks = map(str.strip, line.split("|"))
    goal, regime, counted = of.split()
    sets = counted == "sets"
    stats = mt.RoutingStatistics.from_trace(make_trace(), window=100, sets=sets)
    problem = mt.Problem(stats, mt.Topology(2), regime=regime, objective=goal)
    objective = problem.objective_function
    assert repr(objective) == f"Objective({goal!r}, regime={regime!r})"
    assert (objective.unit, objective.text(1.23456), objective.figure) == (unit, text, figure)
    assert objective.has_needed_tables
    assert lacks in objective.lacks if lacks else objective.lacks is None
    # A search makes a term of each.
    terms = (objective.transitions, objective.sets, objective.coactivation)
    wanted = {"follow": 0, "dispatch": 1 if sets else 2}[regime]
    there = [at for at, term in enumerate(terms) if term is not None]
    assert there == ([] if goal == "balance" else [wanted])


def test_the_objective_says_what_statistics_lack():
    """Of a load table nothing but balance is known; time counts what there is."""
    for goal, has_value in (("traffic", False), ("time", True), ("balance", True)):
        table = mt.RoutingStatistics.from_load(np.ones((1, 2, 4), np.int64))
        for regime, pairs in (("follow", "transitions"), ("dispatch", "co-activation")):
            problem = mt.Problem(table, mt.Topology(2), regime=regime, objective=goal)
            objective = problem.objective_function
            assert objective.has_needed_tables == has_value
            said = objective.lacks
            assert said is None if goal == "balance" else said.startswith(f"no {pairs}: methods")
            assert objective.traffic(mt.Placement([[[0, 1], [2, 3]]] * 2)) == 0


def test_pins_of_one_expert_to_several_devices_ask_for_copies():
    """Slots that are left over hold copies where a pin asks for them, else they stay empty."""
    statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 1, 1]])
    of = partial(mt.Problem, statistics, mt.Topology(3), objective="balance")
    assert not of().may_copy
    assert not of(pinned=[(None, 4, 0), (None, 3, 1)]).may_copy
    twice = of(pinned=[(None, 4, 0), (0, 4, 2)])
    assert twice.may_copy
    assert twice.without_copies() is None
    with pytest.raises(ValueError, match=r"pinned leaves 3 slots of layer 0 for the 4 experts"):
        of(pinned=[(0, 4, 0), (0, 4, 1), (0, 4, 2)])


def test_a_problem_without_copies_has_the_same_slots():
    """Its placements are placements of the problem, each expert on one device."""
    statistics = mt.RoutingStatistics.from_load([[8, 4, 2, 2]])
    problem = mt.Problem(statistics, mt.Topology(2), slots_per_device=3, fill_slots=True)
    single = problem.without_copies()
    assert (single.may_copy, single.fill_slots, single.stays_single) == (False, False, True)
    assert single.capacity.tolist() == problem.capacity.tolist()
    assert single.without_copies() is None
    assert mt.Problem(statistics, mt.Topology(2)).without_copies() is None
