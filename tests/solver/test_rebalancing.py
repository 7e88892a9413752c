"""rebalance(): rules of live decisions that plugins and the rebalancer of layers share."""

import numpy as np
import pytest

from moetuner.solver.rebalancing import _cost, rebalance


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
        found = decide(load, slots, price=price)
        moved.append(int(found.brought.sum()))
        assert ((found.before - found.after) >= price * found.brought).all()
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
        found = rebalance(load, slots, time=np.ones(4), budget=slots.size, dead_zone=0.0)
        assert found.brought.sum() <= 8


def test_slow_devices_get_less():
    """Time is tokens times a device's time for one."""
    load = np.full((1, 12), 100.0)
    slots = np.full((1, 2, 12), -1, dtype=np.int32)
    found = rebalance(load, slots, time=np.array([1.0, 0.5]), budget=100, full=False)
    assert found.after[0] <= 420


def test_costs_do_not_depend_on_the_order_of_sums():
    """Experts numbered in another order: sums of thirds end in other bits, costs in the same."""
    random = np.random.default_rng(0)
    windows = np.floor(random.lognormal(6, 1, (8, 20, 64)))
    slots = np.stack([random.permutation(288) % 64 for _ in range(20)]).reshape(20, 32, 9)
    order = random.permutation(64)
    again = _cost(windows[:, :, order], np.argsort(order)[slots], np.ones(32), None)
    assert np.array_equal(_cost(windows, slots, np.ones(32), None), again)


def test_no_slot_at_all_is_refused():
    """No device has a slot: a line, and no panic."""
    with pytest.raises(ValueError, match="slots in a layer"):
        decide(np.ones((1, 2)), np.zeros((1, 2, 0), dtype=np.int32))
