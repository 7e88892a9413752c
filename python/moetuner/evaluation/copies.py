"""Expected counts, where tokens are not replayed, from the share of tokens that each copy serves.

What engines do with an expert's copies are the rows of ``serving.splits``. Where windows are
divided as a whole, visits, rows and pairs are taken to be split evenly. Homes are spread evenly
over devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.blocks import by_block
from moetuner.placement import EMPTY, Placement
from moetuner.serving.splits import RULES, Split
from moetuner.statistics import ExpertSets
from moetuner.topology import Topology

Floats = NDArray[np.float64]


def compute_slot_shares(placement: Placement, topology: Topology, split: Split) -> Floats:
    """Compute the share of its expert's tokens that every slot serves [L,D,S]; 0 if it is empty."""
    slots = placement.slots
    layer, expert = np.arange(placement.layers)[:, None, None], np.maximum(slots, 0)
    if not RULES[split].by_home or not placement.has_copies:
        number = placement.replicas[layer, expert]
        return np.divide(1.0, number, out=np.zeros(slots.shape), where=slots != EMPTY)
    device = np.arange(placement.devices)[None, :, None]
    share = np.stack([shares.mean(axis=0) for shares in split_by_home(placement, topology)])
    return np.where(slots == EMPTY, 0.0, share[layer, device, expert])


def serve(placement: Placement, share: Floats, load: NDArray[Any]) -> Floats:
    """Return tokens that devices serve [W,L,D], given slots' shares and experts' tokens [W,L,E]."""
    slots = placement.slots, share
    return by_block(
        load, lambda windows: _core.expected_load(slots, np.ascontiguousarray(windows, np.float64))
    )


def count_loads(
    placement: Placement,
    topology: Topology,
    split: Split,
    load: NDArray[Any],
    share: Floats | None = None,
) -> Floats:
    """Return tokens that devices serve [W,L,D], of those of experts [W,L,E].

    ``share`` [L,D,S] is what ``compute_slot_shares`` returns, if that has been computed.
    """
    divide = RULES[split].divide
    if divide is not None and placement.has_copies:
        speed = topology.speed_of_device
        return by_block(
            load,
            lambda windows: divide(
                placement.slots, np.ascontiguousarray(windows, np.float64), speed
            ),
        )
    share = compute_slot_shares(placement, topology, split) if share is None else share
    return serve(placement, share, load)


def split_by_home(placement: Placement, topology: Topology) -> Iterator[Floats]:
    """Yield the shares of nearest copies of every home [home,D,E], layer by layer."""
    node = topology.node_of_device
    for holders in placement.held.astype(np.float64):
        on_node = (node[:, None] == node[None, :])[:, :, None] * holders
        # Copies that a home may use: those of its node if there are any.
        usable = np.where(on_node.sum(axis=1, keepdims=True) > 0, on_node, holders)
        share: Floats = usable / usable.sum(axis=1, keepdims=True)
        home, expert = np.nonzero(holders)
        share[home, :, expert] = 0
        share[home, home, expert] = 1
        yield share


def count_visits(
    placement: Placement,
    topology: Topology,
    split: Split,
    sets: Sequence[ExpertSets],
    threads: int | None = None,
) -> tuple[Floats, Floats]:
    """Return tokens that visit every device [L,D], and every node [L,N].

    Where a split is hashed, one hash of a token chooses the copies of all its experts, as the
    replay and engines have it: two experts with equally many copies take the same one. Else copies
    are taken to be chosen independently.
    """
    tables = [(layer_sets.ids, layer_sets.counts) for layer_sets in sets]
    slots = (placement.slots, compute_slot_shares(placement, topology, split))
    return _core.expected_visits(
        slots,
        placement.num_experts,
        topology.node_of_device.tolist(),
        tables,
        hashed=RULES[split].is_hashed,
        threads=threads,
    )


def estimate_visits_per_load(
    placement: Placement,
    topology: Topology,
    split: Split,
    pairs: NDArray[np.uint64],
    top_k: list[int],
    threads: int | None = None,
) -> tuple[Floats, Floats]:
    """Estimate visits for each token of load, of devices [L,D] and nodes [L,N], from pairs [L,E,E].

    Tokens have so many experts in every layer [L]. Copies are taken to be chosen independently.
    """
    slots = (placement.slots, compute_slot_shares(placement, topology, split))
    nodes = topology.node_of_device.tolist()
    return _core.estimated_met(slots, nodes, pairs, top_k, threads=threads)


def count_pairs(
    placement: Placement, topology: Topology, split: Split, transitions: NDArray[np.uint64]
) -> Floats:
    """Return pairs of neighbouring layers' experts by their devices [L-1,D,D].

    A token has one home in all layers; apart from that, copies are taken to be chosen independently
    of each other.
    """
    if not RULES[split].by_home or not placement.has_copies:
        share = compute_slot_shares(placement, topology, split)
        return _core.expected_followed((placement.slots, share), transitions)
    tables = transitions.astype(np.float64)
    pairs = np.empty((len(tables), placement.devices, placement.devices))
    for layer, (here, there) in enumerate(pairwise(split_by_home(placement, topology))):
        moved = np.matmul(np.matmul(here, tables[layer]), there.transpose(0, 2, 1))
        pairs[layer] = moved.mean(axis=0)
    return pairs


def count_rows(
    placement: Placement,
    topology: Topology,
    split: Split,
    visits: NDArray[Any],
    expert_load: NDArray[Any] | None,
) -> Floats:
    """Compute rows [L,D,D] from homes that are spread evenly, given visits [L,D].

    With split ``nearest`` the rows of a device come from homes in proportion to the tokens that
    they send to its experts, of which windows have ``expert_load`` [W,L,E].
    """
    devices = placement.devices
    if not RULES[split].by_home:
        rows = np.repeat(visits[:, None, :] / devices, devices, axis=1)
    else:
        assert expert_load is not None
        of_expert = expert_load.sum(axis=0, dtype=np.float64) / devices
        rows = np.empty((placement.layers, devices, devices))
        for layer, share in enumerate(split_by_home(placement, topology)):
            pairs = share @ of_expert[layer]
            served = np.maximum(pairs.sum(axis=0), 1e-300)
            rows[layer] = pairs * (visits[layer] / served)
    rows[:, np.arange(devices), np.arange(devices)] = 0
    return rows


def count_busy_slots(placement: Placement, of_slots: NDArray[Any]) -> NDArray[Any]:
    """Count slots of every device that have a token [W,L,D], of tokens of slots [W,L,D*S]."""
    sizes = (placement.layers, placement.devices, placement.slots_per_device)
    return by_block(
        of_slots,
        lambda windows: (windows > 0).reshape(len(windows), *sizes).sum(axis=3, dtype=np.uint16),
    )


def count_active_experts(
    placement: Placement, share: Floats, expert_load: NDArray[Any]
) -> NDArray[Any]:
    """Count the experts of every device that have a token, or are expected to [W,L,D].

    ``expert_load`` [W,L,E] are the tokens of experts, and ``share`` [L,D,S] is the part of them
    that each slot serves. Where no expert has copies, the counts are whole numbers of two bytes.
    """
    slots = placement.slots, share

    def expect(load: NDArray[Any]) -> NDArray[Any]:
        active = _core.expected_active(slots, np.ascontiguousarray(load, np.float64))
        return active if placement.has_copies else active.astype(np.uint16)

    return by_block(expert_load, expect)
