"""Experts: the feed-forward networks of the slots of one rank, computed in groups of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner.placement import EMPTY

# Public in newer versions of torch, under a private name before, absent in the oldest ones.
_grouped_mm = getattr(nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class Experts(Protocol):
    """What ``ExpertParallelMoE`` asks of the experts that it runs."""

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

    def __init__(
        self, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor] = swiglu
    ) -> None:
        super().__init__()
        if up.ndim != 3 or down.ndim != 3 or up.shape[::2] != down.shape[:2]:
            raise ValueError(
                "up must be [slots, up, hidden] and down [slots, hidden, inner], "
                f"got {list(up.shape)} and {list(down.shape)}"
            )
        if up.dtype != down.dtype or up.device != down.device:
            raise ValueError(
                "up and down must be of one type on one device, "
                f"got {up.dtype} on {up.device} and {down.dtype} on {down.device}"
            )
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
        parts = [
            nn.functional.linear(
                self.activation(nn.functional.linear(group, self.up[slot])), self.down[slot]
            )
            for slot, group in enumerate(torch.split(rows, counts.tolist()))
            if len(group)
        ]
        # Without rows the result hangs on the input all the same: the backward pass of every rank
        # takes part in the exchange.
        return torch.cat(parts) if parts else rows

    def _can_group(self, rows: Tensor) -> bool:
        widths = (*self.up.shape[1:], self.down.shape[2])
        return (
            _grouped_mm is not None
            and rows.dtype == torch.bfloat16
            and len(rows) > 0
            and all(width % 8 == 0 for width in widths)
        )

    def _grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        assert _grouped_mm is not None
        ends = counts.cumsum(0).to(torch.int32)
        inner = self.activation(_grouped_mm(rows, self.up.transpose(1, 2), offs=ends))
        out: Tensor = _grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        return out


class ByExpert:
    """Weights by names such as ``3.up``, which are attributes as well: first ``3``, then ``up``.

    So ``torch.distributed.checkpoint`` finds what the keys of a state name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    def __getattr__(self, name: str) -> Any:
        """Return the weight of that name, or those whose names begin with it."""
        weights = self.__dict__.get("weights", {})
        if name in weights:
            return weights[name]
        below = {
            key[len(name) + 1 :]: w for key, w in weights.items() if key.startswith(f"{name}.")
        }
        if not below:
            raise AttributeError(f"no expert or weight {name!r}")
        return ByExpert(below)


def by_expert(
    weights: Mapping[str, Tensor],
    slots: NDArray[np.int32],
    rank: int,
    group: dist.ProcessGroup | None,
) -> ByExpert:
    """Return the weights of all experts one by one, as views of a rank's weights [S,...].

    Parameters
    ----------
    weights
        Weights by name [S,...].
    slots
        Experts of the slots of all ranks [D,S], -1 for none.
    rank
        This one.
    group
        The ranks.
    """
    # Here, since it takes a while, and few ask for states.
    from moetuner.torch.parallel.state import ExpertTensor, mesh_of

    found: dict[str, Tensor] = {}
    own = slots[rank].tolist()
    for name, weight in weights.items():
        for expert in np.unique(slots[slots != EMPTY]).tolist():
            local = weight[own.index(expert)] if expert in own else None
            if len(slots) > 1 and weight.ndim > 1:
                ranks = np.flatnonzero((slots == expert).any(axis=1)).tolist()
                mesh = mesh_of(group, "cpu" if weight.is_meta else weight.device.type)
                local = ExpertTensor.of(local, weight[0], ranks, mesh)
            if local is not None:
                found[f"{expert}.{name}"] = local
    return ByExpert(found)


def own_tensors(experts: object, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a module's parameters and buffers, by name, that its weights are or view."""
    if not isinstance(experts, nn.Module):
        return {}
    parts = {id(part) for weight in weights.values() for part in (weight, weight._base)}
    held = (
        *experts.named_parameters(remove_duplicate=False),
        *experts.named_buffers(remove_duplicate=False),
    )
    return {name: tensor for name, tensor in held if id(tensor) in parts}


def renewed(weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new memory for weights [S,..], of the type and where the given ones are."""
    found = {}
    for name, weight in weights.items():
        like = next((w for key, w in given.items() if key.partition(".")[2] == name), weight)
        found[name] = like.new_zeros(weight.shape)
    return found


def fill(
    weights: Mapping[str, Tensor],
    slots: Sequence[int],
    given: Mapping[str, Any],
    num_experts: int,
) -> tuple[list[str], list[str], list[str]]:
    """Copy the weights of experts into their slots [S].

    Parameters
    ----------
    weights
        Weights by name [S,..].
    slots
        Experts of the slots, -1 for none.
    given
        Weights by expert and name; those of experts that are elsewhere are left out.
    num_experts
        Number of experts E.

    Returns
    -------
    tuple of lists
        Names that are missing, names that nobody knows, and what else is wrong.
    """
    missing: dict[str, None] = {}
    wrong: list[str] = []
    for name, weight in weights.items():
        for slot, expert in enumerate(slots):
            key = f"{expert}.{name}"
            if expert == EMPTY:
                continue
            value: Any = given.get(key)
            if hasattr(value, "to_local"):
                value = value.to_local()
            if value is None:
                missing[key] = None
            elif value.shape != weight.shape[1:]:
                found, needed = list(value.shape), list(weight.shape[1:])
                wrong.append(f"{key} must be {needed}, got {found}")
            else:
                with torch.no_grad():
                    weight[slot].copy_(value)
    strange = []
    for key in given:
        number, _, name = key.partition(".")
        if not (number.isdecimal() and int(number) < num_experts and name in weights):
            strange.append(key)
    return list(missing), strange, wrong
