"""Experts: the feed-forward networks of the slots of one rank, computed in groups of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

# Public in newer versions of torch, under a private name before, absent in the oldest ones.
_grouped_mm = getattr(nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


Activation = Callable[[Tensor], Tensor]


class Experts(Protocol):
    """The methods of experts that ``ExpertParallelMoE`` calls."""

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Compute rows [N,H], the first ``counts[0]`` of them by slot 0 and so on [S]."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, slots first [S,...]; writing to them changes the experts."""
        ...


def swiglu(rows: Tensor) -> Tensor:
    """Gate by SiLU: the first half of each row [N,2I] gates the second [N,I]."""
    gate, up = rows.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class GroupedExperts(nn.Module):
    """Experts of two matrices with an activation between them.

    Parameters
    ----------
    up
        Weights into the experts [S,U,H], slot by slot.
    down
        Weights out of the experts [S,H,I].
    activation
        From rows [N,U] to rows [N,I]; ``swiglu`` takes U = 2 I.

    Notes
    -----
    On CUDA in bfloat16 all slots are one grouped matrix product where torch has it (for rows of
    a multiple of 16 bytes); elsewhere each slot that has rows is one product.
    """

    def __init__(self, up: Tensor, down: Tensor, activation: Activation = swiglu) -> None:
        super().__init__()
        if up.ndim != 3 or down.ndim != 3 or up.shape[::2] != down.shape[:2]:
            rule = "up must be [slots, up, hidden] and down [slots, hidden, inner]"
            raise ValueError(f"{rule}, got {list(up.shape)} and {list(down.shape)}")
        if up.dtype != down.dtype or up.device != down.device:
            types = [f"{weight.dtype} on {weight.device}" for weight in (up, down)]
            raise ValueError(f"up and down must be of one type on one device, got {types}")
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(down)
        self.activation = activation

    def weights(self) -> dict[str, Tensor]:
        """Return ``up`` and ``down``."""
        return {"up": self.up, "down": self.down}

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Compute rows [N,H] in groups of ``counts`` [S] rows, one per slot."""
        if rows.is_cuda and self._can_group(rows):
            return self._grouped(rows, counts)
        linear, groups = nn.functional.linear, torch.split(rows, counts.tolist())
        parts = [
            linear(self.activation(linear(group, up)), down)
            for group, up, down in zip(groups, self.up, self.down, strict=True)
            if len(group)
        ]
        return torch.cat(parts) if parts else rows.new_empty(0, self.down.shape[1])

    def _can_group(self, rows: Tensor) -> bool:
        is_half = rows.dtype == torch.bfloat16 and len(rows) > 0
        widths = (*self.up.shape[1:], self.down.shape[2])
        return _grouped_mm is not None and is_half and all(width % 8 == 0 for width in widths)

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        assert _grouped_mm is not None
        ends = counts.cumsum(0).to(torch.int32)
        inner = self.activation(_grouped_mm(rows, self.up.transpose(1, 2), offs=ends))
        out: Tensor = _grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        return out
