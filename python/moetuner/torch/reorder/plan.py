"""What becomes of every tensor of a model when its experts change places: new name, rows or ids.

One plan for models in memory and checkpoints. Names and shapes are all there is to tell by: those
of transformers and of the original checkpoints (one tensor per expert, or all experts stacked), and
Megatron's (``local_experts.3``, ``linear_fc1.weight3``). What is known to depend on the order moves
with the experts, what is known not to stays, and whatever else could is refused: a model that
chooses other experts without a word is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY, Placement

Order = NDArray[np.int64]
Tensors = Mapping[str, Tensor]
Routers = Mapping[str, str | None]

ROUTER_NAMES = {"gate", "router"}

# Tensors of experts: of one of them, by its number, or of all.
EXPERT = re.compile(
    r"(?P<head>(?:(?P<block>.+)\.)?experts\.(?:(?:local_experts\.)?(?=\d+\.)"
    r"|linear_fc[12]\.(?:weight|bias)(?=\d+$)))(?P<expert>\d+)(?P<tail>.*)"
)
STACKED = re.compile(r"(?:(?P<block>.+)\.)?experts\.(?P<rest>.+)")
LAYER = re.compile(r"layers?\.(\d+)\.")

# What a router holds per expert, experts first.
BIASES = ("bias", "e_score_correction_bias", "expert_bias", "router_bias")
ROWS = ("weight", "per_expert_scale", *BIASES)

# Tables of experts' ids: the ids change, and nothing moves.
TABLES = ("tid2eid",)

# Names that speak of choosing experts, wherever in a layer they stand.
CHOOSES = re.compile(r"router|expert|e_score|eid|correction|(^|[._])moe([._]|$)")

# Names of what computes the same for every order of the experts, and of what does if it does not
# speak of choosing.
APART = re.compile(r"(^|\.)shared?_|(^|\.)shared?\.|attn|attention|mamba|conv|rotary|rope")
DENSE = re.compile(r"norm|embed|(^|\.)(mlp|ffn|feed_forward|dense)\.")

# Whole numbers that come with quantised weights and with positions.
PACKED = re.compile(r"qweight|qzeros|g_idx|perm|weight_(shape|packed|zero_point)|position|quant")

# Up to the last number in the name of a block: its layer.
UP_TO_LAYER = re.compile(r"(?:.*\.)?\d+(?=\.|$)")


def bits_of(tensor: Tensor, experts: int) -> Tensor:
    """Return the bytes of a tensor for each expert [E,..]: not every type can be indexed."""
    return tensor.detach().reshape(experts, -1).contiguous().view(torch.uint8)


@dataclass(frozen=True)
class TensorChange:
    """What becomes of a tensor: its new name, and what changes in it.

    ``order`` [E] is given if its rows change places, ``ids`` [E] if it holds old experts' ids: the
    new ones.
    """

    name: str
    block: str | None = None
    order: Order | None = None
    ids: Order | None = None
    is_router: bool = False


Changes = dict[str, TensorChange]


def order_of(placement: Placement) -> Order:
    """Return the old expert at every new position [L,E]: by device, ascending within one."""
    layers, devices, _ = placement.slots.shape
    experts, on_device = placement.num_experts, (placement.slots != EMPTY).sum(axis=2)
    for rule, counts, wrong, which in (
        ("one copy of each expert", placement.replicas, placement.replicas > 1, "of expert"),
        (
            f"{experts}/{devices} experts on every device",
            on_device,
            on_device * devices != experts,
            "on device",
        ),
    ):
        for layer, number in np.argwhere(wrong)[:1]:
            given = f"{counts[layer, number]} {which} {number} in layer {layer}"
            rule = f"placement must have {rule} to become an order of experts"
            raise ValueError(f"{rule}, got {given}")
    return np.argsort(placement.device_of, axis=1, kind="stable").reshape(layers, -1)


def groups_chosen(groups: int | None, limit: int | None, method: object) -> int:
    """Count the groups among which a router chooses first; 1 if all experts compete at once."""
    # Configurations of models without groups say 0 as well.
    if not groups or method == "greedy" or (limit is not None and limit >= groups):
        return 1
    return groups


def check_groups(order: Order, groups: int, layer: str) -> None:
    """Check that the order [E] keeps the router's groups of experts whole.

    It chooses groups by their positions: of mixed ones others would win, and other experts.
    """
    size, rest = divmod(len(order), groups)
    if rest:
        raise ValueError(f"{layer}: {groups} groups must divide {len(order)} experts")
    for run, members in enumerate((order // size).reshape(groups, size) if groups > 1 else ()):
        mixed = sorted(set(members.tolist()))
        if len(mixed) > 1:
            raise ValueError(
                f"{layer}: its router chooses among {groups} groups of {size} experts first, so "
                f"groups must stay whole, but positions {run * size} to {(run + 1) * size - 1} "
                f"would hold experts of groups {mixed}; moetuner.router_groups places them whole"
            )


def changes_of(tensors: Tensors, order: Order, routers: Routers) -> Changes:
    """Return what becomes of every tensor.

    ``tensors`` are those of a model by name; of a checkpoint on the meta device, of their kind of
    number. ``order`` [L,E] has the old expert at every new position. ``routers`` are the MoE blocks
    to put in order, by layer, with the names of their routers; None if the router is a child with a
    usual name. Other blocks keep their order.
    """
    parts, order_in = _parts(tensors), dict(zip(routers, order, strict=True))
    for block in routers:
        own = {of.expert for of in parts.values() if of.block == block and of.expert is not None}
        if own and own != set(range(order.shape[1])):
            rule = f"must have experts 0 to {order.shape[1] - 1} as the placement has"
            raise ValueError(f"{block}: {rule}, got {len(own)} from {min(own)} to {max(own)}")
    blocks = sorted({*routers, *(part.block for part in parts.values())}, key=len, reverse=True)
    changes: Changes = {}
    weights: dict[str, str] = {}
    for name, tensor in tensors.items():
        changes[name] = TensorChange(name)
        if name in parts:
            if (positions := order_in.get(parts[name].block)) is not None:
                changes[name] = _of_experts(name, tensor.shape, parts[name], positions)
            continue
        block, kind = _dependence(name, tensor, blocks, routers, order.shape[1])
        # Of two matrices in a row one has rows per expert, and nobody can say which.
        is_weight = kind == "rows" and name.endswith("weight")
        if is_weight and weights.setdefault(block, name) != name:
            raise ValueError(
                f"{name}: {list(tensor.shape)} must be the only weight of its router with "
                f"{order.shape[1]} rows, {weights[block]} is another"
            )
        if kind == "ids":
            changes[name] = TensorChange(name, block, ids=np.argsort(order_in[block]))
        elif kind == "rows":
            changes[name] = TensorChange(name, block, order_in[block], is_router=True)
    routed = {change.block for change in changes.values() if change.is_router}
    for block in routers:
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
        rule = f"as many layers as the checkpoint has MoE layers, {len(ordered)}"
        raise ValueError(f"placement must have {rule}, got {layers}")
    return ordered


def check_ties(changes: Changes, rows: Callable[[str, int], Tensor]) -> None:
    """Check that no two experts that change places have the same router state.

    Such experts always tie, and their numbers alone decide between them. ``rows`` gives the bytes
    of a tensor by its name, for so many experts [E,..].
    """
    state: dict[str, list[NDArray[np.uint8]]] = {}
    for name, change in changes.items():
        order = change.order
        if change.is_router and order is not None and (order != np.arange(len(order))).any():
            state.setdefault(change.block or "", []).append(rows(name, len(order)).cpu().numpy())
    for block, parts in state.items():
        first: dict[bytes, int] = {}
        for expert, row in enumerate(np.concatenate(parts, axis=1)):
            if first.setdefault(row.tobytes(), expert) != expert:
                raise ValueError(
                    f"{block}: experts {first[row.tobytes()]} and {expert} have the same router "
                    "rows, so their order decides between them and must not change"
                )


def moved(name: str, tensor: Tensor, change: TensorChange) -> Tensor:
    """Return a tensor with its rows in order, or with the new numbers of experts."""
    if (new := change.ids) is not None:
        old = tensor.long()
        first, last = (int(old.min()), int(old.max())) if old.numel() else (0, 0)
        if not 0 <= first <= last < len(new):
            rule = f"must hold experts 0 to {len(new) - 1}"
            raise ValueError(f"{name}: {rule}, got {first} to {last}")
        return torch.from_numpy(new).to(old.device)[old].to(tensor.dtype)
    if change.order is None:
        return tensor
    rows = bits_of(tensor, len(change.order))
    rows = rows[torch.from_numpy(change.order).to(rows.device)]
    return rows.view(tensor.dtype).reshape(tensor.shape)


class _Part(NamedTuple):
    """A tensor of experts: its block, and of one expert its number and the name around that."""

    block: str
    head: str = ""
    expert: int | None = None
    tail: str = ""


def _parts(names: Iterable[str]) -> dict[str, _Part]:
    """Return the tensors of experts."""
    parts = {}
    for name in names:
        if (one := EXPERT.fullmatch(name)) is not None:
            parts[name] = _Part(one["block"] or "", one["head"], int(one["expert"]), one["tail"])
        elif (stacked := STACKED.fullmatch(name)) is not None:
            parts[name] = _Part(stacked["block"] or "")
    return parts


def _of_experts(name: str, shape: tuple[int, ...], part: _Part, order: Order) -> TensorChange:
    """Return the change of a tensor of experts."""
    if part.expert is not None:
        new = np.flatnonzero(order == part.expert)[0]
        return TensorChange(f"{part.head}{new}{part.tail}", part.block)
    if shape in ((), (1,)):
        return TensorChange(name, part.block)
    if shape[0] != len(order):
        rule = f"must be [{len(order)}, ..], experts first as in the placement"
        raise ValueError(f"{name}: {rule}, got {list(shape)}")
    return TensorChange(name, part.block, order)


def _dependence(
    name: str, tensor: Tensor, blocks: Iterable[str], routers: Routers, experts: int
) -> tuple[str, str]:
    """Return the block of a tensor outside its experts, and "rows", "ids" or "" as ``_kind``."""
    block = next((block for block in blocks if _is_under(name, block)), None)
    if math.prod(tensor.shape) <= 1 or (block is not None and block not in routers):
        return "", ""
    if block is not None:
        path, router = name[len(block) + 1 :] if block else name, routers[block]
        is_usual = not ROUTER_NAMES.isdisjoint(path.split("."))
        routes = is_usual if router is None else _is_under(name, router)
        kind = _kind(path, tensor, experts, "router" if routes else "block")
    else:
        # Beside a block, in its layer: state of its router under another name.
        matches = {block: UP_TO_LAYER.match(block) for block in routers}
        starts = {block: f"{layer[0]}." for block, layer in matches.items() if layer}
        beside = [block for block, start in starts.items() if name.startswith(start)]
        block, path = (beside[0], name.removeprefix(starts[beside[0]])) if beside else ("", name)
        kind = _kind(path, tensor, experts, "layer" if beside else "model")
        kind = None if kind and len(beside) > 1 else kind
    if kind is None:
        what = "may depend on the order of experts in a way that is not known"
        raise ValueError(f"{name}: {list(tensor.shape)} {what}")
    return block, kind


def _kind(path: str, tensor: Tensor, experts: int, where: str) -> str | None:
    """Return "rows" or "ids" of what depends on the order, "" of what does not, None if unknown.

    ``path`` is the name from ``where`` on: a "router", a "block", its "layer" or the "model".
    """
    shape, last, has_experts = tensor.shape, path.rpartition(".")[2], experts in tensor.shape
    fractions = tensor.is_floating_point() or tensor.is_complex()
    is_whole = not fractions and tensor.element_size() > 1
    speaks = CHOOSES.search(path) is not None
    if APART.search(path):
        return ""
    if where == "model":
        return None if speaks and (has_experts or is_whole) else ""
    if where == "layer" and not (speaks or (is_whole and not PACKED.search(path))):
        return ""
    chooses = speaks or where != "block"
    if not chooses and DENSE.search(path):
        return ""
    if last in TABLES and is_whole:
        return "ids"
    # Under an unknown name there could be any matrix of as many rows.
    is_state = last in ROWS and "norm" not in path and (chooses or "." not in path)
    if is_state and (shape[0] == experts or shape == (1, experts)):
        return "rows"
    if where == "block" and last in ("weight", "bias") and not has_experts:
        return ""  # a matrix before or behind the experts
    if chooses:
        return "" if ("norm" in path or last == "scale") and not has_experts else None
    return None if has_experts or is_whole else ""


def _is_under(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
