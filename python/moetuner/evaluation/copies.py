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

from moetuner._checks import one_of
from moetuner.placement import EMPTY, Placement
from moetuner.topology import Topology

Split = Literal["even", "nearest", "round_robin"]
SPLITS: tuple[Split, ...] = get_args(Split)

Floats = NDArray[np.float64]


def check(split: str) -> None:
    """Raise unless it is the name of a split."""
    one_of("split", split, SPLITS)


def shares(placement: Placement, topology: Topology, split: Split) -> Floats:
    """Compute the share of every expert's tokens that a device serves [L,D,E]."""
    held = placement.held.astype(np.float64)
    if split != "nearest" or not placement.has_copies:
        even: Floats = held / held.sum(axis=1, keepdims=True)
        return even
    return np.stack([of_layer(layer, topology.node_of_device, split) for layer in held])


def copy_shares(placement: Placement, topology: Topology, split: Split) -> Floats | None:
    """Compute shares [L,D,E]; None where every expert has one copy, which takes all."""
    return shares(placement, topology, split) if placement.has_copies else None


def served(placement: Placement, share: Floats | None, load: NDArray[Any]) -> Floats:
    """Return tokens that every device serves [W,L,D], of those of experts [W,L,E].

    Shares are those of ``copy_shares``.
    """
    slots = placement.slots
    if share is None:
        filled = slots != EMPTY
        cell = slots + np.arange(placement.layers)[:, None, None] * placement.num_experts
        of_slot = load.reshape(len(load), -1).take(cell, axis=1)
        alone: Floats = (of_slot if filled.all() else of_slot * filled).sum(
            axis=3, dtype=np.float64
        )
        return alone
    # Layers first: a product of matrices for each.
    by_layer = np.matmul(load.transpose(1, 0, 2).astype(np.float64), share.transpose(0, 2, 1))
    return np.ascontiguousarray(by_layer.transpose(1, 0, 2))


def of_layer(held: Floats, node: NDArray[np.int64], split: Split) -> Floats:
    """Compute shares of experts' tokens that a device serves [D,E], of 1 where it holds one."""
    if split != "nearest":
        even: Floats = held / held.sum(axis=0)
        return even
    mean: Floats = _nearest(held, node).mean(axis=0)
    return mean


def by_home(placement: Placement, topology: Topology, split: Split) -> Iterator[tuple[int, Floats]]:
    """Yield shares of the tokens of every home [home,D,E], layer by layer."""
    for number, held in enumerate(placement.held.astype(np.float64)):
        if split == "nearest":
            yield number, _nearest(held, topology.node_of_device)
        else:
            yield number, np.repeat((held / held.sum(axis=0))[None], len(held), axis=0)


def _nearest(held: Floats, node: NDArray[np.int64]) -> Floats:
    """Compute shares [home,D,E] of a layer that holds experts so [D,E]."""
    near = (node[:, None] == node[None, :])[:, :, None] * held
    in_node = near.sum(axis=1, keepdims=True)
    # Copies that a home may use: those of its node if there are any.
    usable = np.where(in_node > 0, near, held)
    share: Floats = usable / usable.sum(axis=1, keepdims=True)
    home, expert = np.nonzero(held)
    share[home, :, expert] = 0
    share[home, home, expert] = 1
    return share
