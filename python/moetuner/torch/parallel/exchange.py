"""Exchange: rows from every rank to the ranks that want them, once each, and sums back.

Rows are exchanged by ``all_to_all_single`` with uneven splits. A header goes first and says how
many rows come, and whether sender and receiver mean the same thing: what ranks disagree on is found
before any row is sent, and on every rank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

# Faults that a rank can find in its input; all ranks learn of them from the header.
NOT_FINITE, NO_EXPERT, MISFIT = 1, 2, 4
FAULTS = {
    NOT_FINITE: "top_k_weights must be finite",
    NO_EXPERT: "top_k_index must be experts of the placement, from 0 to {experts} - 1",
    MISFIT: "its tensors do not fit the layer",
}

# Marks of the backward pass, beside the faults.
TOKENS_LEARN, EXPERTS_LEARN, NO_GRADIENTS = 8, 16, 32


class Backward:
    """The backward pass of one step: who wants gradients, and a thread through its exchanges.

    An exchange takes all ranks, in the backward pass as well. So it must be recorded on all ranks
    or on none, also where a rank's own tokens and experts need no gradient. Every exchange gives a
    thread to the next one, a number that needs a gradient; so none is left out, and their order is
    the same on every rank.

    Parameters
    ----------
    tokens
        Whether hidden states or router weights of this rank need gradients.
    experts
        Whether its experts do.
    """

    def __init__(self, *, tokens: bool = False, experts: bool = False) -> None:
        self.wants = tokens * TOKENS_LEARN | experts * EXPERTS_LEARN
        if not torch.is_grad_enabled():
            self.wants = NO_GRADIENTS
        self.thread: Tensor | None = None

    def exchange(self, splits: Splits, if_any: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Exchange the rows of tensors [R,...] as one message per rank; differentiable.

        It is recorded if a rank has said one of the bits ``if_any``.
        """
        if self.thread is None and splits.learning & if_any:
            self.thread = torch.zeros((), device=tensors[0].device, requires_grad=True)
        thread, *out = _Exchange.apply(splits, self.thread, *tensors)
        if self.thread is not None:
            self.thread = thread
        return tuple(out)


@dataclass(frozen=True)
class Header:
    """What every rank tells every other one.

    Parameters
    ----------
    fingerprint
        Of placement and rules, a scalar on the device of the rows.
    layout
        How a row with its slots and weights is made up.
    faults
        Bits of ``FAULTS``, a scalar on the device of the rows.
    wants
        Bits of ``Backward.wants``.
    """

    fingerprint: Tensor
    layout: int
    faults: Tensor
    wants: int = 0


@dataclass(frozen=True)
class Splits:
    """Rows that go to and come from every rank of a group.

    ``learning`` has the bits of ``Backward.wants`` of all ranks; ``visits`` counts the targets of
    the rows that come.
    """

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup | None
    learning: int = 0
    visits: int = 0

    @property
    def back(self) -> Splits:
        """The same rows on their way home."""
        return Splits(self.receive, self.send, self.group, self.learning)


class Hop:
    """One exchange: every row to each distinct rank among its targets.

    Parameters
    ----------
    target
        Ranks that row r goes to [R,K], with repetitions; -1 is none.
    header
        What must be the same on all ranks.
    group
        The ranks.
    experts
        Experts of the placement.
    backward
        The backward pass of the step that this is an exchange of.

    Raises
    ------
    ValueError
        On all ranks if one has found a fault in its input.
    RuntimeError
        On all ranks if they do not agree.
    """

    def __init__(
        self,
        target: Tensor,
        header: Header,
        group: dist.ProcessGroup | None,
        *,
        experts: int,
        backward: Backward,
    ) -> None:
        self._backward = backward
        ranks = dist.get_world_size(group)
        (rows, top_k), device = target.shape, target.device
        target = torch.where(target < 0, ranks, target)
        chosen = target.new_zeros(rows, ranks + 1).scatter_add_(1, target, torch.ones_like(target))
        chosen = chosen[:, :ranks]
        visits = chosen > 0
        counts = torch.stack([visits.sum(dim=0), chosen.sum(dim=0)], dim=1)
        self.splits = _introduce(counts, header, group, experts)
        # Sorted by rank, then by row: the order on the wire. The host knows how many there are, so
        # it need not wait for the device again, as ``nonzero`` would.
        total, flat = sum(self.splits.send), visits.T.reshape(-1)
        order = torch.where(flat, flat.cumsum(dim=0) - 1, total)
        place = torch.arange(len(flat), device=device)
        place = place.new_zeros(total + 1).scatter_(0, order, place)[:total]
        rank, self._row = place // max(rows, 1), place % max(rows, 1)
        # A row's results in ascending order of rank: its j-th is number `_parts[row, j]` of those
        # that come back. What is missing points at a row of zeros behind the last.
        nth = visits.cumsum(dim=1)[self._row, rank] - 1
        parts = torch.full((rows, min(top_k, ranks)), total, device=device)
        parts[self._row, nth] = torch.arange(total, device=device)
        self._parts = parts

    def send(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Send row r of every tensor [R,...] to its ranks; gives what came, by rank."""
        rows = (tensor[self._row] for tensor in tensors)
        return self._backward.exchange(self.splits, TOKENS_LEARN, *rows)

    def gather(self, results: Tensor) -> Tensor:
        """Send results back; gives each row's sum in ascending order of rank."""
        back, either = self.splits.back, TOKENS_LEARN | EXPERTS_LEARN
        (returned,) = self._backward.exchange(back, either, results)
        return sum_rows(returned, self._parts)


def sum_rows(values: Tensor, which: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum rows of values [N,H], from left to right, into as many rows as ``which`` has.

    Sums run in float32 at least and one column of ``which`` after the other, so that the order is
    fixed: no atomic additions.

    Parameters
    ----------
    values
        Rows [N,H].
    which
        Rows to sum [R,J]; N stands for zero.
    weights
        Factors [R,J]; all 1 if None.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
    total: Tensor | None = None
    for j in range(which.shape[1]):
        part = padded[which[:, j]].to(wide)
        if weights is not None:
            part = part * weights[:, j, None].to(wide)
        total = part if total is None else total + part
    assert total is not None
    return total.to(values.dtype)


class _Exchange(torch.autograd.Function):
    """Rows out; in the backward pass their gradients home."""

    @staticmethod
    def forward(
        ctx: Any, splits: Splits, thread: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.splits = splits
        ctx.smooth = [tensor.is_floating_point() for tensor in tensors]
        out = _swap(splits, tensors)
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        return None if thread is None else thread.new_zeros(()), *out

    @staticmethod
    def backward(ctx: Any, thread: Tensor | None, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        smooth = [g for g, is_smooth in zip(gradients, ctx.smooth, strict=True) if is_smooth]
        back = iter(_swap(ctx.splits.back, smooth))
        return (None, thread, *(next(back) if is_smooth else None for is_smooth in ctx.smooth))


def _swap(splits: Splits, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pack the rows of all tensors side by side as bytes, and unpack what comes."""
    rows = sum(splits.receive)
    if len(tensors) == 1:
        (only,) = tensors
        out = only.new_empty(rows, *only.shape[1:])
        _all_to_all(out, only.contiguous(), splits)
        return [out]
    packed = torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], dim=1)
    arrived = packed.new_empty(rows, packed.shape[1])
    _all_to_all(arrived, packed, splits)
    widths = [tensor.shape[1] * tensor.element_size() for tensor in tensors]
    parts = torch.split(arrived, widths, dim=1)
    # Copies, even of a single row: only they are aligned for their type.
    return [
        part.clone(memory_format=torch.contiguous_format).view(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _all_to_all(out: Tensor, rows: Tensor, splits: Splits) -> None:
    dist.all_to_all_single(out, rows, splits.receive, splits.send, group=splits.group)


def _introduce(
    counts: Tensor, header: Header, group: dist.ProcessGroup | None, experts: int
) -> Splits:
    """Exchange headers with counts of rows and targets [D,2]; raise what they say is wrong."""
    ranks = len(counts)
    layout = torch.full((ranks, 1), header.layout, device=counts.device)
    said = torch.stack([header.fingerprint, header.faults + header.wants]).expand(ranks, 2)
    sent = torch.cat([counts, layout, said], dim=1)
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent, group=group)
    # The one time that the host waits for the device before the rows are exchanged.
    table = torch.cat([came, sent], dim=1).tolist()
    me, own = dist.get_rank(group), table[0][5:]
    for rank, row in enumerate(table):
        for bit, message in FAULTS.items():
            if row[4] & bit:
                raise ValueError(f"rank {rank}: {message.format(experts=experts)}")
    for what, column in (("other placements", 3), ("rows of another size or type", 2)):
        others = [rank for rank in range(ranks) if table[rank][column] != own[column]]
        if others:
            raise RuntimeError(f"ranks {others} have {what} than rank {me}: nothing was sent")
    wants = [row[4] for row in table]
    learning = [rank for rank in range(ranks) if wants[rank] & (TOKENS_LEARN | EXPERTS_LEARN)]
    others = [rank for rank in range(ranks) if wants[rank] & NO_GRADIENTS]
    if learning and others:
        raise RuntimeError(
            f"ranks {learning} need gradients and ranks {others} have them disabled: nothing was "
            "sent"
        )
    either = TOKENS_LEARN | EXPERTS_LEARN
    every = functools.reduce(operator.or_, wants) & either
    send, receive = [row[5] for row in table], [row[0] for row in table]
    return Splits(send, receive, group, every, visits=sum(row[1] for row in table))


def _zeros() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass
class TrafficCounters:
    """What one rank sent to its peers, and received, in one layer.

    A rank's rows to itself do not travel and are not counted, nor are the headers (40 bytes per
    peer and exchange).

    Parameters
    ----------
    devices
        Ranks of the group, D.

    Attributes
    ----------
    steps
        Forward passes.
    rows_sent, rows_received
        Rows of the dispatch [D]; the combine brings back as many.
    dispatch_bytes_sent, dispatch_bytes_received
        Hidden states, slots and weights [D].
    combine_bytes_sent, combine_bytes_received
        Results [D].
    """

    devices: int
    steps: int = 0
    rows_sent: NDArray[np.int64] = field(default_factory=_zeros)
    rows_received: NDArray[np.int64] = field(default_factory=_zeros)
    dispatch_bytes_sent: NDArray[np.int64] = field(default_factory=_zeros)
    dispatch_bytes_received: NDArray[np.int64] = field(default_factory=_zeros)
    combine_bytes_sent: NDArray[np.int64] = field(default_factory=_zeros)
    combine_bytes_received: NDArray[np.int64] = field(default_factory=_zeros)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.steps = 0
        for name in (
            "rows_sent",
            "rows_received",
            "dispatch_bytes_sent",
            "dispatch_bytes_received",
            "combine_bytes_sent",
            "combine_bytes_received",
        ):
            setattr(self, name, np.zeros(self.devices, dtype=np.int64))

    def count(
        self,
        rank: int,
        sent: list[int],
        received: list[int],
        *,
        dispatch_row: int,
        combine_row: int,
    ) -> None:
        """Count one exchange of rows [D], of so many bytes each, and their way back."""
        out, back = np.array(sent), np.array(received)
        out[rank] = back[rank] = 0
        self.rows_sent += out
        self.rows_received += back
        self.dispatch_bytes_sent += out * dispatch_row
        self.dispatch_bytes_received += back * dispatch_row
        self.combine_bytes_sent += back * combine_row
        self.combine_bytes_received += out * combine_row
