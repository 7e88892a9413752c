"""Compute expected counts from the share of an expert's tokens that each copy serves.

This is for traffic whose tokens are not replayed. ``serving.splits`` declares how engines split
tokens over copies. Where a programme splits windows as a whole, visits, rows and pairs assume even
shares. Homes are spread evenly over devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.chunks import by_chunk
from moetuner.placement import EMPTY, Placement
from moetuner.serving.splits import RULES, Split
from moetuner.statistics.sets import ExpertSets
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
    """Compute the tokens that devices serve [W,L,D] from slots' shares and experts' tokens."""
    slots = placement.slots, share
    return by_chunk(
        load, lambda windows: _core.expected_load(slots, np.ascontiguousarray(windows, np.float64))
    )


def count_loads(
    placement: Placement,
    topology: Topology,
    split: Split,
    load: NDArray[Any],
    share: Floats | None = None,
) -> Floats:
    """Compute the tokens that devices serve [W,L,D] from those of experts [W,L,E].

    ``share`` [L,D,S] is what ``compute_slot_shares`` returns, if that has been computed.
    """
    divide = RULES[split].divide
    if divide is not None and placement.has_copies:
        speed = topology.speed_of_device
        return by_chunk(
            load,
            lambda windows: divide(
                placement.slots, np.ascontiguousarray(windows, np.float64), speed
            ),
        )
    share = compute_slot_shares(placement, topology, split) if share is None else share
    return serve(placement, share, load)


def split_by_home(placement: Placement, topology: Topology) -> Iterator[Floats]:
    """Yield for every layer the share of an expert's tokens by home and serving device [D,D,E]."""
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
    """Compute the tokens that visit every device [L,D], and every node [L,N].

    Where a split is hashed, one hash of a token chooses the copies of all its experts, as in the
    replay and in engines: two experts with equally many copies use the same one. Else choices of
    copies are assumed to be independent.
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

    ``top_k`` are the experts of a token by layer [L]. Choices of copies are assumed to be
    independent.
    """
    slots = (placement.slots, compute_slot_shares(placement, topology, split))
    nodes = topology.node_of_device.tolist()
    return _core.estimated_visits(slots, nodes, pairs, top_k, threads=threads)


def count_pairs(
    placement: Placement, topology: Topology, split: Split, transitions: NDArray[np.uint64]
) -> Floats:
    """Compute pairs of neighbouring layers' experts by their devices [L-1,D,D].

    A token has one home in all layers; apart from that, choices of copies are assumed to be
    independent.
    """
    if not RULES[split].by_home or not placement.has_copies:
        share = compute_slot_shares(placement, topology, split)
        return _core.expected_transitions((placement.slots, share), transitions)
    tables = transitions.astype(np.float64)
    pairs = np.empty((len(tables), placement.devices, placement.devices))
    for layer, (share, next_share) in enumerate(pairwise(split_by_home(placement, topology))):
        pairs_by_home = np.matmul(np.matmul(share, tables[layer]), next_share.transpose(0, 2, 1))
        pairs[layer] = pairs_by_home.mean(axis=0)
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
    they send to its experts, whose load is ``expert_load`` [W,L,E].
    """
    devices = placement.devices
    if not RULES[split].by_home:
        rows = np.repeat(visits[:, None, :] / devices, devices, axis=1)
    else:
        assert expert_load is not None
        load_of_home = expert_load.sum(axis=0, dtype=np.float64) / devices
        rows = np.empty((placement.layers, devices, devices))
        for layer, share in enumerate(split_by_home(placement, topology)):
            pairs = share @ load_of_home[layer]
            served = np.maximum(pairs.sum(axis=0), 1e-300)
            rows[layer] = pairs * (visits[layer] / served)
    rows[:, np.arange(devices), np.arange(devices)] = 0
    return rows


def count_busy_slots(placement: Placement, slot_load: NDArray[Any]) -> NDArray[Any]:
    """Count the slots of every device that have a token [W,L,D], given tokens by slot [W,L,D*S]."""
    sizes = (placement.layers, placement.devices, placement.slots_per_device)
    return by_chunk(
        slot_load,
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

    return by_chunk(expert_load, expect)
