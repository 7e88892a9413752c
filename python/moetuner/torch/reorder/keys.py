"""What becomes of every tensor of a model when its experts change places: new name, rows or ids.

One plan for models in memory and checkpoints. It covers the names of transformers and of the
original checkpoints (one tensor per expert, or all experts stacked), and Megatron's
(``local_experts.3``, ``linear_fc1.weight3``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.torch.reorder.order import Order
from moetuner.torch.reorder.state import TensorFacts, dependents

EXPERT = re.compile(
    r"(?P<head>(?:(?P<block>.+)\.)?experts\.(?:local_experts\.)?)(?P<expert>\d+)(?P<tail>\..+)"
    r"|(?P<head2>(?P<block2>.+)\.experts\.linear_fc[12]\.(?:weight|bias))(?P<expert2>\d+)"
)
STACKED = re.compile(r"(?:(?P<block>.+)\.)?experts\.(?P<rest>.+)")
LAYER = re.compile(r"layers?\.(\d+)\.")


@dataclass(frozen=True)
class TensorChange:
    """What becomes of a tensor: its new name, and what changes in it.

    ``order`` [E] is given if its rows change places, ``ids`` [E] if it holds old experts' ids: the
    new ones.
    """

    name: str
    block: str | None = None
    order: NDArray[np.int64] | None = None
    ids: NDArray[np.int64] | None = None
    is_router: bool = False


@dataclass(frozen=True)
class _Part:
    """A tensor of experts by its name: of one expert, or of all of them."""

    block: str
    expert: int | None = None
    head: str = ""
    tail: str = ""


def plan(
    tensors: Mapping[str, TensorFacts], order: Order, routers: Mapping[str, str | None]
) -> dict[str, TensorChange]:
    """Return what becomes of every tensor.

    Parameters
    ----------
    tensors
        All tensors of a model by name.
    order
        Old expert at every new position [L,E].
    routers
        The MoE blocks to put in order, by layer, with the names of their routers; None if the
        router is a child with a usual name. Other blocks keep their order.

    Raises
    ------
    ValueError
        If the result could not be exact, with the reason.
    """
    parts = _parts(tensors)
    row = {block: number for number, block in enumerate(routers)}
    experts = order.shape[1]
    _check_numbers(parts.values(), row, experts)
    others = {part.block for part in parts.values()}.difference(row)
    rest = {name: facts for name, facts in tensors.items() if name not in parts}
    routing = dependents(rest, routers, experts, others)
    new_of = np.argsort(order, axis=1)
    changes: dict[str, TensorChange] = {}
    for name, facts in tensors.items():
        if name in parts:
            number = row.get(parts[name].block)
            positions = None if number is None else order[number]
            changes[name] = _of_experts(name, facts.shape, parts[name], positions)
        elif name in routing:
            block, is_table = routing[name]
            number = row[block]
            changes[name] = (
                TensorChange(name, block, ids=new_of[number])
                if is_table
                else TensorChange(name, block, order[number], is_router=True)
            )
        else:
            changes[name] = TensorChange(name)
    routed = {change.block for change in changes.values() if change.is_router}
    for block in row:
        if block not in routed:
            raise ValueError(f"{block}: must have the weights of its router beside its experts")
    return changes


def blocks_of(names: Iterable[str], layers: int, num_hidden_layers: int | None) -> list[str]:
    """Return the MoE blocks of a checkpoint that a placement is about, by layer.

    Of the model's layers dense ones count too; what a checkpoint holds beyond them (multi-token
    prediction) keeps its order if the placement does not speak of it.
    """

    def number(block: str) -> int:
        layer = LAYER.search(block + ".")
        numbers = [part for part in block.split(".") if part.isdigit()]
        return int(layer[1]) if layer else int(numbers[-1]) if numbers else 0

    blocks = {part.block for part in _parts(names).values()}
    ordered = sorted(blocks, key=lambda block: (number(block), block))
    if len(ordered) > layers:
        limit = num_hidden_layers if num_hidden_layers is not None else 1 << 62
        ordered = [b for b in ordered if number(b) < limit and "mtp." not in b]
    if len(ordered) != layers:
        raise ValueError(
            "placement must have as many layers as the checkpoint has MoE layers, "
            f"{len(ordered)}, got {layers}"
        )
    return ordered


def check_ties(
    changes: Mapping[str, TensorChange], rows: Callable[[str, int], NDArray[np.uint8]]
) -> None:
    """Check that no two experts that change places have the same router state.

    Such experts always tie, and their numbers alone decide between them. ``rows`` gives the bytes
    of a tensor by its name, for so many experts [E,..].
    """
    state: dict[str, list[NDArray[np.uint8]]] = {}
    for name, change in changes.items():
        order = change.order
        if change.is_router and order is not None and (order != np.arange(len(order))).any():
            state.setdefault(change.block or "", []).append(rows(name, len(order)))
    for block, parts in state.items():
        first: dict[bytes, int] = {}
        for expert, row in enumerate(np.concatenate(parts, axis=1)):
            if first.setdefault(row.tobytes(), expert) != expert:
                raise ValueError(
                    f"{block}: experts {first[row.tobytes()]} and {expert} have the same router "
                    "rows, so their order decides between them and must not change"
                )


def _parts(names: Iterable[str]) -> dict[str, _Part]:
    """Return the tensors of experts among all names."""
    parts = {}
    for name in names:
        if (one := EXPERT.fullmatch(name)) is not None:
            ending = "" if one["expert"] is not None else "2"
            head, block, expert = (one[f"{of}{ending}"] for of in ("head", "block", "expert"))
            parts[name] = _Part(block or "", int(expert), head, one["tail"] or "")
        elif (stacked := STACKED.fullmatch(name)) is not None:
            parts[name] = _Part(stacked["block"] or "")
    return parts


def _check_numbers(parts: Iterable[_Part], blocks: Iterable[str], experts: int) -> None:
    """Check that blocks with a tensor for each expert have all of them."""
    numbers: dict[str, set[int]] = {}
    for part in parts:
        if part.expert is not None:
            numbers.setdefault(part.block, set()).add(part.expert)
    for block in blocks:
        own = numbers.get(block)
        if own and own != set(range(experts)):
            raise ValueError(
                f"{block}: must have experts 0 to {experts - 1} as the placement has, got "
                f"{len(own)} from {min(own)} to {max(own)}"
            )


def _of_experts(
    name: str, shape: tuple[int, ...], part: _Part, order: NDArray[np.int64] | None
) -> TensorChange:
    """Return the change of a tensor of experts; without an order it stays."""
    if order is None or (part.expert is None and shape in ((), (1,))):
        return TensorChange(name, part.block)
    if part.expert is not None:
        new = int(np.flatnonzero(order == part.expert)[0])
        return TensorChange(f"{part.head}{new}{part.tail}", part.block)
    if shape[0] != len(order):
        raise ValueError(
            f"{name}: must be [{len(order)}, ..], experts first as in the placement, got "
            f"{list(shape)}"
        )
    return TensorChange(name, part.block, order)
