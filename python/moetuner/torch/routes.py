"""Routes: one layer's placement as tensors, from a token's experts to the slots that serve it."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moetuner.evaluation.rows import Split, copies, mixed, node_size, split_rule
from moetuner.placement import Placement


class Routes:
    """Where the copies of every expert of a layer are, seen from one rank.

    Parameters
    ----------
    placement
        The placement of all layers.
    layer
        Which one.
    rank
        Rank whose tokens are routed; matters to ``split="nearest"`` alone.
    devices_per_node
        Devices of a node, None for one node.
    split
        How a token chooses between copies, as in ``moetuner.evaluation.rows.dispatch_rows``.
    device
        Where the tensors live.

    Attributes
    ----------
    fingerprint
        Number that ranks with the same slots and rules share, and others do not.
    """

    def __init__(
        self,
        placement: Placement,
        layer: int,
        *,
        rank: int,
        devices_per_node: int | None,
        split: Split,
        device: torch.device,
    ) -> None:
        if not 0 <= layer < placement.layers:
            raise ValueError(
                f"layer must be from 0 to {placement.layers - 1}, the placement's, got {layer}"
            )
        self.placement = placement
        self.layer = layer
        self.experts = placement.num_experts
        self.slots_per_device = placement.slots_per_device
        self.node_size = node_size(placement.devices, devices_per_node)
        near = rank if split_rule(split) == "nearest" else None
        slots = placement.slots[layer]
        table, count = copies(slots, self.experts, near=near, node=self.node_size)
        self._table = torch.from_numpy(table).to(device)
        self._count = torch.from_numpy(count).to(device)
        rules = (slots.shape, self.experts, layer, devices_per_node, split)
        digest = hashlib.sha256(repr(rules).encode() + slots.astype("<i4").tobytes()).digest()
        self.fingerprint = int.from_bytes(digest[:8], "little", signed=True)

    def slots_of(self, expert_ids: Tensor, position: Tensor) -> Tensor:
        """Give the slots ``device * S + slot`` [T,K] that serve experts [T,K] of tokens [T]."""
        if self._table.shape[1] == 1:
            return self._table[:, 0][expert_ids]
        hashed: Tensor = mixed(position.long())
        return self._table[expert_ids, hashed[:, None] % self._count[expert_ids]]
