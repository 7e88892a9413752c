"""Names of weights in checkpoints: which expert or router they belong to, and their new names.

Covers the layouts of transformers and of the original checkpoints (one tensor per expert, or all
experts stacked), and Megatron's (``local_experts.3``, ``linear_fc1.weight3``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.torch.reorder.order import Order
from moetuner.torch.reorder.state import Held, dependents

EXPERT = re.compile(
    r"(?P<head>(?P<block>.+)\.experts\.(?:local_experts\.)?)(?P<expert>\d+)(?P<tail>\..+)"
    r"|(?P<head2>(?P<block2>.+)\.experts\.linear_fc[12]\.(?:weight|bias))(?P<expert2>\d+)"
)
STACKED = re.compile(r"(?P<block>.+)\.experts\.(?P<rest>.+)")
LAYER = re.compile(r"layers?\.(\d+)\.")

Shape = tuple[int, ...]


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


def plan(
    held: Mapping[str, Held], order: Order, num_hidden_layers: int | None
) -> dict[str, TensorChange]:
    """Return what becomes of every tensor of a checkpoint.

    ``order`` is the old expert at every new position [L,E]. Of the model's layers dense ones count
    too; what a checkpoint holds beyond them (multi-token prediction) keeps its order if the
    placement does not speak of it.
    """
    parsed = {name: parts for name in held if (parts := _expert(name)) is not None}
    stacked = {
        name: match["block"]
        for name in held
        if name not in parsed and (match := STACKED.fullmatch(name)) is not None
    }
    named = {block for _, block, _, _ in parsed.values()} | set(stacked.values())
    blocks = _blocks(named, len(order), num_hidden_layers)
    row = {block: number for number, block in enumerate(blocks)}
    new_of = np.argsort(order, axis=1)
    experts = order.shape[1]
    numbers: dict[str, set[int]] = {}
    for _, block, expert, _ in parsed.values():
        numbers.setdefault(block, set()).add(expert)
    for block in row:
        found = numbers.get(block, set())
        if found and found != set(range(experts)):
            raise ValueError(
                f"{block}: must have experts 0 to {experts - 1} as the placement has, got "
                f"{len(found)} from {min(found)} to {max(found)}"
            )
    experts_own = {*parsed, *stacked}
    rest = {name: tensor for name, tensor in held.items() if name not in experts_own}
    routing = dependents(rest, dict.fromkeys(blocks), experts, named.difference(blocks))
    moves: dict[str, TensorChange] = {}
    for name, tensor in held.items():
        if name in parsed:
            head, block, expert, tail = parsed[name]
            new = int(new_of[row[block], expert]) if block in row and expert < experts else expert
            moves[name] = TensorChange(f"{head}{new}{tail}", block)
        elif name in stacked:
            block = stacked[name]
            positions = order[row[block]] if block in row else None
            moves[name] = _stacked(name, tensor.shape, block, positions)
        elif name in routing:
            where = routing[name]
            number = row[where.block]
            moves[name] = (
                TensorChange(name, where.block, ids=new_of[number])
                if where.is_table
                else TensorChange(name, where.block, order[number], is_router=True)
            )
        else:
            moves[name] = TensorChange(name)
    routed = {move.block for move in moves.values() if move.is_router}
    for block in row:
        if block not in routed:
            raise ValueError(f"{block}: must have the weights of its router beside its experts")
    return moves


def _expert(name: str) -> tuple[str, str, int, str] | None:
    """Split a name into what stands before the expert, its block, the expert, and the rest."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return None
    if found["expert"] is not None:
        return found["head"], found["block"], int(found["expert"]), found["tail"]
    return found["head2"], found["block2"], int(found["expert2"]), ""


def _blocks(found: set[str], layers: int, num_hidden_layers: int | None) -> list[str]:
    """Return MoE blocks that the placement is about, in the order of layers."""

    def number(block: str) -> int:
        layer = LAYER.search(block + ".")
        numbers = [part for part in block.split(".") if part.isdigit()]
        return int(layer[1]) if layer else int(numbers[-1]) if numbers else 0

    blocks = sorted(found, key=lambda block: (number(block), block))
    if len(blocks) > layers:
        limit = num_hidden_layers if num_hidden_layers is not None else 1 << 62
        blocks = [b for b in blocks if number(b) < limit and "mtp." not in b]
    if len(blocks) != layers:
        raise ValueError(
            f"placement must have as many layers as the checkpoint has MoE layers, {len(blocks)}, "
            f"got {layers}"
        )
    return blocks


def _stacked(name: str, shape: Shape, block: str, order: NDArray[np.int64] | None) -> TensorChange:
    if order is None or shape in ((), (1,)):
        return TensorChange(name, block)
    if shape[0] != len(order):
        raise ValueError(
            f"{name}: must be [{len(order)}, ..], experts first as in the placement, got "
            f"{list(shape)}"
        )
    return TensorChange(name, block, order)
