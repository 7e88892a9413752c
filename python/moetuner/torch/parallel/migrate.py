"""Put another placement in force on all ranks, or on none.

First the weights of all layers that change are sent to spare buffers, layer by layer. When every
rank has all of its weights, each rank exchanges them for those in its slots. When every rank has
done that, all route tokens to the new weights; otherwise they exchange the weights back.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY, Placement, compare_holders, find_holders
from moetuner.topology import Topology
from moetuner.torch.parallel.agreement import (
    Agreement,
    MoveError,
    NoMemoryError,
    attempt,
    fingerprint,
)
from moetuner.torch.parallel.layer import ExpertParallelMoE

# Share of the free memory that buffers may take; the rest is for the model itself.
SHARE = 0.5
# What follows if the exchange of weights does not end on a rank: its part would pair with the next.
UNUSABLE = (
    "the exchange of weights did not end on every rank, so the process group may be unusable: the "
    "next forward pass can end the process; start the ranks again"
)


class Move(NamedTuple):
    """The move of an expert's weights from a slot to another one, of the same or another rank."""

    source: int
    source_slot: int
    target: int
    target_slot: int


def moves(old: NDArray[np.int32], new: NDArray[np.int32], node: int | None = None) -> list[Move]:
    """List the moves from slots [D,S] to other slots [D,S'], the same on every rank.

    A copy comes from its own device if that holds the expert, else from the source in
    ``Placement.diff``, in a topology of nodes of ``node`` devices; None for one node.
    """
    experts = int(new.max()) + 1
    before, after = (find_holders(slots[None], experts) for slots in (old, new))
    topology = None if node is None else Topology(len(old), devices_per_node=node)
    arrivals = compare_holders(before, after, topology, None).moves.tolist()
    source_of = {(target, expert): source for _, expert, source, target in arrivals}
    places = map(tuple, np.argwhere(old != EMPTY).tolist())
    slot_of = {(at[0], int(old[at])): at[1] for at in places}
    steps = []
    for target, slot in np.argwhere(new != EMPTY).tolist():
        expert = int(new[target, slot])
        source = source_of.get((target, expert), target)
        steps.append(Move(source, slot_of[source, expert], target, slot))
    return [move for move in steps if move[:2] != move[2:]]


class Spares:
    """Buffers for the weights that arrive on a rank in one layer.

    ``weights`` are the layer's by name [S,...], ``plan`` the moves of all ranks.
    """

    def __init__(self, weights: dict[str, Tensor], plan: list[Move], rank: int) -> None:
        self.plan = plan
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        # Sorted by peer, then in the order of the plan: that is the order on the wire.
        self._arriving = sorted((m for m in plan if m.target == rank), key=lambda move: move.source)
        self._departing = sorted(
            (m for m in plan if m.source == rank), key=lambda move: move.target
        )
        rows = len(self._arriving)
        self.buffers = {name: w.new_empty(rows, *w.shape[1:]) for name, w in self.weights.items()}
        self._exchanged: list[tuple[Tensor, Tensor]] = []
        # Whether this rank has sent and received all, so that nothing of it is left in the group.
        self.filled = False

    def fill(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        """Send and receive weights; every rank takes part, also without moves or after a failure.

        All exchanges are started before any is waited for. So those of a late rank pair up with
        those of the others, which have given up, and not with the next exchanges of the others.
        """
        deadline, failures, started = time.monotonic() + timeout, [], []
        slots = [move.source_slot for move in self._departing]
        ranks = range(dist.get_world_size(group))
        arriving = Counter(move.source for move in self._arriving)
        departing = Counter(move.target for move in self._departing)
        splits = [arriving[rank] for rank in ranks], [departing[rank] for rank in ranks]
        for name, buffer in self.buffers.items():
            sent, failure = attempt(lambda name=name: self.weights[name][slots])
            if sent is None:
                failures.append(failure)
                # The others wait for as many rows, whatever is in them.
                sent = buffer.new_empty(len(slots), *buffer.shape[1:])
            # As bytes, which every backend can send. Tensors are kept alive by the operation.
            out, rows = (
                rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
                for rows in (buffer, sent)
            )
            work = dist.all_to_all_single(out, rows, *splits, group=group, async_op=True)
            assert work is not None
            started.append((work, out))
        for work, out in started:
            # Waiting with NCCL only queues on the stream and would not notice the time.
            while out.is_cuda and not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError("no answer within the timeout")
                time.sleep(0.0005)
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        self.filled = True
        for failure in filter(None, failures):
            raise failure

    def put(self, weights: dict[str, Tensor]) -> None:
        """Exchange the weights that have arrived for those in their slots [S,...]."""
        for name, buffer in self.buffers.items():
            for arrived, move in zip(buffer, self._arriving, strict=True):
                self._exchanged.append((weights[name].detach()[move.target_slot], arrived))
                _swap(*self._exchanged[-1])

    def undo(self) -> None:
        """Exchange the weights back."""
        while self._exchanged:
            _swap(*self._exchanged.pop())


def _swap(first: Tensor, second: Tensor) -> None:
    spare = first.clone()
    first.copy_(second)
    second.copy_(spare)


def expert_bytes(layer: ExpertParallelMoE) -> int:
    """Return the bytes of one expert's weights."""
    weights = layer.experts.weights().values()
    return sum(weight[0].numel() * weight.element_size() for weight in weights)


def free_bytes(device: torch.device, sharing: int) -> float:
    """Return the free bytes of a GPU, or one rank's part of a host's memory, which ranks share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved and does not use.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    facts = Path("/proc/meminfo")
    available = re.search(r"MemAvailable:\s*(\d+)", facts.read_text() if facts.exists() else "")
    return int(available[1]) * 1024 / sharing if available else math.inf


def migrate(layers: Sequence[ExpertParallelMoE], target: Placement, agreement: Agreement) -> None:
    """Move weights and switch; every rank calls it between two steps, with the same target.

    If a rank fails, differs or is lost, all others raise a ``MoveError`` and keep the old
    placement. It is a ``NoMemoryError`` if the weights that arrive on a rank take more than half of
    its free memory, so that a smaller move may fit. The group can be used afterwards, unless a rank
    was lost or failed in the middle of an exchange of weights; the error then says so.
    """
    plan = fingerprint(layers[0].placement.slots.tobytes(), target.slots.tobytes())
    # The others must not wait for the weights of a rank that has no memory.
    spares, failure = attempt(_make_buffers, layers, target)
    posts = agreement.exchange("memory for a move", failure and repr(failure))
    short = [f"rank {rank} needs memory: {why}" for rank, why in enumerate(posts) if why]
    if short or spares is None:
        raise NoMemoryError(f"{'; '.join(short)}; the old placement stays in force")
    for number, spare in enumerate(spares):
        if spare.plan:
            try:
                agreement.reach(
                    f"the weights of layer {number}", plan, _fill(spare, agreement, layers)
                )
            except MoveError as error:
                if spare.filled or UNUSABLE in str(error):
                    raise
                raise MoveError(f"{error}; {UNUSABLE}") from error

    def put() -> None:
        for layer, spare in zip(layers, spares, strict=True):
            spare.put(layer.experts.weights())

    try:
        agreement.reach("the new weights in their slots", plan, attempt(put)[1])
    except BaseException:
        for spare in spares:
            spare.undo()
        raise
    for layer in layers:
        layer.switch(target)


def _fill(
    spare: Spares, agreement: Agreement, layers: Sequence[ExpertParallelMoE]
) -> Exception | None:
    """Fill buffers; return the error, which says what is left in the group."""
    failure = attempt(spare.fill, layers[0].group, agreement.timeout)[1]
    if failure is None or spare.filled:
        return failure
    return RuntimeError(f"{failure}; {UNUSABLE}")


def _make_buffers(layers: Sequence[ExpertParallelMoE], target: Placement) -> list[Spares]:
    """Make the buffers of every layer; raise if they take more than half of the free memory."""
    current, needed, plans = layers[0].placement, 0, []
    for layer, before, after in zip(layers, current.slots, target.slots, strict=True):
        plans.append(moves(before, after, layer.devices_per_node))
        needed += expert_bytes(layer) * sum(move.target == layer.rank for move in plans[-1])
    free = free_bytes(layers[0].device, current.devices)
    if needed > SHARE * free:
        raise MemoryError(f"{needed} bytes must fit half of the {free:.0f} free ones")
    pairs = zip(layers, plans, strict=True)
    return [Spares(layer.experts.weights(), plan, layer.rank) for layer, plan in pairs]
