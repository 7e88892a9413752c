"""What is expected of a placement where tokens are not replayed: visits, rows, active experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation import copies
from moetuner.evaluation.blocks import by_block
from moetuner.evaluation.copies import Split
from moetuner.placement import EMPTY, Placement
from moetuner.statistics import ExpertSets
from moetuner.topology import Topology

Floats = NDArray[np.float64]


def visits(
    placement: Placement,
    topology: Topology,
    split: Split,
    sets: Sequence[ExpertSets],
    threads: int | None = None,
) -> tuple[Floats, Floats]:
    """Return tokens that visit every device [L,D], and every node [L,N].

    With split ``even`` one hash of a token chooses the copies of all its experts, as the replay and
    engines have it: two experts with equally many copies take the same one. With others, copies are
    taken to be chosen independently of each other.
    """
    tables = [(of.ids, of.counts) for of in sets]
    slots = (placement.slots, copies.slot_shares(placement, topology, split))
    return _core.expected_visits(
        slots,
        placement.num_experts,
        topology.node_of_device.tolist(),
        tables,
        hashed=split == "even",
        threads=threads,
    )


def followed(
    placement: Placement, topology: Topology, split: Split, transitions: NDArray[np.uint64]
) -> Floats:
    """Return pairs of neighbouring layers' experts by their devices [L-1,D,D].

    A token has one home in all layers; apart from that, copies are taken to be chosen independently
    of each other.
    """
    if split != "nearest" or not placement.has_copies:
        share = copies.slot_shares(placement, topology, split)
        return _core.expected_followed((placement.slots, share), transitions)
    tables = transitions.astype(np.float64)
    pairs = np.empty((len(tables), placement.devices, placement.devices))
    for layer, (here, there) in enumerate(pairwise(copies.by_home(placement, topology))):
        by_home = np.matmul(np.matmul(here, tables[layer]), there.transpose(0, 2, 1))
        pairs[layer] = by_home.mean(axis=0)
    return pairs


def dispatched(
    placement: Placement,
    topology: Topology,
    split: Split,
    visits: NDArray[Any],
    expert_load: NDArray[Any] | None,
) -> Floats:
    """Compute rows [L,D,D] from homes that are spread evenly, given visits [L,D].

    Where a home has preferences the rows of a device come from homes in proportion to the tokens
    that they send to its experts, of which there are so many in every window [W,L,E].
    """
    devices = placement.devices
    if split != "nearest":
        rows = np.repeat(visits[:, None, :] / devices, devices, axis=1)
    else:
        assert expert_load is not None
        of_expert = expert_load.sum(axis=0, dtype=np.float64) / devices
        rows = np.empty((placement.layers, devices, devices))
        for layer, share in enumerate(copies.by_home(placement, topology)):
            pairs = share @ of_expert[layer]
            served = np.maximum(pairs.sum(axis=0), 1e-300)
            rows[layer] = pairs * (visits[layer] / served)
    rows[:, np.arange(devices), np.arange(devices)] = 0
    return rows


def active(placement: Placement, share: Floats, expert_load: NDArray[Any]) -> NDArray[Any]:
    """Return experts of every device that have a token, or are expected to [W,L,D].

    Of every window's tokens [W,L,E]; slots serve shares [L,D,S], as ``slot_shares`` has them. Whole
    numbers take as few bytes as hold them.
    """

    def counted(load: NDArray[Any]) -> NDArray[Any]:
        return copies.served(placement, share, load > 0).astype(np.uint16)

    def by_chance(load: NDArray[Any]) -> NDArray[Any]:
        experts = np.empty((len(load), placement.layers, placement.devices))
        for layer, slots in enumerate(placement.slots):
            device, slot = np.nonzero(slots != EMPTY)
            tokens = load[:, layer, slots[device, slot]].astype(np.float64)
            # A copy with a share of the tokens is idle if all of them go to others.
            with np.errstate(divide="ignore", invalid="ignore"):
                rest = np.log1p(-share[layer, device, slot])
                busy = np.where(tokens > 0, 1 - np.exp(tokens * rest), 0.0)
            experts[:, layer] = busy @ np.equal.outer(device, np.arange(placement.devices))
        return experts

    return by_block(expert_load, by_chance if placement.has_copies else counted)
