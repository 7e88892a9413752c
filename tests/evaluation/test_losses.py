"""What lost devices do to a placement: each expert, copy by copy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from placements import random_slots

import moetuner as mt
from moetuner import _core
from moetuner.evaluation.losses import (
    DOMAINS,
    bound_worst_loss,
    compute_imbalances_after_loss,
    measure_losses,
    number_domains,
)
from moetuner.serving.splits import RULES, Rule


def lose(placement, load, topology, domain, lost):
    """Serve every expert by the copies that are left, one by one; return loads and what is lost."""
    member = number_domains(topology, domain)
    served = np.zeros((placement.layers, placement.devices))
    missing = 0
    for layer, slots in enumerate(placement.slots):
        for expert in range(placement.num_experts):
            holders = [g for g, held in enumerate(slots) if expert in held and member[g] != lost]
            missing += not holders
            for g in holders:
                served[layer, g] += load[layer, expert] / len(holders)
    return served, missing


@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 4), st.sampled_from(DOMAINS), st.data())
def test_losses_are_those_of_the_copies_that_are_left(layers, nodes, spare, domain, data):
    """Loads, experts to read, and fatal losses are counted copy by copy, whatever the speeds."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    speeds = tuple(
        data.draw(st.lists(st.sampled_from([1.0, 2.0]), min_size=2 * nodes, max_size=2 * nodes))
    )
    topology = mt.Topology(2 * nodes, 2, speed=speeds)
    slots = random_slots(rng, layers, 2 * nodes, 8, spare=spare)
    placement = mt.Placement(slots, num_experts=8)
    load = rng.integers(0, 100, (layers, 8)).astype(np.uint64)
    actual = measure_losses(placement, load, topology, domain)
    member = number_domains(topology, domain)
    after, fatal, missing = [], [], []
    for lost in range(member.max() + 1):
        served, gone = lose(placement, load, topology, domain, lost)
        left = np.asarray(topology.speed_of_device)[member != lost].sum()
        total = served.sum(axis=1)
        slowest = (served / topology.speed_of_device).max(axis=1) * left
        after.append(np.where(total > 0, slowest / np.maximum(total, 1), 1.0))
        fatal.append(gone > 0)
        missing.append(gone / layers)
    assert actual.number == len(after)
    assert actual.fatal == np.mean(fatal)
    assert actual.experts_lost == pytest.approx(np.mean(missing))
    assert actual.imbalance_after == pytest.approx(np.mean(after))
    assert actual.imbalance_after_worst == pytest.approx(np.max(after))


TWICE = mt.Placement([[[0, 1], [1, 0], [2, 3], [3, 2]]])


def test_an_evaluation_says_what_losses_do():
    """Of devices and of nodes, in words too; nothing where every expert is once."""
    traffic = mt.RoutingStatistics.from_load([[[4, 4, 4, 4]]])
    losses = mt.evaluate(TWICE, traffic, mt.Topology(4, 2)).losses
    assert (losses["device"].fatal, losses["node"].fatal) == (0, 1)
    assert losses["node"].experts_lost == 2
    assert losses["device"].imbalance_after == 1.5
    assert losses["device"].sentence == (
        "no loss of a device loses an expert; then the busiest device has 1.50 x the mean of those "
        "that are left, 1.50 at worst (in as many slots no placement has less than 1.12)"
    )
    assert "every loss of a node loses experts (2.0 of a layer must" in losses["node"].sentence
    single = mt.RoutingStatistics.from_load([[[1, 1]]])
    assert mt.evaluate(mt.Placement([[[0], [1]]]), single).losses == {}


def test_where_the_nearest_copy_serves_there_is_no_formula():
    """Which experts are lost is known there, and loads after a loss are not."""
    traffic = mt.RoutingStatistics.from_load([[[4, 4, 4, 4]]])
    losses = mt.evaluate(TWICE, traffic, split="nearest").losses["device"]
    assert (losses.fatal, losses.imbalance_after, losses.imbalance_after_worst) == (0, None, None)
    assert losses.sentence == "no loss of a device loses an expert"


def survivors(experts, devices, size):
    """Give placements [D][S] in which every expert is on two devices or more.

    All of them, but for the names of devices, which are alike.
    """
    contents = itertools.combinations(range(experts), size)
    for slots in itertools.combinations_with_replacement(contents, devices):
        copies = np.bincount(np.ravel(slots), minlength=experts)
        if copies.min() >= 2:
            yield slots


@pytest.mark.parametrize(
    ("experts", "devices", "size"),
    [(3, 3, 2), (4, 4, 2), (3, 4, 2), (2, 4, 1), (5, 4, 3), (6, 4, 3)],
)
def test_no_placement_has_less_after_the_worst_loss(experts, devices, size):
    """Not the best of all placements; where pairs of devices share an expert each, it is that."""
    rng = np.random.default_rng(experts * devices)
    for load in (
        np.ones((1, experts)),
        rng.integers(1, 50, (1, experts)),
        rng.random((1, experts)),
    ):
        bound, best = bound_worst_loss(load, devices * size, devices), np.inf
        for slots in survivors(experts, devices, size):
            placement = mt.Placement([slots], num_experts=experts)
            losses = measure_losses(placement, load, mt.Topology(devices))
            best = min(best, losses.imbalance_after_worst)
        assert bound <= best + 1e-12
        if (experts, devices) == (6, 4) and load.std() == 0:
            assert bound == pytest.approx(best)


@given(st.integers(2, 9), st.integers(2, 5), st.integers(0, 3), st.integers(0, 999))
def test_the_bound_has_the_best_numbers_of_copies(experts, devices, spare, seed):
    """No other numbers of copies in as many slots would make it smaller."""
    load = np.random.default_rng(seed).integers(0, 50, experts).astype(float)
    slots = 2 * experts + spare
    values = []
    for extra in itertools.product(range(spare + 1), repeat=experts):
        if sum(extra) == spare:
            copies = 2 + np.array(extra)
            share = load / max(load.sum(), 1e-300)
            values.append((share**2 / (copies * (copies - 1))).sum())
    expected = (devices - 1) * (1 / devices + min(values))
    assert bound_worst_loss(load[None], slots, devices) == pytest.approx(expected)


@pytest.mark.parametrize("split", ["even", "lp"])
def test_where_nothing_is_left_to_serve_nobody_waits(split):
    """The imbalance is 1 where all tokens went to the experts of a lost device, or there are none.

    Of a layer whose only busy expert is on the first of four devices, the other losses leave all
    tokens on it: three times the mean of the three that are left.
    """
    placement = mt.Placement.from_assignment([[0, 1, 2, 3]] * 2, 4)
    load = np.array([[5, 0, 0, 0], [0, 0, 0, 0]], np.uint64)
    after, _ = compute_imbalances_after_loss(placement, load, mt.Topology(4), "device", split=split)
    assert after.tolist() == [[1, 1], [3, 1], [3, 1], [3, 1]]


@pytest.mark.parametrize(
    ("topology", "split"),
    [(mt.Topology(4, speed=(1.0, 1.0, 1.0, 2.0)), "even"), (mt.Topology(4), "lp")],
)
def test_the_bound_is_silent_where_it_is_not_proven(topology, split):
    """Devices of other speeds, and tokens that are divided anew, have another one."""
    losses = measure_losses(TWICE, np.full((1, 4), 4), topology, split=split)
    assert losses.worst_bound is None
    assert measure_losses(TWICE, np.full((1, 4), 4), mt.Topology(4)).worst_bound == 1.125


@given(st.integers(2, 3), st.integers(0, 6), st.sampled_from(DOMAINS), st.integers(0, 999))
def test_a_dispatcher_divides_tokens_anew_after_a_loss(nodes, spare, domain, seed):
    """With split lp the busiest device has what it has if the lost ones were never there."""
    rng = np.random.default_rng(seed)
    speeds = tuple(rng.choice([1.0, 2.0], 2 * nodes).tolist())
    topology = mt.Topology(2 * nodes, 2, speed=speeds)
    placement = mt.Placement(random_slots(rng, 2, 2 * nodes, 8, spare=spare), num_experts=8)
    load = rng.integers(0, 100, (2, 8)).astype(np.uint64)
    imbalance, _ = compute_imbalances_after_loss(placement, load, topology, domain, split="lp")
    member = number_domains(topology, domain)
    for lost in range(member.max() + 1):
        left = member != lost
        slots = np.ascontiguousarray(placement.slots[:, left])
        speed = topology.speed_of_device[left]
        served = _core.balanced_load(slots, load[None].astype(float), speed)[0]
        total = served.sum(axis=1)
        even = np.where(total > 0, total, 1) / speed.sum()
        expected = np.where(total > 0, (served / speed).max(axis=1) / even, 1)
        assert imbalance[lost] == pytest.approx(expected, rel=1e-7)


def test_a_loss_is_divided_as_the_row_of_its_split_says(monkeypatch):
    """A dispatcher that divides windows in its own way is not taken for a linear programme."""

    def to_the_last(slots, load, speed):
        """Give all tokens of an expert to the last device that holds it."""
        served = np.zeros((*load.shape[:2], slots.shape[1]))
        for layer, expert in np.ndindex(load.shape[1:]):
            holders = np.flatnonzero((slots[layer] == expert).any(axis=1))
            if holders.size:
                served[:, layer, holders[-1]] += load[:, layer, expert]
        return served

    monkeypatch.setitem(RULES, "last", Rule("is the last", "to the last", divide=to_the_last))
    load = np.array([[4, 4, 4, 4]], np.uint64)
    after, _ = compute_imbalances_after_loss(TWICE, load, mt.Topology(4), "device", split="last")
    # One of two pairs of devices stays whole, and its last device serves two experts of four; so
    # does the one that is left of the other pair.
    assert after.ravel().tolist() == [1.5] * 4
