"""Plan the change of every tensor of a model when its experts change places: name, rows or ids.

One plan serves models in memory, checkpoints and single tensors. It decides by names and shapes
only. Tensors that depend on the order of experts by their names change, those that do not depend on
it stay, and any other tensor that could depend on it is refused: a model that silently chooses
other experts is worse than none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner.placement import EMPTY, Placement
from moetuner.torch.outside import has_memory, is_plain
from moetuner.torch.reorder.names import UP_TO_LAYER, ExpertName, find_number_widths, parse_names

Order = NDArray[np.int64]
Tensors = Mapping[str, Tensor]
Routers = Mapping[str, str | None]

ROUTER_NAMES = {"gate", "router"}

# Tensors of a router with a row per expert.
BIASES = ("bias", "e_score_correction_bias", "expert_bias", "router_bias")
ROWS = ("weight", "per_expert_scale", *BIASES)

# Tables of experts' ids: the ids change, and nothing moves.
TABLES = ("tid2eid",)

# Names in a layer that have to do with choosing experts.
CHOOSES = re.compile(r"router|expert|e_score|eid|correction|(^|[._])moe([._]|$)")

# Names of modules that do not depend on the order of experts, and of those that do not unless they
# have to do with choosing.
APART = re.compile(r"(^|\.)shared?_|(^|\.)shared?\.|attn|attention|mamba|conv|rotary|rope")
DENSE = re.compile(r"norm|embed|(^|\.)(mlp|ffn|feed_forward|dense)\.")

# Names of whole numbers of quantised weights and of positions.
PACKED = re.compile(r"qweight|qzeros|g_idx|perm|weight_(shape|packed|zero_point)|position|quant")


# Adapters (LoRA) of a matrix with a row per expert: only the second factor has these rows.
ADAPTER, FIRST_FACTOR = re.compile(r"(^|[._])lora_"), re.compile(r"(^|\.)lora_A(\.|$)")


def view_bytes(tensor: Tensor, experts: int) -> Tensor:
    """Return the bytes of a tensor by expert [E,..]; not every type of number can be indexed."""
    return tensor.detach().reshape(experts, -1).contiguous().view(torch.uint8)


@dataclass(frozen=True)
class TensorChange:
    """The change of a tensor: its new name, and its new rows or ids.

    Attributes
    ----------
    name
        The new name.
    block
        Its MoE block; None where that does not matter.
    order
        Old row at every place [E]; None where no rows change places.
    ids
        New id of every expert [E]; None where the tensor holds no ids.
    is_router
        Whether the tensor is of a router.
    """

    name: str
    block: str | None = None
    order: Order | None = None
    ids: Order | None = None
    is_router: bool = False


Changes = dict[str, TensorChange]


def order_experts(placement: Placement) -> Order:
    """Return the old expert at every new position [L,E]: by device, ascending within one."""
    layers, devices, _ = placement.slots.shape
    experts, on_device = placement.num_experts, (placement.slots != EMPTY).sum(axis=2)
    copies, equal = placement.replicas, f"{experts}/{devices} experts on every device"
    for rule, noun, counts, breaks_rule in (
        ("one copy of each expert", "of expert", copies, copies > 1),
        (equal, "on device", on_device, on_device * devices != experts),
    ):
        for layer, number in np.argwhere(breaks_rule)[:1]:
            found = f"{counts[layer, number]} {noun} {number} in layer {layer}"
            rule = f"placement must have {rule} to become an order of experts"
            raise ValueError(f"{rule}, got {found}")
    return np.argsort(placement.device_of, axis=1, kind="stable").reshape(layers, -1)


@dataclass(frozen=True)
class TensorPlan:
    """A plan that gives the change of each tensor of a model.

    Attributes
    ----------
    order
        Old expert at every new position [L,E].
    rows
        Row of ``order`` by MoE block; blocks of one row are one block by two names.
    routers
        Name of the router of each of these blocks; None for a child with a usual name.
    unchanged
        MoE blocks that keep their order.
    widths
        Digits of experts' numbers where they have leading zeros, by the name before the number.
    """

    order: Order
    rows: Mapping[str, int]
    routers: Routers
    unchanged: frozenset[str] = frozenset()
    widths: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def for_names(names: Iterable[str], order: Order, routers: Routers) -> TensorPlan:
        """Return the plan for a model with these tensors; ``routers`` are in order of layers."""
        parts = parse_names(names).values()
        unchanged = frozenset(expert_name.block for expert_name in parts) - set(routers)
        rows = {block: row for row, block in enumerate(routers)}
        return TensorPlan(order, rows, routers, unchanged, find_number_widths(parts))

    @property
    def experts(self) -> int:
        """Experts of a layer, E."""
        return int(self.order.shape[1])

    @cached_property
    def blocks(self) -> list[str]:
        """All MoE blocks; those within others come first."""
        return sorted({*self.routers, *self.unchanged}, key=len, reverse=True)

    @cached_property
    def _layers(self) -> dict[str, str]:
        """Text with which the names of all tensors of a block's layer begin, by block."""
        layers = {block: UP_TO_LAYER.match(block) for block in self.routers}
        return {block: f"{layer[0]}." for block, layer in layers.items() if layer}

    def has(self, name: str, expert_name: ExpertName | None) -> bool:
        """Return whether a tensor belongs to one of the MoE blocks, by its name and parsed name."""
        if expert_name is not None:
            return expert_name.block in self.routers or expert_name.block in self.unchanged
        return any(is_under(name, block) for block in self.blocks)

    def is_beside(self, name: str) -> bool:
        """Return whether a tensor is in the layer of a block whose experts change places."""
        return name.startswith(tuple(self._layers.values()))

    def change(self, name: str, tensor: Tensor, expert_name: ExpertName | None) -> TensorChange:
        """Return the change of a tensor; ``expert_name`` is its parsed name if it is of experts.

        A tensor of a checkpoint may be on the meta device: its shape and its kind of numbers count.
        """
        if expert_name is not None:
            row = self.rows.get(expert_name.block)
            if row is None:
                return TensorChange(name)
            return self._change_experts(name, tuple(tensor.shape), expert_name, self.order[row])
        block, kind = self._find_dependence(name, tensor)
        if kind == "ids":
            return TensorChange(name, block, ids=np.argsort(self.order[self.rows[block]]))
        if kind == "rows":
            return TensorChange(name, block, self.order[self.rows[block]], is_router=True)
        return TensorChange(name)

    def _change_experts(
        self, name: str, shape: tuple[int, ...], expert_name: ExpertName, order: Order
    ) -> TensorChange:
        """Return the change of a tensor of experts."""
        if expert_name.expert is not None:
            (new,) = np.flatnonzero(order == int(expert_name.expert)).tolist() or (None,)
            if new is None:
                rule = f"must be of an expert from 0 to {len(order) - 1}"
                raise ValueError(f"{name}: {rule}, as the placement has")
            number = str(new).zfill(self.widths.get(expert_name.head, 0))
            return TensorChange(f"{expert_name.head}{number}{expert_name.tail}", expert_name.block)
        if ADAPTER.search(name):
            raise ValueError(f"{name}: an adapter of stacked experts, whose rows are of no expert")
        is_norm = "norm" in expert_name.tail and len(shape) == 1 and shape[0] != len(order)
        if shape in ((), (1,)) or is_norm:
            return TensorChange(name, expert_name.block)
        if "norm" in expert_name.tail and len(shape) == 1:
            rule = "must not have as many numbers as there are experts: it may be one for each"
            raise ValueError(f"{name}: {rule}, or one for all")
        if shape[0] != len(order):
            rule = f"must be [{len(order)}, ..], experts first as in the placement"
            raise ValueError(f"{name}: {rule}, got {list(shape)}")
        return TensorChange(name, expert_name.block, order)

    def _find_dependence(self, name: str, tensor: Tensor) -> tuple[str, str]:
        """Return the block of a tensor outside experts, and how it depends on their order.

        That is "rows", "ids" or "", as ``_classify`` returns it.
        """
        block = next((block for block in self.blocks if is_under(name, block)), None)
        if math.prod(tensor.shape) <= 1 or block in self.unchanged:
            return "", ""
        if block is not None:
            path, router = name[len(block) + 1 :] if block else name, self.routers[block]
            is_usual = not ROUTER_NAMES.isdisjoint(path.split("."))
            routes = is_usual if router is None else is_under(name, router)
            kind = _classify(path, tensor, self.experts, "router" if routes else "block")
        else:
            # A router may have some of its state outside its block, in the same layer.
            in_layer = [block for block, start in self._layers.items() if name.startswith(start)]
            block = in_layer[0] if in_layer else ""
            path = name.removeprefix(self._layers.get(block, ""))
            kind = _classify(path, tensor, self.experts, "layer" if in_layer else "model")
            if kind and len({self.rows[block] for block in in_layer}) > 1:
                kind = None
        if kind is None:
            what = "may depend on the order of experts in a way that is not known"
            raise ValueError(f"{name}: {list(tensor.shape)} {what}")
        return block, kind


def plan_changes(tensors: Tensors, plan: TensorPlan) -> Changes:
    """Return the changes of all tensors of a whole model or checkpoint."""
    parts, order = parse_names(tensors), plan.order
    for block in plan.routers:
        numbers = (
            expert_name.expert for expert_name in parts.values() if expert_name.block == block
        )
        experts = {int(number) for number in numbers if number is not None}
        if experts and experts != set(range(order.shape[1])):
            rule = f"must have experts 0 to {order.shape[1] - 1} as the placement has"
            raise ValueError(
                f"{block}: {rule}, got {len(experts)} from {min(experts)} to {max(experts)}"
            )
    changes: Changes = {}
    weights: dict[str, str] = {}
    for name, tensor in tensors.items():
        change = changes[name] = plan.change(name, tensor, parts.get(name))
        # Where two matrices follow each other, nothing shows which one has the rows of experts.
        is_weight = change.is_router and name.endswith("weight") and not ADAPTER.search(name)
        if is_weight and weights.setdefault(change.block or "", name) != name:
            raise ValueError(
                f"{name}: {list(tensor.shape)} must be the only weight of its router with "
                f"{order.shape[1]} rows, {weights[change.block or '']} is another"
            )
    routed = {change.block for change in changes.values() if change.is_router}
    for block in plan.routers:
        if block not in routed:
            raise ValueError(f"{block}: must have the weights of its router beside its experts")
    if len({change.name for change in changes.values()}) < len(changes):
        raise ValueError("experts must have one name each, with or without leading zeros")
    return changes


def check_ties(changes: Changes, rows: Callable[[str, int], Tensor]) -> None:
    """Raise if two experts that change places have the same router state.

    The scores of such experts always tie, and their numbers decide between them. ``rows(name,
    experts)`` returns the bytes of a tensor by expert [E,..].
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


def check_memory(name: str, tensor: Tensor, advice: str = "") -> None:
    """Raise unless a tensor's memory has its elements as it shows them, so that rows can move."""
    if not has_memory(tensor):
        place = f"{tensor.layout} on {tensor.device}"
        kind = place if is_plain(tensor) else type(tensor).__name__
        rule = "must be a whole tensor in memory, in which its elements are as it shows them"
        raise ValueError(f"{name}: {rule}, got {kind}{advice}")


def reorder(name: str, tensor: Tensor, change: TensorChange) -> Tensor:
    """Return a tensor with its rows in the new order, or with the new numbers of experts."""
    if (new := change.ids) is not None:
        old = tensor.long()
        first, last = (int(old.min()), int(old.max())) if old.numel() else (0, 0)
        if not 0 <= first <= last < len(new):
            rule = f"must hold experts 0 to {len(new) - 1}"
            raise ValueError(f"{name}: {rule}, got {first} to {last}")
        return torch.from_numpy(new).to(old.device)[old].to(tensor.dtype)
    if change.order is None:
        return tensor
    rows = view_bytes(tensor, len(change.order))
    rows = rows[torch.from_numpy(change.order).to(rows.device)]
    return rows.view(tensor.dtype).reshape(tensor.shape)


def _classify(path: str, tensor: Tensor, experts: int, part: str) -> str | None:
    """Return "rows" or "ids" if a tensor depends on the order, "" if not, None if unknown.

    ``path`` is its name within a part of the model: "router", "block", "layer" or "model".
    """
    shape, last, has_experts = tensor.shape, path.rpartition(".")[2], experts in tensor.shape
    has_fractions = tensor.is_floating_point() or tensor.is_complex()
    is_whole = not has_fractions and tensor.element_size() > 1
    names_choice = CHOOSES.search(path) is not None
    if is_apart(path) or (part == "router" and FIRST_FACTOR.search(path)):
        return ""
    if part == "model":
        return None if names_choice and (has_experts or is_whole) else ""
    if part == "layer" and not (names_choice or (is_whole and not PACKED.search(path))):
        return ""
    chooses = names_choice or part != "block"
    if not chooses and DENSE.search(path):
        return ""
    if last in TABLES and is_whole:
        return "ids"
    # Under an unknown name there could be any matrix of as many rows.
    is_state = last in ROWS and "norm" not in path and (chooses or "." not in path)
    if is_state and (shape[0] == experts or shape == (1, experts)):
        return "rows"
    if part == "block" and last in ("weight", "bias") and not has_experts:
        return ""  # a matrix before or behind the experts
    if chooses:
        return "" if ("norm" in path or last == "scale") and not has_experts else None
    return None if has_experts or is_whole else ""


def is_apart(path: str) -> bool:
    """Return whether a module at a path in a layer does not depend on the order of experts."""
    return APART.search(path) is not None


def is_under(name: str, module: str) -> bool:
    """Return whether a tensor belongs to a module or its children."""
    return not module or name.startswith(f"{module}.")
