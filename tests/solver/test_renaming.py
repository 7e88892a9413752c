"""As few moves as can be at the same worth: devices are renamed, layers that gain nothing stay."""

from functools import cache
from itertools import permutations

import numpy as np
import pytest

import moetuner as mt
from moetuner.placement import blocks
from moetuner.problem.capacity import pad_slots
from moetuner.solver.renaming import keep_running, rename_devices

TOPOLOGIES = {
    "one node": {"devices": 4},
    "two nodes": {"devices": 4, "devices_per_node": 2},
    "unequal nodes": {"devices": 5, "devices_per_node": (3, 2)},
    "three tiers": {"devices": 8, "tiers": (mt.Tier(2, 9e9), mt.Tier(4, 3e9), mt.Tier(8, 1e9))},
    "two speeds": {"devices": 4, "speed": [1.0, 2.0, 1.0, 2.0]},
    "slots that differ": {"devices": 4, "slots_per_device": [3, 2, 3, 2]},
    "links of a ring": {
        "devices": 4,
        "link_cost": [[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]],
    },
}
LAYERS, EXPERTS = 2, 8


def random_placement(problem, random):
    """Place every expert once, in any slots that keep the rules, and copies in some of the rest."""
    while True:
        slots = np.full((LAYERS, problem.devices, problem.slots), -1)
        for layer, capacity in enumerate(problem.capacity):
            places = [(d, s) for d in range(problem.devices) for s in range(capacity[d])]
            chosen = random.permutation(len(places))
            for expert, place in enumerate(chosen[:EXPERTS]):
                slots[layer][places[place]] = expert
        placement = mt.Placement(slots, num_experts=EXPERTS)
        if not problem.violations(placement):
            return placement


@cache
def allowed_names(machine):
    """List all names of devices that keep speeds and links; links that are no tiers keep theirs."""
    topology = mt.Topology(**TOPOLOGIES[machine])
    names = np.array(list(permutations(range(topology.devices))))
    if topology.link_cost is not None:
        return names[:1]
    same = (topology.speed_of_device[names] == topology.speed_of_device).all(axis=1)
    for links in (topology.tier, topology.cost):
        same &= (links[names[:, :, None], names[:, None, :]] == links).all(axis=(1, 2))
    return names[same]


def fewest_moves(problem, running, placement, allowed):
    """Try all names: the fewest moves of each layer, or of all under one set of names."""
    moves = np.full((len(allowed), LAYERS), np.inf)
    for number, names in enumerate(allowed):
        slots = np.empty_like(placement.slots)
        slots[:, names] = placement.slots
        for layer in range(LAYERS):
            mixed = placement.slots.copy()
            mixed[layer] = slots[layer]
            renamed = mt.Placement(mixed, num_experts=EXPERTS)
            if not problem.violations(renamed):
                moves[number, layer] = running.diff(renamed).experts_moved_per_layer[layer]
    is_joined = problem.regime == "follow"
    return moves.sum(axis=1).min() if is_joined else moves.min(axis=0).sum()


@pytest.mark.parametrize("regime", ["dispatch", "follow"])
@pytest.mark.parametrize("rules", [(), ("pinned",), ("forbidden",)])
@pytest.mark.parametrize("machine", TOPOLOGIES)
def test_names_take_the_fewest_moves(machine, rules, regime):
    """No names of devices that keep speeds, links, slots and rules leave more where it is."""
    random = np.random.default_rng(len(machine))
    counts = mt.RoutingStatistics.from_load(random.integers(1, 99, (LAYERS, EXPERTS)))
    topology = mt.Topology(**TOPOLOGIES[machine])
    pins = {name: [(1, 3, 0), (1, 5, 1)] for name in rules}
    problem = mt.Problem(counts, topology, regime=regime, objective="balance", **pins)
    for _ in range(1 if problem.devices > 4 else 3):
        running, placement = (random_placement(problem, random) for _ in range(2))
        slots = rename_devices(problem, running.held, pad_slots(placement.slots, problem.capacity))
        renamed = mt.Placement(slots, num_experts=EXPERTS)
        assert problem.violations(renamed) == ()
        fewest = fewest_moves(problem, running, placement, allowed_names(machine))
        assert running.diff(renamed).experts_moved == fewest
        assert problem.value(renamed) == pytest.approx(problem.value(placement), rel=1e-12)


@pytest.mark.parametrize("goal", ["time", "balance"])
@pytest.mark.parametrize("slots", [None, 5])
def test_names_cost_nothing(goal, slots):
    """A solve from what runs is worth as much as one from nothing, and moves fewer experts."""
    random = np.random.default_rng(1)
    load = np.round(random.lognormal(3, 1, (6, 3, 16))).astype(np.int64)
    counts, topology = mt.RoutingStatistics.from_load(load), mt.Topology(4, devices_per_node=2)
    problem = mt.Problem(counts, topology, objective=goal, slots_per_device=slots)
    running = blocks(3, 16, 4)
    anew, nearer = (mt.solve(problem, initial=of, iterations=300) for of in (None, running))
    assert nearer.objective <= anew.objective * (1 + 1e-9)
    before, after = (running.diff(each.placement).experts_moved for each in (anew, nearer))
    assert after < before
    assert nearer.details.search.experts_moved == after


@pytest.mark.parametrize("goal", ["time", "balance"])
def test_a_layer_that_gains_nothing_stays(goal):
    """Where all placements of a layer are worth the same, what runs there is the answer."""
    random = np.random.default_rng(2)
    load = np.full((4, 3, 16), 50)
    load[:, 1] = np.round(random.lognormal(4, 1, (4, 16)))
    problem = mt.Problem(mt.RoutingStatistics.from_load(load), mt.Topology(4), objective=goal)
    running = blocks(3, 16, 4)
    result = mt.solve(problem, initial=running, iterations=300)
    moved = running.diff(result.placement).experts_moved_per_layer
    assert moved[1] > 0
    assert moved[[0, 2]].tolist() == [0, 0]


def test_a_layer_that_breaks_a_rule_does_not_stay():
    """What runs against a pin is left, however little that gains."""
    counts = mt.RoutingStatistics.from_load(np.full((3, 2, 8), 10))
    problem = mt.Problem(counts, mt.Topology(4), objective="balance", pinned=[(1, 0, 3)])
    running = blocks(2, 8, 4)
    other = mt.Placement([[[2, 3], [0, 1], [6, 7], [4, 5]], [[2, 3], [1, 7], [4, 5], [0, 6]]])
    kept = keep_running(problem, problem.objective_function, running, other.slots)
    placement = mt.Placement(kept)
    assert problem.violations(placement) == ()
    assert running.diff(placement).experts_moved_per_layer.tolist() == [0, 2]


def test_names_of_layers_are_their_own_where_tokens_do_not_follow():
    """Under dispatch each layer is renamed by itself; where tokens follow, all layers alike."""
    counts = mt.RoutingStatistics(
        np.full((1, 2, 4), 10), np.array([[[9, 1, 1, 1], [1, 9, 1, 1], [1, 1, 9, 1], [1, 1, 1, 9]]])
    )
    running = mt.Placement([[[0, 1], [2, 3]], [[2, 3], [0, 1]]])
    other = mt.Placement([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    moved = {}
    for regime in ("dispatch", "follow"):
        problem = mt.Problem(counts, mt.Topology(2), regime=regime, objective="traffic")
        slots = rename_devices(problem, running.held, other.slots)
        moved[regime] = running.diff(mt.Placement(slots)).experts_moved
    assert moved == {"dispatch": 0, "follow": 4}
