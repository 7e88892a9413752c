"""Migration: put another placement in force on all ranks, or on none.

First the weights of all layers that change arrive in spare buffers, one layer after the other. When
every rank has said that all of its own are there, each exchanges them for those in its slots; when
every rank has done so they route to them, and otherwise they exchange them back.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from moetuner.placement import EMPTY, Placement
from moetuner.torch.parallel.layer import ExpertParallelMoE

T = TypeVar("T")

_made: Counter[str] = Counter()  # agreements of this process, by their ranks


class MoveError(RuntimeError):
    """A move of experts did not take place; the old placement is in force."""


class NoRoomError(MoveError):
    """A rank had no memory for what would have arrived; all ranks are there and know it."""


class DisagreementError(MoveError):
    """Ranks mean different values; all ranks are there and know it."""


class Agreement:
    """Agree with all ranks of a group on numbers, through the store that they joined by.

    Every exchange ends with one verdict, written once by whoever comes first: the first rank when
    all ranks have said a number, a rank that has failed, or a rank that has waited too long. All
    ranks go by that verdict, so none goes on where another has given up. A late rank reads it
    without waiting, and the next round of exchanges starts afresh.

    Parameters
    ----------
    group
        The ranks that must agree; None for all. All of them make as many ``Agreement`` as the
        others.
    timeout
        Seconds to wait for the slowest rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        name = f"moetuner/{fingerprint(repr(ranks).encode())}"
        _made[name] += 1
        self._store = PrefixStore(f"{name}/{_made[name]}", _get_default_store())
        self.rank, self.ranks, self.timeout = dist.get_rank(group), len(ranks), timeout
        # In torch's fake group one process stands for all ranks, and its store keeps nothing.
        self._stands_for_all = dist.get_backend(group) == "fake"
        self._round = self._turn = self._missed = 0
        self._verdicts: list[str] = []  # of rounds that a rank may still have to read

    def begin(self) -> None:
        """Begin a round of exchanges, which has the same number on every rank.

        A rank that was late once goes through the rounds that it has missed, and has caught up when
        it has called this as often as the others. One that has not come nearer did not call it as
        often, and goes to the round that the others are in.
        """
        self._round, self._turn = self._round + 1, 0
        if self._stands_for_all:
            return
        missed = 0
        while self._store.check([f"{self._round + missed}.0"]):
            missed += 1
        if 0 < self._missed <= missed:
            self._round, missed = self._round + missed, 0
        self._missed = missed

    def exchange(
        self,
        about: str,
        value: int = 0,
        failure: Exception | None = None,
        kind: type[MoveError] = MoveError,
    ) -> list[int]:
        """Return the values of all ranks.

        Parameters
        ----------
        about
            What is agreed on, for the message.
        value
            Of this rank, 63 bits.
        failure
            What has gone wrong on this rank, if anything.
        kind
            Of the error, where a rank has failed.

        Raises
        ------
        MoveError
            On every rank, if one has failed, is gone or does not answer in time.
        """
        if self._stands_for_all and failure is None:
            return [value] * self.ranks
        turn, self._turn = f"{self._round}.{self._turn}", self._turn + 1
        try:
            if failure is not None:
                self._settle(turn, f"ranks [{self.rank}] failed at {about}", str(failure))
            else:
                self._store.set(f"rank {self.rank}", json.dumps([turn, about, value]))
                self._wait(turn, about)
            said, problem, why = json.loads(self._store.get(turn))
        except RuntimeError as error:
            # The process that serves the store is gone.
            said, problem, why = None, f"no agreement on {about}", str(failure or error)
        if self.rank == 0 and said is not None and turn.endswith(".0"):
            # All are in this round, so nobody has to read what became of earlier ones.
            for old in self._verdicts:
                self._store.delete_key(old)
            self._verdicts.clear()
        self._verdicts.append(turn)
        if said is None:
            kind = kind if "failed" in problem else MoveError
            message = f"{problem}; the old placement stays in force{why and ': '}{why}"
            raise kind(message) from failure
        values: list[int] = said
        return values

    def reach(
        self,
        about: str,
        value: int = 0,
        failure: Exception | None = None,
        kind: type[MoveError] = MoveError,
    ) -> None:
        """Check that every rank means the same value; parameters as of ``exchange``.

        Raises
        ------
        MoveError
            On every rank, if one has failed, is gone or does not answer in time;
            ``DisagreementError`` if one means another value.
        """
        said = self.exchange(about, value, failure, kind)
        others = [rank for rank, other in enumerate(said) if other != value]
        if others:
            raise DisagreementError(
                f"ranks {others} do not agree with rank {self.rank} on {about}; "
                "the old placement stays in force"
            )

    def _wait(self, turn: str, about: str) -> None:
        """Wait until there is a verdict; write it if all have said their values, or none came."""
        end, pause = time.monotonic() + self.timeout, 1e-4
        while not self._store.check([turn]):
            late = time.monotonic() > end
            if self.rank == 0 or late:
                said = [self._said(rank, turn, about) for rank in range(self.ranks)]
                missing = [rank for rank, value in enumerate(said) if value is None]
                if self.rank == 0 and not missing:
                    self._settle(turn, said=said)
                elif late:
                    self._settle(
                        turn, f"ranks {missing} did not answer on {about} within {self.timeout:g} s"
                    )
            time.sleep(pause)
            pause = min(2 * pause, 0.005)

    def _said(self, rank: int, turn: str, about: str) -> int | None:
        key = f"rank {rank}"
        if not self._store.check([key]):
            return None
        at, question, value = json.loads(self._store.get(key))
        return int(value) if [at, question] == [turn, about] else None

    def _settle(
        self, turn: str, problem: str = "", why: str = "", said: list[int | None] | None = None
    ) -> None:
        """Write the verdict of an exchange, unless there is one."""
        self._store.compare_set(turn, "", json.dumps([said, problem, why]))


def attempt(call: Callable[..., T], *arguments: Any) -> tuple[T | None, Exception | None]:
    """Return what a call gives, and what went wrong, so that other ranks can be told of it."""
    try:
        return call(*arguments), None
    except Exception as error:
        return None, error


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
        self.plan = plan
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        # By peer, and of a peer in the order of the plan: the order on the wire.
        come = sorted((m for m in plan if m.target == rank), key=lambda move: move.source)
        go = sorted((m for m in plan if m.source == rank), key=lambda move: move.target)
        self.slots = [move.target_slot for move in come]
        self._sent = [move.source_slot for move in go]
        self._sources = [move.source for move in come]
        self._targets = [move.target for move in go]
        self.buffers = {
            name: weight.new_empty(len(self.slots), *weight.shape[1:])
            for name, weight in self.weights.items()
        }
        self._pending = list(self.weights)
        self._exchanged: list[tuple[Tensor, Tensor]] = []

    def fill(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        """Send and receive; every rank takes part, also one that has nothing to move.

        Raises
        ------
        RuntimeError
            If a peer is gone or does not answer within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while self._pending:
            name = self._pending[0]
            sent = self.weights[name][self._sent]
            self._pending.pop(0)
            self._exchange(self.buffers[name], sent, group, deadline)

    def give_up(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        """Take part in the exchanges that others wait for, with nothing of worth."""
        deadline = time.monotonic() + timeout
        while self._pending:
            name = self._pending.pop(0)
            sent = self.buffers[name].new_empty(len(self._sent), *self.buffers[name].shape[1:])
            self._exchange(self.buffers[name], sent, group, deadline)

    def _exchange(
        self, buffer: Tensor, sent: Tensor, group: dist.ProcessGroup | None, deadline: float
    ) -> None:
        # As bytes, which every backend can send. Tensors are kept alive by the operation.
        out, rows = (
            tensor.view(len(tensor), math.prod(tensor.shape[1:])).view(torch.uint8)
            for tensor in (buffer, sent)
        )
        ranks = dist.get_world_size(group)
        receive, send = (
            np.bincount(np.array(peers, dtype=np.int64), minlength=ranks).tolist()
            for peers in (self._sources, self._targets)
        )
        work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
        assert work is not None
        _finish(work, deadline, blocks=not out.is_cuda)

    def put(self, weights: dict[str, Tensor]) -> None:
        """Exchange what has arrived for what is in its slots of weights [S,...]."""
        for name, buffer in self.buffers.items():
            for arrived, slot in zip(buffer, self.slots, strict=True):
                self._exchanged.append((weights[name].detach()[slot], arrived))
                _swap(*self._exchanged[-1])

    def undo(self) -> None:
        """Exchange back what ``put`` has exchanged."""
        while self._exchanged:
            _swap(*self._exchanged.pop())


def _swap(one: Tensor, other: Tensor) -> None:
    spare = one.clone()
    one.copy_(other)
    other.copy_(spare)


def _finish(work: dist.Work, deadline: float, *, blocks: bool) -> None:
    """Wait for an exchange, until the deadline.

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
        Of the same ranks.
    group
        The ranks, for the weights.

    Raises
    ------
    ValueError
        If the target has other sizes.
    MoveError
        On every rank that is left, if one fails, differs or is lost; all have the old placement.
        ``NoRoomError`` if a rank has no memory for what would arrive, so a part may fit. After
        a loss in the middle of an exchange the group cannot be used any more, else it can.
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

    def prepare() -> None:
        for number, layer in enumerate(layers):
            steps = moves(current.slots[number], target.slots[number], layer.devices_per_node)
            spares.append(Spares(layer.experts.weights(), steps, layer.rank))

    def put() -> None:
        for layer, spare in zip(layers, spares, strict=True):
            spare.put(layer.experts.weights())

    # The others must not wait for the weights of a rank that has no room.
    agreement.reach("room for a move", plan, attempt(prepare)[1], NoRoomError)
    for number, spare in enumerate(spares):
        if spare.plan:
            failure = attempt(spare.fill, group, agreement.timeout)[1]
            if failure is not None:
                attempt(spare.give_up, group, agreement.timeout)
            agreement.reach(f"the weights of layer {number}", plan, failure)
    try:
        agreement.reach("the new weights in their slots", plan, attempt(put)[1])
    except BaseException:
        for spare in spares:
            spare.undo()
        raise
    for layer in layers:
        layer.switch(target)
