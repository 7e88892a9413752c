"""Transfer: who sends which expert to whom to get from one layer's slots to other slots.

Weights arrive in spare buffers; nothing that is in use is touched until they are put into their
slots, which is a local copy.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY


@dataclass(frozen=True)
class Move:
    """One expert's weights from a slot of one rank to a slot of another, or of the same."""

    expert: int
    source: int
    source_slot: int
    target: int
    target_slot: int


def moves(old: NDArray[np.int32], new: NDArray[np.int32], node: int | None = None) -> list[Move]:
    """List what must move to get from slots [D,S] to other slots [D,S'], the same on every rank.

    A copy comes from its own device if that holds the expert, else from its own node, else from
    elsewhere; among those from whom the fewest come already.

    Parameters
    ----------
    old, new
        Expert ids, -1 for an empty slot.
    node
        Devices of a node; all of them if None.
    """
    devices = len(old)
    node = node or devices
    held: dict[int, list[tuple[int, int]]] = {}
    for device, slot in np.argwhere(old != EMPTY).tolist():
        held.setdefault(int(old[device, slot]), []).append((device, slot))
    sends = [0] * devices
    found = []
    for target, slot in np.argwhere(new != EMPTY).tolist():
        expert = int(new[target, slot])
        if slot < old.shape[1] and old[target, slot] == expert:
            continue

        def distance(holder: tuple[int, int], target: int = target) -> tuple[bool, bool, int, int]:
            device = holder[0]
            return device != target, device // node != target // node, sends[device], device

        source, source_slot = min(held[expert], key=distance)
        sends[source] += source != target
        found.append(Move(expert, source, source_slot, target, slot))
    return found


class Spares:
    """Buffers for the weights that arrive on this rank in one layer.

    Parameters
    ----------
    weights
        The layer's weights by name, slots first [S,...].
    plan
        The moves of all ranks.
    rank
        This one.
    """

    def __init__(self, weights: dict[str, Tensor], plan: list[Move], rank: int) -> None:
        self.plan, self.rank = plan, rank
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.slots = [move.target_slot for move in plan if move.target == rank]
        self.buffers = {
            name: weight.new_empty(len(self.slots), *weight.shape[1:])
            for name, weight in self.weights.items()
        }

    def fill(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        """Send and receive, point to point and all at once; every rank takes part.

        Raises
        ------
        RuntimeError
            If a peer is gone or does not answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        operations: list[dist.P2POp] = []
        arriving = 0
        for move in self.plan:
            for name, weight in self.weights.items():
                sent = weight[move.source_slot] if move.source == self.rank else None
                buffer = self.buffers[name][arriving] if move.target == self.rank else None
                if sent is not None and buffer is not None:
                    buffer.copy_(sent)
                elif sent is not None:
                    operations.append(_operation(dist.isend, sent, move.target, group))
                elif buffer is not None:
                    operations.append(_operation(dist.irecv, buffer, move.source, group))
            arriving += move.target == self.rank
        if operations:
            for work in dist.batch_isend_irecv(operations):
                _finish(work, deadline, blocks=not operations[0].tensor.is_cuda)

    def put(self, weights: dict[str, Tensor]) -> None:
        """Copy what has arrived into its slots of weights [S,...]."""
        slots = torch.tensor(self.slots, dtype=torch.int64)
        for name, buffer in self.buffers.items():
            weight = weights[name].detach()
            weight.index_copy_(0, slots.to(weight.device), buffer)


def _operation(verb: Any, tensor: Tensor, rank: int, group: dist.ProcessGroup | None) -> dist.P2POp:
    peer = rank if group is None else dist.get_global_rank(group, rank)
    return dist.P2POp(verb, tensor, peer, group)


def _finish(work: dist.Work, deadline: float, *, blocks: bool) -> None:
    """Wait for a send or receive, until the deadline.

    Waiting with NCCL only queues on the stream and would not notice the time, so it is polled.
    """
    if blocks:
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        return
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError("no answer within the timeout")
        time.sleep(0.0005)
    work.wait()
