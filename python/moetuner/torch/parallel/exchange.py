"""Send rows from every rank once to each rank of their experts, and sums of results back.

Rows are exchanged by ``all_to_all_single`` with uneven splits. A header is sent first. It has the
number of rows to come, and a checksum of what sender and receiver must agree on: so every rank
finds a disagreement before any row is sent.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# Faults that a rank can find in its input; all ranks learn of them from the header.
NOT_FINITE, NO_EXPERT, MISFIT = 1, 2, 4
FAULTS = {
    NOT_FINITE: "top_k_weights must be finite",
    NO_EXPERT: "top_k_index must be experts of the placement, from 0 to {experts} - 1",
    MISFIT: "its tensors do not fit the layer",
}
# Bits that say whether a rank needs gradients. The backward pass of an exchange takes all ranks, so
# it is recorded on all of them or on none, also on a rank whose rows need none.
LEARN, NO_GRADIENTS = 8, 16

Splits = tuple[list[int], list[int]]
Table = Sequence[Sequence[int]]
Group = dist.ProcessGroup | None


class Hop:
    """One exchange: row r to each distinct rank among its targets [R,K]; -1 is none.

    Every rank sends ``header`` [3] to all others: a fingerprint of placement and rules, the layout
    of a row with its slots and weights, and bits of faults and of gradients. ``splits`` are the
    numbers of rows sent to, and received from, every rank; ``visits`` is the number of targets of
    received rows. ``experts`` is their number in the placement, for messages.
    """

    def __init__(self, target: Tensor, header: Tensor, group: Group, *, experts: int) -> None:
        ranks = dist.get_world_size(group)
        (rows, top_k), device = target.shape, target.device
        target = torch.where(target < 0, ranks, target)
        chosen = target.new_zeros(rows, ranks + 1).scatter_add_(1, target, torch.ones_like(target))
        chosen = chosen[:, :ranks]
        visits = chosen > 0
        counts = torch.stack([visits.sum(dim=0), chosen.sum(dim=0)], dim=1)
        sent = torch.cat([counts, header.expand(ranks, 3)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        # The one time that the host waits for the device before the rows are exchanged.
        headers, sent_headers = torch.stack([received, sent]).tolist()
        self._learns = _check(headers, sent_headers, dist.get_rank(group), experts)
        send, receive = ([row[0] for row in table] for table in (sent_headers, headers))
        self.splits, self._group = (send, receive), group
        self.visits = sum(row[1] for row in headers)
        # Sorted by rank, then by row: the order on the wire. The host knows how many there are, so
        # it need not wait for the device again, as ``nonzero`` would.
        total = sum(send)
        place = visits.T.reshape(-1).byte().argsort(descending=True, stable=True)[:total]
        rank, self._row = place // max(rows, 1), place % max(rows, 1)
        # A row's results in ascending order of rank: its j-th is number `_parts[row, j]` of those
        # that come back. What is missing points at a row of zeros behind the last.
        nth = visits.cumsum(dim=1)[self._row, rank] - 1
        self._parts = torch.full((rows, min(top_k, ranks)), total, device=device)
        self._parts[self._row, nth] = torch.arange(total, device=device)

    def send(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Send row r of every tensor [R,...] to its ranks; return the received rows, by rank."""
        return self._exchange(self.splits, *(tensor[self._row] for tensor in tensors))

    def gather(self, results: Tensor) -> Tensor:
        """Send results back; return each row's sum in ascending order of rank."""
        (returned,) = self._exchange(self.splits[::-1], results)
        return sum_rows(returned, self._parts)

    def _exchange(self, splits: Splits, first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if self._learns and not first.requires_grad:
            # Recorded for the backward pass, in which other ranks need this one.
            first = first.detach().requires_grad_()
        return tuple(_Exchange.apply(self._group, splits, first, *others))


def _check(received: Table, sent: Table, me: int, experts: int) -> bool:
    """Raise the fault in headers, if any; return whether a rank needs gradients.

    The tables have rows, targets and the header, by the rank of the sender or receiver.
    """
    bits = [row[4] for row in received]
    for bit, message in FAULTS.items():
        faulty = [rank for rank, flags in enumerate(bits) if flags & bit]
        if faulty:
            raise ValueError(f"rank {faulty[0]}: {message.format(experts=experts)}")
    for what, column in (("other placements", 2), ("rows of another size or type", 3)):
        others = [rank for rank, row in enumerate(received) if row[column] != sent[rank][column]]
        if others:
            raise RuntimeError(f"ranks {others} have {what} than rank {me}: nothing was sent")
    learning = [rank for rank, flags in enumerate(bits) if flags & LEARN]
    others = [rank for rank, flags in enumerate(bits) if flags & NO_GRADIENTS]
    if learning and others:
        what = f"ranks {learning} need gradients and ranks {others} disable them"
        raise RuntimeError(f"{what}: nothing was sent")
    return bool(learning)


def sum_rows(values: Tensor, which: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum rows of values [N,H], from left to right, into as many rows as ``which`` has.

    Sums run in float32 at least and one column of ``which`` [R,J] after the other, so that the
    order is fixed: no atomic additions. N stands for a row of zeros; ``weights`` [R,J] are factors.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
    parts = (padded[which[:, j]].to(wide) for j in range(which.shape[1]))
    if weights is not None:
        parts = (part * weights[:, j, None].to(wide) for j, part in enumerate(parts))
    return functools.reduce(operator.add, parts).to(values.dtype)


class _Exchange(torch.autograd.Function):
    """Sends rows of all tensors as one message per rank, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, group: Group, splits: Splits, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.splits = group, splits
        ctx.smooth = [tensor.is_floating_point() for tensor in tensors]
        out = _swap(group, splits, tensors)
        ctx.mark_non_differentiable(*(t for t in out if not t.is_floating_point()))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        smooth = list(itertools.compress(gradients, ctx.smooth))
        back = iter(_swap(ctx.group, ctx.splits[::-1], smooth))
        return (None, None, *(next(back) if is_smooth else None for is_smooth in ctx.smooth))


def _swap(group: Group, splits: Splits, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Exchange rows of all tensors, packed side by side as bytes; return the received rows."""
    send, receive = splits
    packed = tensors[0].contiguous()
    if len(tensors) > 1:
        packed = torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], dim=1)
    arrived = packed.new_empty(sum(receive), packed.shape[1])
    dist.all_to_all_single(arrived, packed, receive, send, group=group)
    if len(tensors) == 1:
        return [arrived]
    parts = torch.split(arrived, [t.shape[1] * t.element_size() for t in tensors], dim=1)
    # Copies, even of a single row: only they are aligned for their type.
    contiguous = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return [part.view(tensor.dtype) for part, tensor in zip(contiguous, tensors, strict=True)]


class TrafficCounters:
    """Counts rows and bytes that one rank sent to its peers and received, in one layer.

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

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.steps = 0
        zeros = np.zeros((6, self.devices), dtype=np.int64)
        self.rows_sent, self.rows_received = zeros[:2]
        self.dispatch_bytes_sent, self.dispatch_bytes_received = zeros[2:4]
        self.combine_bytes_sent, self.combine_bytes_received = zeros[4:]

    def count(self, rank: int, splits: Splits, *, dispatch_row: int, combine_row: int) -> None:
        """Count one exchange of rows, of so many bytes each, and their way back."""
        sent, received = map(np.array, splits)
        sent[rank] = received[rank] = 0
        self.rows_sent += sent
        self.rows_received += received
        self.dispatch_bytes_sent += sent * dispatch_row
        self.dispatch_bytes_received += received * dispatch_row
        self.combine_bytes_sent += received * combine_row
        self.combine_bytes_received += sent * combine_row
