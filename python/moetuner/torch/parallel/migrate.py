"""Migration: put another placement in force on all ranks, or on none.

First the weights of all layers that change arrive in spare buffers, one layer after the other. Only
when every rank has said that all of its own are there does any rank copy them into their slots and
route to them. Should a rank be lost between those two, the next step's headers stop the others
before they send a row.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY, Placement
from moetuner.torch.parallel.layer import ExpertParallelMoE


class MoveError(RuntimeError):
    """A move of experts did not take place; the old placement is in force."""


class NoRoomError(MoveError):
    """A rank had no memory for what would have arrived; all ranks are there and know it."""


class Agreement:
    """A channel beside the one that moves data, on the host, with a time limit of its own.

    Parameters
    ----------
    group
        The ranks that must agree; None for all. All of them make an ``Agreement`` at once.
    timeout
        Seconds to wait for the slowest rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        ranks = None if group is None else dist.get_process_group_ranks(group)
        made = dist.new_group(
            ranks, self.timeout, backend="gloo", use_local_synchronization=ranks is not None
        )
        assert isinstance(made, dist.ProcessGroup)
        self.group = made
        self.rank = dist.get_rank(group)

    def reach(
        self,
        about: str,
        value: int = 0,
        failure: Exception | None = None,
        kind: type[MoveError] = MoveError,
    ) -> None:
        """Wait until every rank says that it has not failed and means the same value.

        Parameters
        ----------
        about
            What is agreed on, for the message.
        value
            Fingerprint of it, 63 bits.
        failure
            What has gone wrong on this rank, if anything.
        kind
            Of the error, where a rank has failed.

        Raises
        ------
        MoveError
            On every rank, if one has failed, differs, is gone or does not answer in time.
        """
        mine = torch.tensor([failure is not None, value], dtype=torch.int64)
        said = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        try:
            work = dist.all_gather(said, mine, group=self.group, async_op=True)
            assert work is not None
            work.wait(self.timeout)
        except RuntimeError as error:
            raise MoveError(
                f"no agreement on {about} within {self.timeout.total_seconds():g} s, a rank is "
                f"gone or stuck; the old placement stays in force: {failure or error}"
            ) from (failure or error)
        failed = [rank for rank, words in enumerate(said) if words[0]]
        if failed:
            why = f": {failure}" if failure else ""
            raise kind(
                f"ranks {failed} failed at {about}; the old placement stays in force{why}"
            ) from failure
        others = [rank for rank, words in enumerate(said) if words[1] != value]
        if others:
            raise MoveError(
                f"ranks {others} do not agree with rank {self.rank} on {about}; "
                "the old placement stays in force"
            )

    def largest(self, about: str, value: int) -> int:
        """Return the largest value of any rank.

        Raises
        ------
        MoveError
            On every rank that is left, if one is gone or does not answer in time.
        """
        most = torch.tensor([value], dtype=torch.int64)
        try:
            work = dist.all_reduce(most, dist.ReduceOp.MAX, self.group, async_op=True)
            if work is not None:
                work.wait(self.timeout)
        except RuntimeError as error:
            raise MoveError(
                f"no agreement on {about} within {self.timeout.total_seconds():g} s, a rank is "
                f"gone or stuck; the old placement stays in force: {error}"
            ) from error
        return int(most)


def fingerprint(*parts: bytes) -> int:
    """Return 63 bits that equal parts share."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


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


def migrate(
    layers: Sequence[ExpertParallelMoE],
    target: Placement,
    *,
    agreement: Agreement,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Move weights and switch; every rank calls it between two steps, with the same target.

    Parameters
    ----------
    layers
        The layers of this rank, by number.
    target
        The placement to be; the same sizes as the one in force.
    agreement
        Channel of the same ranks.
    group
        The ranks, for the weights.

    Raises
    ------
    ValueError
        If the target has other sizes.
    MoveError
        On every rank that is left, if one fails, differs or is lost; no layer has switched.
        ``NoRoomError`` if a rank has no memory for what would arrive, so a part may fit. After
        a loss the group cannot be used any more, after other failures it can.
    """
    current = layers[0].placement
    if (target.num_experts, target.slots.shape) != (current.num_experts, current.slots.shape):
        raise ValueError(
            f"target must have {current.num_experts} experts and slots "
            f"{list(current.slots.shape)} like the placement in force, "
            f"got {target.num_experts} and {list(target.slots.shape)}"
        )
    spares: list[Spares] = []
    plan = fingerprint(current.slots.tobytes(), target.slots.tobytes())
    try:
        for number, layer in enumerate(layers):
            steps = moves(current.slots[number], target.slots[number], layer.devices_per_node)
            spares.append(Spares(layer.experts.weights(), steps, layer.rank))
    except Exception as error:
        # The others must not wait for this rank's weights.
        agreement.reach("room for a move", plan, error, NoRoomError)
    agreement.reach("room for a move", plan, kind=NoRoomError)
    for number, spare in enumerate(spares):
        if not spare.plan:
            continue
        failure = None
        try:
            spare.fill(group, agreement.timeout.total_seconds())
        except Exception as error:
            failure = error
        agreement.reach(f"the weights of layer {number}", plan, failure)
    for layer, spare in zip(layers, spares, strict=True):
        spare.put(layer.experts.weights())
        layer.switch(target)
