"""Putting the experts of a model in memory into the order of a placement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner.placement import Placement
from moetuner.torch.order import (
    ROUTER_STATE,
    Order,
    check_groups,
    check_ties,
    inverse_of,
    order_of,
)
from moetuner.torch.routers import MoELayer, moe_layers


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
    layers = moe_layers(model, routers)
    sizes = (len(layers), layers[0].num_experts)
    if sizes != (placement.layers, placement.num_experts):
        raise ValueError(
            f"placement must have {sizes[0]} layers of {sizes[1]} experts as the model has, got "
            f"{placement.layers} of {placement.num_experts}"
        )
    order = order_of(placement)
    work = [_state_of(layer, order[number]) for number, layer in enumerate(layers)]
    order = inverse_of(order) if inverse else order
    for layer, tensors, positions in zip(layers, work, order, strict=True):
        for tensor in tensors:
            _permute(tensor, positions)
        if isinstance(layer.experts, nn.ModuleList):
            reordered = [layer.experts[old] for old in positions.tolist()]
            for position, module in enumerate(reordered):
                layer.experts[position] = module
    return order


def _state_of(layer: MoELayer, order: NDArray[np.int64]) -> list[Tensor]:
    """Give the tensors [E,..] of a layer to permute, if that is exact."""
    if layer.num_experts != len(order):
        raise ValueError(
            f"{layer.name}: must have {len(order)} experts like the first MoE layer, got "
            f"{layer.num_experts}"
        )
    check_groups(order, layer.expert_groups, layer.name)
    router = list(_router_state(layer))
    if not router:
        raise ValueError(f"{layer.name}: the router must hold weights per expert, it has none")
    state = router if isinstance(layer.experts, nn.ModuleList) else [*router, *_experts(layer)]
    for tensor in state:
        if tensor.is_meta or hasattr(tensor, "placements"):
            what = "on the meta device" if tensor.is_meta else "spread over devices"
            raise ValueError(f"{layer.name}: weights must be in memory, some are {what}")
    bits = [tensor.detach().reshape(len(order), -1).cpu().double().numpy() for tensor in router]
    if not np.array_equal(order, np.arange(len(order))):
        check_ties([row.tobytes() for row in np.concatenate(bits, axis=1)], layer.name)
    return state


def _router_state(layer: MoELayer) -> Iterator[Tensor]:
    """Give what a router holds per expert, as views with the experts first."""
    experts = layer.num_experts
    held = [*_tensors(layer.router), *_tensors(layer.block, recurse=False)]
    for name, tensor in held:
        known = name.rpartition(".")[2] in ROUTER_STATE and "norm" not in name
        if known and tensor.shape[:1] == (experts,):
            yield tensor
        elif known and tensor.shape == (1, experts):
            yield tensor[0]
        elif "norm" not in name and (
            experts in tensor.shape or (tensor.numel() > 1 and not tensor.is_floating_point())
        ):
            raise ValueError(
                f"{layer.name}: its state {name} {list(tensor.shape)} may depend on the order of "
                "experts in a way that is not known"
            )


def _experts(layer: MoELayer) -> Iterator[Tensor]:
    """Give the weights of the experts, each stacked along the first dimension."""
    if layer.experts is None:
        raise ValueError(f"{layer.name}: its block must have a module 'experts'")
    held = _tensors(layer.experts)
    if not any(tensor.dim() >= 3 for _, tensor in held):
        raise ValueError(
            f"{layer.name}: experts must hold weights [experts, ..], "
            f"{type(layer.experts).__name__} holds {[name for name, _ in held]}"
        )
    for name, tensor in held:
        if tensor.shape[:1] == (layer.num_experts,):
            yield tensor
        elif tensor.numel() > 1:
            raise ValueError(
                f"{layer.name}: experts must hold weights [experts, ..], {name} is "
                f"{list(tensor.shape)}"
            )


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def _permute(tensor: Tensor, order: NDArray[np.int64]) -> None:
    """Move rows along the cycles of the order, with one row to spare."""
    with torch.no_grad():
        rows = tensor.detach()
        for cycle in _cycles(order.tolist()):
            spare = rows[cycle[0]].clone()
            for here, there in pairwise(cycle):
                rows[here].copy_(rows[there])
            rows[cycle[-1]].copy_(spare)


def _cycles(order: list[int]) -> Iterator[list[int]]:
    """Give cycles of positions, each of which takes what the next one holds."""
    left = set(range(len(order)))
    while left:
        cycle = [left.pop()]
        while (following := order[cycle[-1]]) != cycle[0]:
            cycle.append(following)
            left.discard(following)
        if len(cycle) > 1:
            yield cycle
