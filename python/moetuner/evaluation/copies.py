"""Which copy of an expert serves a token: the expected shares, where tokens are not replayed.

Engines differ: ``even`` hashes the token's position (vLLM), ``nearest`` takes the copy on the
token's home device, else those of its node, else all, evenly (SGLang's static dispatch),
``round_robin`` lets the copies take turns (TensorRT-LLM). Homes are spread evenly over devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moetuner import _core
from moetuner.evaluation.blocks import by_block
from moetuner.placement import EMPTY, Placement
from moetuner.topology import Topology

Split = Literal["even", "nearest", "round_robin"]
SPLITS: tuple[Split, ...] = get_args(Split)

Floats = NDArray[np.float64]


def slot_shares(placement: Placement, topology: Topology, split: Split) -> Floats:
    """Compute the share of its expert's tokens that every slot serves [L,D,S]; 0 if it is empty."""
    slots = placement.slots
    layer, expert = np.arange(placement.layers)[:, None, None], np.maximum(slots, 0)
    if split != "nearest" or not placement.has_copies:
        number = placement.replicas[layer, expert]
        return np.divide(1.0, number, out=np.zeros(slots.shape), where=slots != EMPTY)
    device = np.arange(placement.devices)[None, :, None]
    share = np.stack([of.mean(axis=0) for of in by_home(placement, topology)])
    return np.where(slots == EMPTY, 0.0, share[layer, device, expert])


def served(placement: Placement, share: Floats, load: NDArray[Any]) -> Floats:
    """Return tokens that every device serves [W,L,D], of those of experts [W,L,E].

    Slots serve shares [L,D,S], as ``slot_shares`` has them.
    """
    slots = placement.slots, share
    return by_block(
        load, lambda some: _core.expected_load(slots, np.ascontiguousarray(some, np.float64))
    )


def by_home(placement: Placement, topology: Topology) -> Iterator[Floats]:
    """Yield the shares of nearest copies of every home [home,D,E], layer by layer."""
    node = topology.node_of_device
    for holders in placement.held.astype(np.float64):
        near = (node[:, None] == node[None, :])[:, :, None] * holders
        # Copies that a home may use: those of its node if there are any.
        usable = np.where(near.sum(axis=1, keepdims=True) > 0, near, holders)
        share: Floats = usable / usable.sum(axis=1, keepdims=True)
        home, expert = np.nonzero(holders)
        share[home, :, expert] = 0
        share[home, home, expert] = 1
        yield share
