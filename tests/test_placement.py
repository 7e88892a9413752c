"""Placement: its invariants, its files, and what changes between two of them."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from placements import random_slots

import moetuner as mt
from moetuner.placement import EMPTY, fill, keep_slots, moves_from


@st.composite
def pairs(draw):
    """Draw two valid placements of the same experts and devices, with copies and empty slots."""
    layers, devices = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    experts, rng = draw(st.integers(1, 9)), np.random.default_rng(draw(st.integers(0, 2**32)))
    more = [draw(st.integers(0, 2)) for _ in range(2)]
    slots = [random_slots(rng, layers, devices, experts, of) for of in more]
    return tuple(mt.Placement(of, num_experts=experts) for of in slots)


def placements():
    """Give one of them."""
    return pairs().map(lambda pair: pair[0])


@given(placements())
def test_every_expert_is_somewhere_and_no_device_holds_it_twice(placement):
    """Copies of an expert are counted, at least one, at most one per device."""
    counts = placement.replicas
    assert counts.min() >= 1
    for layer, device in np.ndindex(placement.layers, placement.devices):
        part = [e for e in placement.slots[layer, device].tolist() if e != -1]
        assert len(part) == len(set(part))
    assert counts.sum() == (placement.slots != -1).sum()


def test_a_file_may_hold_placements_of_several_models(tmp_path):
    """One after another, with or without a line between; where one is wanted it is refused."""
    placements = [mt.Placement([[[0, 1], [2, 3]]], model="a"), mt.Placement([[[1, 0]]], model="b")]
    for number, placement in enumerate(placements):
        placement.save(tmp_path / f"{number}.json")
    text = [(tmp_path / f"{number}.json").read_text().strip() for number in range(2)]
    for between in ("", "\n\n"):
        (tmp_path / "both.json").write_text(between.join(text))
        assert mt.Placement.load_all(tmp_path / "both.json") == placements


@given(placements())
def test_save_and_load_give_the_same_placement(tmp_path_factory, placement):
    """What is saved is what is loaded, names and figures too."""
    path = tmp_path_factory.mktemp("placement") / "p.json"
    placement = placement.with_names(model="m", topology="t", objective=0.5, bound=0.25)
    placement.save(path)
    loaded = mt.Placement.load(path)
    assert loaded == placement
    with pytest.raises(TypeError, match="slots"):
        placement.with_names(slots=placement.slots)
    assert hash(loaded) == hash(placement)
    assert (loaded.model, loaded.topology, loaded.objective, loaded.bound) == ("m", "t", 0.5, 0.25)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 10), st.integers(0, 2**32))
def test_device_of_is_what_the_placement_was_made_from(devices, layers, experts, seed):
    """from_assignment and device_of are inverse."""
    device_of = np.random.default_rng(seed).integers(0, devices, (layers, experts))
    placement = mt.Placement.from_assignment(device_of, devices)
    assert np.array_equal(placement.device_of, device_of)


# The last device gets an expert that the first and the third have, the third on its own node.
COMES = tuple(mt.Placement([[[0, 1], [1, -1], [0, -1], [e, -1]]]) for e in (-1, 0))


@given(pairs(), st.sampled_from(["nothing", "nodes", "links"]), st.integers(0, 2**32))
@example(COMES, "nodes", 0)
@example(COMES, "links", 0)  # where the first is nearer
def test_moves_lead_from_one_placement_to_the_other(pair, kind, seed):
    """Experts come to devices without them from the nearest with them, by links before nodes."""
    a, b = pair
    node = np.arange(a.devices) // (2 - a.devices % 2)
    far, topology = np.zeros((a.devices, a.devices)), None
    if kind != "nothing":
        far, given = node[:, None] != node, {}
        if kind == "links" and a.devices > 1:
            far = np.triu(np.random.default_rng(seed).integers(1, 4, far.shape), 1)
            given["link_cost"] = far = far + far.T
        topology = mt.Topology(a.devices, 2 - a.devices % 2, **given)
    assert a.diff(a).experts_moved == 0
    actual = a.diff(b, expert_bytes=10, topology=topology)
    new, there = b.held & ~a.held, a.held.copy()
    for layer, expert, source, target in actual.moves:
        holders = np.flatnonzero(a.held[layer, :, expert])
        # Of equally near ones the lowest number.
        assert source == holders[far[holders, target].argmin()]
        assert not there[layer, target, expert]
        there[layer, target, expert] = True
    assert (there == a.held | b.held).all()
    assert (actual.experts_moved, actual.bytes_moved) == (new.sum(), 10 * new.sum())
    assert actual.experts_moved_per_layer.tolist() == new.sum(axis=(1, 2)).tolist()
    assert actual.pairs.sum() == len(actual.moves)
    assert not actual.pairs.diagonal().any()


@given(pairs(), st.data())
def test_what_stays_keeps_its_slot(pair, data):
    """Devices hold what they did, within their slots; copies that moved are those of the diff."""
    a, b = pair
    width = b.slots_per_device
    least = (b.slots >= 0).sum(axis=2)
    more = data.draw(st.integers(0, width))
    capacity = np.minimum(least + more, width)
    slots = keep_slots(a.slots, b.slots, capacity)
    assert np.array_equal(np.sort(slots, axis=2), np.sort(b.slots, axis=2))
    assert (slots[np.arange(width) >= capacity[:, :, None]] == -1).all()
    for place in zip(*np.nonzero(a.slots >= 0), strict=True):
        layer, device, slot = place
        if b.held[layer, device, a.slots[place]] and slot < capacity[layer, device]:
            assert slots[place] == a.slots[place]
    moves = moves_from(a.held, slots)
    assert moves.tolist() == a.diff(b).experts_moved_per_layer.tolist()


@given(placements(), st.data())
def test_a_checksum_is_of_experts_on_devices(placement, data):
    """It does not depend on the order of a device's slots; another device's expert changes it."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shuffled = random.permuted(placement.slots, axis=2)
    experts = placement.num_experts
    assert mt.Placement(shuffled, num_experts=experts).checksum == placement.checksum
    assert re.fullmatch("[0-9a-f]{8}", placement.checksum)
    turned = np.roll(placement.slots, 1, axis=1)
    differs = not np.array_equal(np.sort(turned, axis=2), np.sort(placement.slots, axis=2))
    other = mt.Placement(turned, num_experts=experts)
    assert (other.checksum != placement.checksum) == differs


def test_slots_are_a_frozen_copy():
    """Changing the array afterwards changes nothing."""
    slots = np.array([[[0], [1]]], dtype=np.int32)
    placement = mt.Placement(slots)
    slots[0, 0, 0] = 1
    assert placement.slots.tolist() == [[[0], [1]]]
    with pytest.raises(ValueError, match="read-only"):
        placement.slots[0, 0, 0] = 1


def fill_one_by_one(slots, load, capacity, forbidden, holders):
    """Fill slot after slot with the copy that moves nothing, takes least and is rarest."""
    full = slots.copy()
    for layer, devices in enumerate(full):
        for device, row in enumerate(devices):
            while (row != EMPTY).sum() < capacity[layer, device]:
                copies = [(full[layer] == expert).sum() for expert in range(load.shape[1])]
                order = [
                    (not holders[layer, device, expert], tokens / (number + 1), number, expert)
                    for expert, (tokens, number) in enumerate(zip(load[layer], copies, strict=True))
                    if expert not in row and not forbidden[layer, expert, device]
                ]
                row[np.flatnonzero(row == EMPTY)[0]] = min(order)[-1]
    return full


@pytest.mark.parametrize("seed", range(8))
def test_layers_filled_side_by_side_are_those_filled_slot_by_slot(seed):
    """All layers are filled at once, each as if it were alone."""
    random, (layers, devices, width, experts) = np.random.default_rng(seed), (4, 3, 4, 9)
    slots = np.full((layers, devices, width), EMPTY, np.int32)
    for row in slots.reshape(-1, width):
        chosen = random.permutation(experts)[: random.integers(width)]
        row[random.permutation(width)[: len(chosen)]] = chosen
    load = random.integers(4, size=(layers, experts))
    capacity = random.integers(2, width + 1, size=(layers, devices))
    forbidden = random.random((layers, experts, devices)) < 0.2
    holders = random.random((layers, devices, experts)) < 0.3
    rules = {"capacity": capacity, "load": load, "forbidden": forbidden, "holders": holders}
    expected = fill_one_by_one(slots, load, capacity, forbidden, holders)
    assert np.array_equal(fill(slots, experts, **rules), expected)
