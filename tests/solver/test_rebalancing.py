"""rebalance(): rules of live decisions that plugins and the rebalancer of layers share."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner import _core
from moetuner.placement import find_holders
from moetuner.solver.rebalancing import rebalance, slowest


def running(layers, ranks, width):
    """Return slots with experts in order."""
    return np.tile(np.arange(ranks * width, dtype=np.int32), (layers, 1)).reshape(
        layers, ranks, width
    )


def decide(load, slots, **rules):
    """Decide without dead zone or chance, on ranks that are alike."""
    free = {"budget": slots.size, "dead_zone": 0.0, "deviations": 0.0}
    return rebalance(load, slots, time=np.ones(slots.shape[1]), **{**free, **rules})


def test_a_copy_gains_more_than_its_price():
    """The dearer a copy, the fewer are brought, and each gains at least so many tokens."""
    load = np.random.default_rng(0).lognormal(6, 1, (3, 16))
    slots = running(3, 4, 4)
    moved = []
    for price in (0.0, 10.0, 100.0, 300.0, 1e9):
        answer = decide(load, slots, min_gain=price)
        moved.append(int(answer.moves.sum()))
        assert ((answer.before - answer.after) >= price * answer.moves).all()
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[2] > moved[-1] == 0


def test_empty_slots_stay_where_they_may():
    """Filled whatever it brings, or only where a copy relieves somebody."""
    load = np.array([[4.0, 4.0, 4.0, 4.0]])
    slots = np.array([[[0, 1, -1], [2, 3, -1]]], dtype=np.int32)
    assert (decide(load, slots).slots >= 0).all()
    assert np.array_equal(decide(load, slots, full=False).slots, slots)
    heavy = decide(np.array([[40.0, 4.0, 4.0, 4.0]]), slots, full=False)
    assert (heavy.slots == 0).sum() == 2


def test_chance_moves_nothing():
    """Even traffic's noise gains nothing that is believed, at any number of tokens."""
    random = np.random.default_rng(0)
    for tokens in (10, 1000, 100_000):
        load = random.poisson(tokens, (8, 16)).astype(np.float64)
        slots = running(8, 4, 4)
        answer = rebalance(load, slots, time=np.ones(4), budget=slots.size, dead_zone=0.0)
        assert answer.moves.sum() <= 8


def test_slow_devices_get_less():
    """Time is tokens times a device's time for one."""
    load = np.full((1, 12), 100.0)
    slots = np.full((1, 2, 12), -1, dtype=np.int32)
    answer = rebalance(load, slots, time=np.array([1.0, 0.5]), budget=100, full=False)
    assert answer.after[0] <= 420


def test_costs_do_not_depend_on_the_order_of_sums():
    """Experts numbered in another order: sums of thirds end in other bits, costs in the same."""
    random = np.random.default_rng(0)
    windows = np.floor(random.lognormal(6, 1, (8, 20, 64)))
    slots = np.stack([random.permutation(288) % 64 for _ in range(20)]).reshape(20, 32, 9)
    order = random.permutation(64)
    again = slowest(windows[:, :, order], np.argsort(order)[slots])
    assert np.array_equal(slowest(windows, slots), again)


def test_no_slot_at_all_is_refused():
    """No device has a slot: a line, and no panic."""
    with pytest.raises(ValueError, match="slots in a layer"):
        decide(np.ones((1, 2)), np.zeros((1, 2, 0), dtype=np.int32))


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2), st.integers(0, 12), st.booleans())
def test_figures_of_steps_are_true(experts, ranks, more, budget, full):
    """All experts, none twice on a rank, old slots kept; times and moves, within what must be."""
    random = np.random.default_rng([experts, ranks, more, budget, full])
    width = min(-(-experts // ranks) + more, experts)
    load = random.integers(0, 1000, (2, experts)).astype(float)
    slots = random.integers(-1, experts, (2, ranks, width), dtype=np.int32)
    answer = decide(load, slots, budget=budget, full=full)
    placement = mt.Placement(answer.slots, num_experts=experts)  # refuses what is no placement
    before = find_holders(slots, experts)
    assert np.array_equal(answer.moves, (placement.held & ~before).sum(axis=(1, 2)))
    needed = decide(load, slots, budget=0, full=full).moves.sum()
    assert answer.moves.sum() <= max(needed, budget)
    times = (placement.held * (load / placement.replicas)[:, None]).sum(axis=2).max(axis=1)
    assert answer.after == pytest.approx(times)
    assert (answer.after <= answer.before * (1 + 1e-9)).all()
    assert not full or (answer.slots >= 0).all()
    for old, new in zip(slots.reshape(-1, width), answer.slots.reshape(-1, width), strict=True):
        first = np.unique(old, return_index=True)[1]
        assert all(new[at] == old[at] for at in first if old[at] >= 0 and old[at] in new)


@pytest.mark.parametrize("seed", range(4))
def test_steps_on_one_load_are_those_of_the_descent(seed):
    """Two engines, one idea: at as many copies their slowest devices differ by little."""
    load = np.random.default_rng(seed).lognormal(6, 0.7, (4, 32))
    slots = running(4, 8, 4)
    for budget in (4, 16, 64):
        fast = decide(load, slots, budget=budget)
        layers = _core.Layers(
            load[None], np.ones(1), np.full((4, 8), 4), [0] * 8, [1.0] * 8, nearest=False, norm=0
        )
        *_, figures, _ = layers.descend(slots, slots, max_moves=budget)
        slow = fast.before.sum() + figures[-1, 2]
        assert fast.moves.sum() <= budget
        assert figures[-1, 0] <= budget
        assert fast.after.sum() <= slow * 1.03


@given(st.integers(0, 2**32))
def test_packings_go_to_the_devices_that_hold_most(seed):
    """No other order of what was packed for alike devices brings fewer copies."""
    random = np.random.default_rng(seed)
    packed, held = (
        random.permuted(np.tile(np.arange(-1, 11, dtype=np.int32), (2, 4, 1)), axis=2)[..., :3]
        for _ in range(2)
    )
    packed, held = np.ascontiguousarray(packed), np.ascontiguousarray(held)
    matched = _core.match_devices(packed, held, 12)
    there, orders = find_holders(held, 12), list(permutations(range(4)))
    for layer in range(2):
        moved = [
            (find_holders(packed[layer : layer + 1, list(order)], 12) & ~there[layer]).sum()
            for order in orders
        ]
        assert (find_holders(matched, 12)[layer] & ~there[layer]).sum() == min(moved)
        assert sorted(map(sorted, matched[layer].tolist())) == sorted(
            map(sorted, packed[layer].tolist())
        )


def drifted(experts, ranks, width):
    """Return loads, and slots that were packed for loads before these had drifted by 15 %."""
    random = np.random.default_rng(0)
    before = random.lognormal(0, 0.8, (4, experts))
    load = before * random.lognormal(0, 0.15, before.shape)
    empty = np.full((4, ranks, width), -1, dtype=np.int32)
    to_tokens = 1e6 / before.sum(axis=1, keepdims=True)
    return load * to_tokens, decide(before * to_tokens, empty).slots, empty


def norm(load, slots):
    """Compute the norm of order 8 of the ranks' times in every layer, 1 if all are alike."""
    copies = find_holders(slots, load.shape[1]).sum(axis=1)
    per_copy = np.take_along_axis(load / copies, slots.reshape(len(load), -1), axis=1)
    times = per_copy.reshape(slots.shape).sum(axis=2)
    return ((times / times.mean(axis=1, keepdims=True)) ** 8).mean(axis=1) ** (1 / 8)


def test_ranks_of_few_slots_are_packed_anew():
    """Steps change most of such ranks, so a packing that is a little more even is worth it."""
    load, slots, empty = drifted(128, 80, 2)
    anew = decide(load, empty)
    assert (norm(load, decide(load, slots).slots) <= norm(load, anew.slots) + 1e-3).all()


def test_ranks_of_many_slots_keep_most_of_them():
    """Steps change few slots there, and a packing would change nearly all for next to nothing."""
    load, slots, _ = drifted(256, 32, 9)
    assert (decide(load, slots).moves < slots[0].size / 2).all()


@pytest.mark.parametrize("price", [0.5, 3.0, 10.0, 30.0])
def test_a_budget_goes_where_a_copy_gains_most(price):
    """With as many copies as are worth a price, every layer has the way that is best at it."""
    random = np.random.default_rng(1)
    cost = -np.sort(-random.uniform(10, 100, (4, 9)), axis=0)
    moves = np.sort(random.integers(1, 9, (4, 9)), axis=0)
    moves[0] = 0
    best = (cost + price * moves).argmin(axis=0)
    budget = int(moves[best, np.arange(9)].sum())
    chosen = _core.spend_budget(
        cost, moves, max_moves=budget, dead_zone=0.0, deviations=0.0, devices=4
    )
    assert chosen == best.tolist()
    least = 1 - cost[chosen, np.arange(9)] / cost[0]
    wary = _core.spend_budget(
        cost, moves, max_moves=budget, dead_zone=0.5, deviations=0.0, devices=4
    )
    assert wary == np.where(least > 0.5, best, 0).tolist()
