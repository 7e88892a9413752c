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
        assert mt.Objective(problem).cost(placement) == cost


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
    assert mt.Problem(stats, mt.Topology(4), max_imbalance=1.05).caps.whole.tolist() == [105]
    assert mt.Problem(stats, mt.Topology(4)).caps.whole.tolist() == [400]
    assert mt.Problem(stats, mt.Topology(4), max_imbalance=float("inf")).caps.whole.tolist() == [
        400
    ]


def test_slots_are_just_enough_by_default():
    """Seven experts on three devices need three slots each."""
    stats = mt.RoutingStatistics.from_load(np.ones((1, 7), dtype=int))
    assert mt.Problem(stats, mt.Topology(3)).slots == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots_per_device": 1}, "slots_per_device must be at least 2 for 6 experts on 4 devices"),
        ({"regime": "pull"}, "regime must be one of follow, dispatch, got 'pull'"),
        ({"max_imbalance": 0.9}, "max_imbalance must be at least 1, got 0.9"),
        ({"max_imbalance": float("nan")}, "max_imbalance must be at least 1, got nan"),
        ({"objective": "speed"}, "objective must be one of time, balance, traffic, got 'speed'"),
        ({"split": "odd"}, "split must be one of even, nearest, round_robin, got 'odd'"),
        ({"slots_per_device": [1, 1, 1, 1]}, "must add up to at least 6, .* got 4"),
        ({"slots_per_device": [2, 2, 2]}, r"must be numbers \[4\], one per device"),
        ({"slots_per_device": [2, 2, 3, -1]}, "of device 3 must be from 0 to 65536, got -1"),
        ({"slots_per_device": 2, "extra_slots": 2}, "slots_per_device and extra_slots cannot both"),
        ({"extra_slots": -1}, "extra_slots must be from 0"),
        ({"extra_slots": 1000}, "extra_slots must be at most 54, .* got 1000"),
        ({"arrival": "late"}, "arrival must be 'bursts', 'mixed', or a weight .* got 'late'"),
        ({"arrival": 1.5}, "arrival must be .* got 1.5"),
        ({"arrival": -0.5}, "arrival must be .* got -0.5"),
        ({"risk": 1.0}, "risk must be 'mean', or a level from 0 to below 1, got 1.0"),
        ({"risk": "worst"}, "risk must be .* got 'worst'"),
        ({"groups": "minimax"}, "groups needs windows with groups; these statistics have none"),
        ({"groups": {"a": -1}}, "groups: weight of 'a' must be a number of at least 0, got -1"),
        ({"pinned": [(0, 0)]}, r"pinned must be \(layer, expert, device\), got \(0, 0\)"),
        ({"pinned": [(0, 6, 0)]}, "pinned: expert must be from 0 to 5, got 6"),
        ({"forbidden": [(0, 0, 4)]}, "forbidden: device must be from 0 to 3, got 4"),
        ({"forbidden": [(9, 0, 0)]}, "forbidden: layer .None for all. must be from 0 to .*, got 9"),
        (
            {"pinned": [(0, 1, 2)], "forbidden": [(None, 1, 2)]},
            "pinned and forbidden contradict each other: expert 1 of layer 0 on device 2",
        ),
        (
            {"pinned": [(0, e, 1) for e in range(3)]},
            "pinned puts 3 experts of layer 0 on device 1, which has 2 slots",
        ),
        (
            {"pinned": [(0, 0, d) for d in range(4)]},
            "pinned leaves 4 slots of layer 0 for the 5 experts that are not pinned",
        ),
        (
            {"forbidden": [(1, 3, d) for d in range(4)]},
            "forbidden leaves no device for expert 3 of layer 1",
        ),
        (
            {"forbidden": [(1, e, d) for e in range(3) for d in (0, 2, 3)]},
            "forbidden leaves 2 slots in layer 1, on 1, for 3 experts that may be nowhere else",
        ),
        (
            {"forbidden": [(None, e, d) for e in range(6) for d in (1, 3)]},
            "forbidden leaves 4 slots in layer 0, on 0, 2, for 5 experts",
        ),
    ],
)
def test_wrong_limits_are_named(fields, words):
    """A message names the argument, the rule and the value."""
    with pytest.raises(ValueError, match=words):
        mt.Problem(statistics(), mt.Topology(4), **fields)


def test_groups_are_checked_by_name_and_tokens():
    """A group that is unknown or has no tokens cannot be weighed, nor can all weigh nothing."""
    load = np.ones((2, 1, 4), dtype=int)
    load[1] = 0
    stats = mt.RoutingStatistics.from_load(
        load, group=np.array([0, 1]), group_names=("code", "law", "none")
    )
    for groups, words in (
        ({"poems": 1}, "groups names 'poems', which is none of code, law, none"),
        ({"none": 1}, "groups names 'none', which has no tokens"),
        ({"law": 1}, "groups names 'law', which has no tokens"),
        ("worst", "groups must be 'minimax' or weights by name, got 'worst'"),
    ):
        with pytest.raises(ValueError, match=words):
            mt.Problem(stats, mt.Topology(2), groups=groups)
    alone = mt.RoutingStatistics.from_load(load[:1], group=np.array([0]), group_names=("code",))
    with pytest.raises(ValueError, match="groups leaves no window with a weight above 0"):
        mt.Problem(alone, mt.Topology(2), groups={"code": 0})


@pytest.mark.parametrize(
    ("goal", "regime", "sets", "unit", "text", "figure", "lacks"),
    [
        ("time", "dispatch", True, "us per layer", "1.2 us per layer", "predicted_layer_us", None),
        (
            "time",
            "dispatch",
            False,
            "us per layer",
            "1.2 us per layer",
            "predicted_layer_us",
            "sets",
        ),
        ("time", "follow", True, "us per layer", "1.2 us per layer", "predicted_layer_us", None),
        ("balance", "dispatch", True, "max / mean load", "imbalance 1.2346", "imbalance", None),
        ("traffic", "dispatch", True, "fanout", "fanout 1.2346", "fanout", None),
        ("traffic", "follow", True, "share of the traffic", "crossing 1.2346", "crossing", None),
        (
            *("traffic", "dispatch", False, "share of the traffic"),
            *("1.2346 of the co-activations apart", "fanout", None),
        ),
    ],
)
def test_the_objective_says_what_it_counts(
    make_trace, goal, regime, sets, unit, text, figure, lacks
):
    """Unit, words, figure and what is counted beside load are of the goal and the regime."""
    stats = mt.RoutingStatistics.from_trace(make_trace(), sets=sets)
    objective = mt.Objective(mt.Problem(stats, mt.Topology(2), regime=regime, objective=goal))
    assert repr(objective) == f"Objective({goal!r}, regime={regime!r})"
    assert (objective.unit, objective.text(1.23456), objective.figure) == (unit, text, figure)
    assert objective.is_known
    assert (objective.lacks is None) == (lacks is None)
    assert lacks is None or f"no expert {lacks}:" in objective.lacks
    # A search makes a term of each.
    terms = (objective.transitions, objective.sets, objective.coactivation)
    wanted = {"follow": 0, "dispatch": 1 if sets else 2}[regime]
    there = [at for at, term in enumerate(terms) if term is not None]
    assert there == ([] if goal == "balance" else [wanted])


def test_the_objective_says_what_statistics_lack():
    """Of a load table nothing but balance is known; time counts what there is."""
    for goal, known in (("traffic", False), ("time", True), ("balance", True)):
        table = mt.RoutingStatistics.from_load(np.ones((1, 2, 4), np.int64))
        for regime, pairs in (("follow", "transitions"), ("dispatch", "co-activation")):
            objective = mt.Objective(
                mt.Problem(table, mt.Topology(2), regime=regime, objective=goal)
            )
            assert objective.is_known == known
            told = objective.lacks
            assert told is None if goal == "balance" else told.startswith(f"no {pairs}: methods")
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
