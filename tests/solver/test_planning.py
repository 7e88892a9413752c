"""plan(): the devices that are left or came get what they need, and nothing dies on the way."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moetuner as mt
from moetuner.plugins import rebalance_experts


@st.composite
def running(draw):
    """Draw a placement with copies that serves, its loads, and its sizes."""
    devices, width = draw(st.integers(2, 6)), draw(st.integers(2, 4))
    experts = draw(st.integers(width, devices * width - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = rng.integers(0, 1000, (2, experts))
    slots = rebalance_experts(load, devices * width, None, 1, devices)
    placement = mt.Placement(slots.reshape(2, devices, width), num_experts=experts)
    return placement, mt.RoutingStatistics(load[None]), rng


def carry_out(plan, before, lost):
    """Carry out the steps as an engine would, and hold each against its rules; return slots."""
    slots = np.full(plan.slots.shape, -1)
    slots[:, : before.devices] = before.slots
    slots[:, lost] = -1
    batches = itertools.groupby(plan.steps.tolist(), key=lambda step: step[5])
    for _, batch in batches:
        steps = list(batch)
        layer = steps[0][0]
        served = set(slots[layer].ravel().tolist()) - {-1}
        for step_layer, expert, source, _, _, _ in steps:
            assert step_layer == layer
            holders = [d for d in range(slots.shape[1]) if expert in slots[layer, d]]
            assert source in holders if holders else source == -1
        for _, expert, _, target, slot, _ in steps:
            slots[layer, target, slot] = expert
        assert served <= set(slots[layer].ravel().tolist())
    return slots


@given(running(), st.data())
def test_no_step_takes_the_last_copy(case, data):
    """Whatever changes: step by step every expert stays served, and the end is the plan's."""
    before, traffic, _ = case
    devices, width, experts = before.devices, before.slots_per_device, before.num_experts
    spare = devices - -(-experts // width)
    gone = data.draw(st.sets(st.integers(0, devices - 1), max_size=spare))
    lost = {device for device in gone if data.draw(st.booleans())}
    retire = gone - lost
    fewer = data.draw(st.integers(0, spare - len(gone)))
    join, more = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([None, 0, 3, 10**6]))
    change = {"without": lost, "retire": retire, "fewer": fewer, "join": join}
    plan = mt.plan(before, traffic, **change, more_copies=more)
    assert len(plan.devices) == devices - len(gone) - fewer + join
    assert not gone & {*plan.devices.tolist()}
    slots = carry_out(plan, before, sorted(lost))
    assert np.array_equal(slots[:, plan.devices], plan.slots[:, plan.devices])
    assert plan.placement.devices == len(plan.devices)


@given(running(), st.data())
def test_a_loss_brings_what_nobody_holds_and_no_more(case, data):
    """As many steps as experts without a copy, all from disk, in the layers that lack them."""
    before, traffic, _ = case
    lost = data.draw(st.integers(0, before.devices - 1))
    if (before.devices - 1) * before.slots_per_device < before.num_experts:
        with pytest.raises(ValueError, match="must have a slot for each"):
            mt.plan(before, traffic, without=[lost])
        return
    plan = mt.plan(before, traffic, without=[lost])
    left = np.delete(before.held, lost, axis=1).any(axis=1)
    assert plan.lost.tolist() == (~left).sum(axis=1).tolist()
    assert len(plan.steps) == plan.lost.sum()
    assert (plan.steps[:, 2] == -1).all()
    shares: list[float] = []
    table = mt.plan_losses(before, traffic, progress=shares.append)
    assert plan == table[lost]
    assert shares == [(device + 1) / before.devices for device in range(before.devices)]


@given(running(), st.integers(1, 3))
def test_devices_leave_that_few_copies_are_brought_for(case, number):
    """No exchange of one device that leaves for one that stays brings fewer."""
    before, traffic, _ = case
    if (before.devices - number) * before.slots_per_device < before.num_experts:
        return
    plan = mt.plan(before, traffic, fewer=number)
    leaving = sorted({*range(before.devices)} - {*plan.devices.tolist()})

    def copies(devices):
        left = np.delete(before.held, devices, axis=1).any(axis=1)
        return int((~left).sum())

    assert len(leaving) == number
    assert copies(leaving) == len(plan.steps)
    assert (plan.steps[:, 2] >= 0).all()
    for out, into in itertools.product(leaving, plan.devices.tolist()):
        other = [d for d in leaving if d != out] + [into]
        assert copies(other) >= copies(leaving)


@given(running(), st.data())
def test_more_slots_take_what_a_loss_leaves_without_a_slot(case, data):
    """Where the devices that are left have too few slots, the refusal names how many will do."""
    before, traffic, _ = case
    devices, width, experts = before.devices, before.slots_per_device, before.num_experts
    gone = data.draw(st.sets(st.integers(0, devices - 1), min_size=1, max_size=devices - 1))
    lost = {device for device in gone if data.draw(st.booleans())}
    change = {"without": lost, "retire": gone - lost}
    enough = max(-(-experts // (devices - len(gone))), width)
    if enough > width:
        with pytest.raises(ValueError, match=f"or slots_per_device={enough}, got"):
            mt.plan(before, traffic, **change)
        with pytest.raises(ValueError, match=f"or slots_per_device={enough}, got"):
            mt.plan(before, traffic, **change, slots_per_device=enough - 1)
    plan = mt.plan(before, traffic, **change, slots_per_device=enough)
    assert plan.placement.slots_per_device == enough
    held = np.delete(before.held, sorted(gone), axis=1).any(axis=1)
    assert len(plan.steps) == (~held).sum()
    added = np.full((2, devices, enough - width), -1)
    wider = mt.Placement(np.concatenate([before.slots, added], axis=2), num_experts=experts)
    slots = carry_out(plan, wider, sorted(lost))
    assert np.array_equal(slots[:, plan.devices], plan.slots[:, plan.devices])


def test_fewer_counts_what_named_devices_take_with_them():
    """Device 1 has the only other copies of what device 0 takes, so that 2 or 3 leaves."""
    before = mt.Placement([[[0, 1], [0, 1], [2, 3], [2, 3]]])
    traffic = mt.RoutingStatistics([[[1, 1, 9, 9]]])
    alone = mt.plan(before, traffic, fewer=1)
    assert len(alone.steps) == 0
    both = mt.plan(before, traffic, retire=[0], fewer=1)
    assert both.devices.tolist() in ([1, 2], [1, 3])
    assert len(both.steps) == 0


def test_devices_that_come_are_filled_and_relieve_others():
    """All of their slots hold something, and the busiest device has less to do."""
    rng = np.random.default_rng(3)
    load = rng.lognormal(5, 1, (3, 32)).astype(int)
    slots = rebalance_experts(load, 40, None, 1, 4)
    before = mt.Placement(slots.reshape(3, 4, 10), num_experts=32)
    traffic = mt.RoutingStatistics(load[None])
    plan = mt.plan(before, traffic, join=2)
    assert (plan.slots[:, 4:] >= 0).all()
    even = load.sum(axis=1) / 6
    copies = plan.placement.replicas
    loads = (plan.placement.held * (load / copies)[:, None]).sum(axis=2)
    assert plan.imbalance_after == pytest.approx((loads.max(axis=1) / even).mean())
    none = mt.plan(before, traffic, join=2, more_copies=0)
    assert not len(none.steps)
    assert plan.imbalance_after < none.imbalance_after


@given(running(), st.data())
def test_empty_slots_are_filled_only_where_that_is_asked_for(case, data):
    """What nobody holds is brought, and at most so many copies more, wherever slots are empty."""
    before, traffic, rng = case
    slots = before.slots.copy()
    for place in rng.permutation(np.argwhere(slots >= 0))[: slots.size // 3]:
        if (slots[place[0]] == slots[tuple(place)]).sum() > 1:
            slots[tuple(place)] = -1
    before = mt.Placement(slots, num_experts=before.num_experts)
    spare = before.devices - -(-before.num_experts // before.slots_per_device)
    lost = data.draw(st.sets(st.integers(0, before.devices - 1), max_size=spare))
    join = data.draw(st.integers(0, 2))
    missing = int((~np.delete(before.held, sorted(lost), axis=1).any(axis=1)).sum())
    for more in (0, 2) if join else (None, 0, 2):
        plan = mt.plan(before, traffic, without=lost, join=join, more_copies=more)
        assert missing <= len(plan.steps) <= missing + (more or 0)
        carry_out(plan, before, sorted(lost))


def test_experts_that_change_places_are_exchanged_at_once():
    """Where each step would take the last copy of what another one brings, all are one batch."""
    before = np.array([[[0, 1], [2, 3]]], dtype=np.int32)
    after = np.array([[[2, 1], [0, 3]]], dtype=np.int32)
    from moetuner.solver.planning import _order_steps

    steps = _order_steps(before, after, None)
    assert sorted(steps.tolist()) == [[0, 0, 0, 1, 0, 0], [0, 2, 1, 0, 0, 0]]


def test_copies_come_from_the_nearest_device():
    """Of two devices that hold an expert, the one in the node of where it goes."""
    before = mt.Placement([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    traffic = mt.RoutingStatistics([[[9, 1, 1, 1]]])
    plan = mt.plan(before, traffic, join=0, retire=[], without=[], more_copies=0)
    assert not len(plan.steps)
    machine = mt.Topology(4, devices_per_node=2)
    for step in mt.plan(before, traffic, more_copies=4, topology=machine).steps.tolist():
        assert step[2] // 2 == step[3] // 2


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_a_machine_without_devices_keeps_what_is_left(nodes, size, data):
    """Nodes keep what is left of them, and devices that join are in nodes of their own."""
    speed = tuple(range(1, nodes * size + 1))
    machine = mt.Topology(nodes * size, size, inter_node_bandwidth=1e9, speed=speed)
    lost = data.draw(st.sets(st.integers(0, nodes * size - 1), max_size=nodes * size - 1))
    join = data.draw(st.integers(0, 5))
    left = machine.without(lost, join)
    kept = [d for d in range(nodes * size) if d not in lost]
    assert left.speed == (*(float(speed[d]) for d in kept), *[1.0] * join)
    tier, still = left.tier, len(kept)
    assert (tier[:still, :still] == machine.tier[np.ix_(kept, kept)]).all()
    assert (left.bandwidth[:still, :still] == machine.bandwidth[np.ix_(kept, kept)]).all()
    assert nodes == 1 or max(left.node_sizes) <= size
    # Only the last node takes in devices, in place of those that it has lost.
    last = [d // size == nodes - 1 for d in kept]
    is_beside = (tier[:still, still:] == 1) & ~np.array(last)[:, None]
    assert nodes == 1 or not is_beside.any()


def test_a_machine_of_three_tiers_loses_its_fast_links():
    """Its groups are of equal size, so all links are as slow as the slowest then."""
    machine = mt.Topology(8, tiers=(mt.Tier(2, 9e9), mt.Tier(4, 3e9), mt.Tier(8, 1e9)))
    assert machine.has_nested_nodes
    assert set(machine.without([3]).bandwidth[0, 1:]) == {1e9}
    assert not mt.Topology(8, 4).has_nested_nodes
