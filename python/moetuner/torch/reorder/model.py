"""Putting the experts of a model in memory into the order of a placement."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from moetuner._checks import flag, instance
from moetuner.placement import Placement
from moetuner.torch.models import MoELayer, moe_layers
from moetuner.torch.reorder import plan
from moetuner.torch.reorder.plan import Changes, Order, TensorChange, Tensors


def apply_placement(
    model: nn.Module,
    placement: Placement,
    *,
    routers: Iterable[str | nn.Module] | None = None,
    inverse: bool = False,
) -> Order:
    """Renumber the experts of a model in place, so that contiguous experts are the placement.

    Experts and router rows move together, so the model computes what it did before: the same sums,
    of which only the order can differ. Saved with ``save_pretrained``, it loads anywhere, and an
    engine that puts experts 0 to E/D-1 on its first device runs the placement. Needs memory for one
    expert. Apply it before an optimizer is made or the model is spread over devices.

    Where the scores of two experts tie to the last bit at rank K, a router chooses by position, and
    may then choose the other one. In float32 that does not happen by chance; with logits in
    bfloat16 it does, for one token in 200 (8 experts, top-2) to one in 15 (128, top-8) per layer.

    Parameters
    ----------
    model
        The model to change.
    placement
        One copy of each expert, equally many on every device.
    routers
        Routers of the MoE layers, as modules or names, where they cannot be found by themselves.
    inverse
        Undo an earlier call with the same placement.

    Returns
    -------
    ndarray
        Old expert at every new position [L,E].

    Raises
    ------
    ValueError
        If the result could not be exact, with the reason; the model is then unchanged.
    """
    instance("placement", placement, Placement)
    flag("inverse", inverse)
    layers = moe_layers(model, routers)
    sizes = (len(layers), layers[0].num_experts)
    if sizes != (placement.layers, placement.num_experts):
        rule = f"{sizes[0]} layers of {sizes[1]} experts as the model has"
        given = f"{placement.layers} of {placement.num_experts}"
        raise ValueError(f"placement must have {rule}, got {given}")
    order = plan.order_of(placement)
    for layer, positions in zip(layers, order, strict=True):
        if layer.num_experts != len(positions):
            rule = f"must have {len(positions)} experts like the first MoE layer"
            raise ValueError(f"{layer.name}: {rule}, got {layer.num_experts}")
        plan.check_groups(positions, layer.expert_groups, layer.name)
    order = np.argsort(order, axis=1) if inverse else order
    tensors = _tensors(model, layers)
    changes = plan.changes_of(tensors, order, {_block(layer): layer.name for layer in layers})
    for layer in layers:
        _check_weights(layer, changes, tensors)
    plan.check_ties(changes, lambda name, experts: plan.bits_of(tensors[name], experts))
    moving = [changes[name] for name in _once(changes, tensors)]
    # All tables are read before anything moves.
    numbered = [of for of in moving if of.ids is not None]
    tables = {of.name: plan.moved(of.name, tensors[of.name].detach(), of) for of in numbered}
    with torch.no_grad():
        for change in moving:
            if change.order is not None:
                _permute(tensors[change.name].detach(), change.order)
            else:
                tensors[change.name].copy_(tables[change.name])
    for layer, positions in zip(layers, order, strict=True):
        if isinstance(layer.experts, nn.ModuleList):
            reordered = [layer.experts[old] for old in positions.tolist()]
            for position, module in enumerate(reordered):
                layer.experts[position] = module
    return order


def _tensors(model: nn.Module, layers: tuple[MoELayer, ...]) -> dict[str, Tensor]:
    """Return all tensors of a model by all their names; blocks that run twice have one."""
    blocks = {id(layer.block): _block(layer) for layer in layers}
    modules = model.named_modules(remove_duplicate=False)
    again = tuple(f"{name}." for name, of in modules if blocks.get(id(of), name) != name)
    kinds = (model.named_parameters, model.named_buffers)
    named = itertools.chain(*(kind(remove_duplicate=False) for kind in kinds))
    return {name: tensor for name, tensor in named if not name.startswith(again)}


def _check_weights(layer: MoELayer, changes: Changes, tensors: Tensors) -> None:
    """Check that a layer's weights are in memory, and those of experts stacked or in a list."""
    is_list, has_experts = isinstance(layer.experts, nn.ModuleList), False
    for name, change in changes.items():
        if change.block != _block(layer):
            continue
        tensor = tensors[name]
        if not _is_in_memory(tensor):
            what = "on the meta device" if tensor.is_meta else "spread over devices"
            raise ValueError(f"{layer.name}: weights must be in memory, some are {what}")
        if not (_moves(change) or tensor.numel() <= 1 or is_list):
            raise ValueError(f"{name}: must be of all experts [experts, ..]")
        has_experts |= change.order is not None and not change.is_router
    if not (is_list or has_experts):
        raise ValueError(f"{layer.name}: experts must hold weights [experts, ..], they hold none")


def _once(changes: Changes, tensors: Tensors) -> list[str]:
    """Return what changes rows or ids, each piece of memory once, if all that share it agree."""

    def move(name: str) -> object:
        tensor, change = tensors[name], changes[name]
        orders = [None if of is None else of.tobytes() for of in (change.order, change.ids)]
        # An expert of a list moves as a module, which has another name then.
        new_name = change.name if change.name != name else None
        if orders == [None, None] and new_name is None:
            return None
        return tensor.data_ptr(), tensor.shape, tensor.stride(), *orders, new_name

    spans = []
    for name, tensor in tensors.items():
        if _is_in_memory(tensor) and tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            size = (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
            where, begin = str(tensor.device), tensor.data_ptr()
            spans.append(((where, begin), (where, begin + size), name))
    once, end, owner = [], ("", 0), ""
    # Sorted by where they begin, whatever overlaps follows at once.
    for begins, ends, name in sorted(spans, key=lambda of: of[:2]):
        if begins >= end:
            once += [name] if _moves(changes[name]) else []
        elif move(name) != move(owner):
            raise ValueError(f"{name}: must not share memory with {owner}, which moves otherwise")
        if ends > end:
            end, owner = ends, name
    return once


def _moves(change: TensorChange) -> bool:
    return change.order is not None or change.ids is not None


def _is_in_memory(tensor: Tensor) -> bool:
    return not (tensor.is_meta or hasattr(tensor, "placements"))


def _block(layer: MoELayer) -> str:
    return layer.name.rpartition(".")[0]


def _permute(tensor: Tensor, order: Order) -> None:
    """Move rows along the cycles of the order, with one row to spare."""
    rows = tensor if len(tensor) == len(order) else tensor[0]
    left = set(range(len(order)))
    while left:
        first = here = left.pop()
        spare = rows[first].clone()
        while (following := int(order[here])) != first:
            rows[here].copy_(rows[following])
            left.discard(here := following)
        rows[here].copy_(spare)
