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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY, Placement

Order = NDArray[np.int64]

ROUTER_NAMES = ("gate", "router")

# Tensors of experts: of one of them, by its number, or of all.
EXPERT = re.compile(
    r"(?P<head>(?:(?P<block>.+)\.)?experts\.(?:(?:local_experts\.)?(?=\d+\.)"
    r"|linear_fc[12]\.(?:weight|bias)(?=\d+$)))(?P<expert>\d+)(?P<tail>.*)"
)
STACKED = re.compile(r"(?:(?P<block>.+)\.)?experts\.(?P<rest>.+)")
LAYER = re.compile(r"layers?\.(\d+)\.")

# What a router holds per expert, experts first.
ROWS = (
    "weight",
    "bias",
    "e_score_correction_bias",
    "expert_bias",
    "router_bias",
    "per_expert_scale",
)

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


def bits_of(tensor: Tensor, experts: int) -> NDArray[np.uint8]:
    """Return the bytes of a tensor for each expert [E,..]: not every type can be indexed."""
    rows = tensor.detach().reshape(experts, -1).cpu().contiguous()
    bits: NDArray[np.uint8] = rows.view(torch.uint8).numpy()
    return bits


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


def order_of(placement: Placement) -> Order:
    """Return the old expert at every new position [L,E]: by device, ascending within one."""
    layers, devices, _ = placement.slots.shape
    copies = placement.replicas
    if (copies > 1).any():
        layer, expert = np.argwhere(copies > 1)[0]
        raise ValueError(
            "placement must have one copy of each expert to become an order of experts, got "
            f"{copies[layer, expert]} of expert {expert} in layer {layer}"
        )
    counts = (placement.slots != EMPTY).sum(axis=2)
    if (counts * devices != placement.num_experts).any():
        layer, device = np.argwhere(counts * devices != placement.num_experts)[0]
        raise ValueError(
            f"placement must have {placement.num_experts}/{devices} experts on every device to "
            f"become an order of experts, got {counts[layer, device]} on device {device} in layer "
            f"{layer}"
        )
    return np.argsort(placement.device_of, axis=1, kind="stable").reshape(layers, -1)


def groups_chosen(groups: int | None, limit: int | None, method: object) -> int:
    """Count the groups among which a router chooses first; 1 if all experts compete at once."""
    if groups is None or method == "greedy" or (limit is not None and limit >= groups):
        return 1
    return groups


def check_groups(order: NDArray[np.int64], groups: int, layer: str) -> None:
    """Check that the order [E] keeps the router's groups of experts whole.

    A group-limited router first chooses groups by their positions. If a run of positions held
    experts of two groups, other groups would win, and other experts be chosen.
    """
    experts = len(order)
    if groups == 1:
        return
    if experts % groups:
        raise ValueError(f"{layer}: {groups} groups must divide {experts} experts")
    size = experts // groups
    for run, members in enumerate((order // size).reshape(groups, size)):
        mixed = sorted(set(members.tolist()))
        if len(mixed) > 1:
            raise ValueError(
                f"{layer}: its router chooses among {groups} groups of {size} experts first, so "
                f"groups must stay whole, but positions {run * size} to {(run + 1) * size - 1} "
                f"would hold experts of groups {mixed}; moetuner.router_groups places them whole"
            )


def plan(
    tensors: Mapping[str, Tensor], order: Order, routers: Mapping[str, str | None]
) -> dict[str, TensorChange]:
    """Return what becomes of every tensor.

    Parameters
    ----------
    tensors
        All tensors of a model by name; of a checkpoint on the meta device, of their kind of number.
    order
        Old expert at every new position [L,E].
    routers
        The MoE blocks to put in order, by layer, with the names of their routers; None if the
        router is a child with a usual name. Other blocks keep their order.
    """
    parts = _parts(tensors)
    row = {block: number for number, block in enumerate(routers)}
    experts = order.shape[1]
    _check_numbers(parts.values(), row, experts)
    places = sorted({*routers, *(block for block, *_ in parts.values())}, key=len, reverse=True)
    changes: dict[str, TensorChange] = {}
    weights: dict[str, str] = {}
    for name, tensor in tensors.items():
        changes[name] = TensorChange(name)
        if name in parts:
            block = parts[name][0]
            if block in row:
                changes[name] = _of_experts(name, tensor.shape, parts[name], order[row[block]])
            continue
        block, kind = _dependence(name, tensor, places, routers, experts)
        # Of two matrices in a row one has rows per expert, and nobody can say which.
        is_weight = kind == "rows" and name.endswith("weight")
        if is_weight and weights.setdefault(block, name) != name:
            raise ValueError(
                f"{name}: {list(tensor.shape)} must be the only weight of its router with "
                f"{experts} rows, {weights[block]} is another"
            )
        if kind == "ids":
            changes[name] = TensorChange(name, block, ids=np.argsort(order[row[block]]))
        elif kind == "rows":
            changes[name] = TensorChange(name, block, order[row[block]], is_router=True)
    routed = {change.block for change in changes.values() if change.is_router}
    for block in row:
        if block not in routed:
            raise ValueError(f"{block}: must have the weights of its router beside its experts")
    return changes


def _dependence(
    name: str,
    tensor: Tensor,
    places: Iterable[str],
    routers: Mapping[str, str | None],
    experts: int,
) -> tuple[str, str]:
    """Return the block of a tensor outside its experts, and "rows", "ids" or "" as ``_kind``."""
    place = next((place for place in places if _is_under(name, place)), None)
    if math.prod(tensor.shape) <= 1 or (place is not None and place not in routers):
        return "", ""
    if place is not None:
        block, path = place, name[len(place) + 1 :] if place else name
        kind = _kind(path, tensor, experts, routes=_routes(name, path, routers[block]))
    else:
        # Beside a block, in its layer: state of its router under another name.
        matches = {block: UP_TO_LAYER.match(block) for block in routers}
        starts = {block: f"{layer[0]}." for block, layer in matches.items() if layer}
        beside = [block for block, start in starts.items() if name.startswith(start)]
        path = name.removeprefix(starts[beside[0]]) if beside else name
        if not _may_choose(path, tensor, experts, in_layer=bool(beside)):
            return "", ""
        block = beside[0] if beside else ""
        kind = _kind(path, tensor, experts, routes=True) if len(beside) == 1 else None
    if kind is None:
        raise ValueError(
            f"{name}: {list(tensor.shape)} may depend on the order of experts in a way that is not "
            "known"
        )
    return block, kind


def blocks_of(names: Iterable[str], layers: int, num_hidden_layers: int | None) -> list[str]:
    """Return the MoE blocks of a checkpoint that a placement is about, by layer.

    Of the model's layers dense ones count too; what a checkpoint holds beyond them (multi-token
    prediction) keeps its order if the placement does not speak of it.
    """

    def number(block: str) -> int:
        layer = LAYER.search(block + ".")
        numbers = [part for part in block.split(".") if part.isdigit()]
        return int(layer[1]) if layer else int(numbers[-1]) if numbers else 0

    blocks = {block for block, *_ in _parts(names).values()}
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


def renumbered(name: str, table: Tensor, new: NDArray[np.int64]) -> Tensor:
    """Return a table of experts' ids with the new number of every old expert [E]."""
    old = table.long()
    if table.numel() and not 0 <= int(old.min()) <= int(old.max()) < len(new):
        raise ValueError(
            f"{name}: must hold experts 0 to {len(new) - 1}, got {int(old.min())} to "
            f"{int(old.max())}"
        )
    return torch.from_numpy(new).to(old.device)[old].to(table.dtype)


def _parts(names: Iterable[str]) -> dict[str, tuple[str, str, int | None, str]]:
    """Return tensors of experts: block, what stands before and behind the number, and that."""
    parts: dict[str, tuple[str, str, int | None, str]] = {}
    for name in names:
        if (one := EXPERT.fullmatch(name)) is not None:
            parts[name] = (one["block"] or "", one["head"], int(one["expert"]), one["tail"])
        elif (stacked := STACKED.fullmatch(name)) is not None:
            parts[name] = (stacked["block"] or "", "", None, "")
    return parts


def _check_numbers(
    parts: Iterable[tuple[str, str, int | None, str]], blocks: Iterable[str], experts: int
) -> None:
    """Check that blocks with a tensor for each expert have all of them."""
    numbers: dict[str, set[int]] = {block: set() for block in blocks}
    for block, _, expert, _ in parts:
        if expert is not None and block in numbers:
            numbers[block].add(expert)
    for block, own in numbers.items():
        if own and own != set(range(experts)):
            raise ValueError(
                f"{block}: must have experts 0 to {experts - 1} as the placement has, got "
                f"{len(own)} from {min(own)} to {max(own)}"
            )


def _of_experts(
    name: str,
    shape: tuple[int, ...],
    part: tuple[str, str, int | None, str],
    order: NDArray[np.int64],
) -> TensorChange:
    """Return the change of a tensor of experts."""
    block, head, expert, tail = part
    if expert is not None:
        return TensorChange(f"{head}{np.flatnonzero(order == expert)[0]}{tail}", block)
    if shape in ((), (1,)):
        return TensorChange(name, block)
    if shape[0] != len(order):
        raise ValueError(
            f"{name}: must be [{len(order)}, ..], experts first as in the placement, got "
            f"{list(shape)}"
        )
    return TensorChange(name, block, order)


def _kind(path: str, tensor: Tensor, experts: int, *, routes: bool) -> str | None:
    """Return "rows" or "ids" of what depends on the order, "" of what does not, None if unknown."""
    shape, last = tensor.shape, path.rpartition(".")[2]
    chooses = routes or CHOOSES.search(path) is not None
    if APART.search(path) or (not chooses and DENSE.search(path)):
        return ""
    if last in TABLES and _is_whole(tensor):
        return "ids"
    # Under an unknown name there could be any matrix of as many rows.
    is_state = last in ROWS and "norm" not in path and (chooses or "." not in path)
    if is_state and (shape[0] == experts or shape == (1, experts)):
        return "rows"
    if not routes and last in ("weight", "bias") and experts not in shape:
        return ""  # a matrix before or behind the experts
    if chooses:
        return "" if ("norm" in path or last == "scale") and experts not in shape else None
    return None if experts in shape or _is_whole(tensor) else ""


def _may_choose(path: str, tensor: Tensor, experts: int, *, in_layer: bool) -> bool:
    """Whether what stands outside of all blocks has to be looked at."""
    if APART.search(path):
        return False
    if not in_layer:
        return CHOOSES.search(path) is not None and (experts in tensor.shape or _is_whole(tensor))
    return CHOOSES.search(path) is not None or (_is_whole(tensor) and not PACKED.search(path))


def _routes(name: str, path: str, router: str | None) -> bool:
    if router is not None:
        return _is_under(name, router)
    return any(part in ROUTER_NAMES for part in path.split("."))


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers of 16 bits or more."""
    fractions = tensor.is_floating_point() or tensor.is_complex()
    return not fractions and tensor.element_size() > 1


def _is_under(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
