"""Put the experts of a model in memory into the order of a placement."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from moetuner._checks import flag, instance
from moetuner.placement import Placement
from moetuner.router_groups import check_whole
from moetuner.torch.models import MoELayer, moe_layers
from moetuner.torch.outside import Registered, has_memory
from moetuner.torch.reorder import plan
from moetuner.torch.reorder.plan import Changes, Order, TensorChange, TensorPlan, Tensors, is_under
from moetuner.torch.reorder.steps import Exchange, exchange_all, list_exchanges

ADVICE = "renumber the checkpoint with permute_state_dict before it is loaded"


def apply_placement(
    model: nn.Module,
    placement: Placement,
    *,
    routers: Iterable[str | nn.Module] | None = None,
    inverse: bool = False,
) -> Order:
    """Renumber the experts of a model in place, so that contiguous experts are the placement.

    Experts and router rows move together, so the model computes what it did before: the same sums,
    of which only the order can differ. Saved with ``save_pretrained``, it loads anywhere. An
    engine that puts experts 0 to E/D-1 on its first device runs the placement. The call needs
    memory for one expert. Apply it before an optimizer is made or the model is spread over devices.

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
        If the result could not be exact, with the reason. Whatever error ends this, the model is
        then unchanged.
    """
    instance("placement", placement, Placement)
    flag("inverse", inverse)
    layers = moe_layers(model, routers)
    sizes = (len(layers), layers[0].num_experts)
    if sizes != (placement.layers, placement.num_experts):
        rule = f"{sizes[0]} layers of {sizes[1]} experts as the model has"
        found = f"{placement.layers} of {placement.num_experts}"
        raise ValueError(f"placement must have {rule}, got {found}")
    order = plan.order_experts(placement)
    for layer, positions in zip(layers, order, strict=True):
        if layer.num_experts != len(positions):
            rule = f"must have {len(positions)} experts like the first MoE layer"
            raise ValueError(f"{layer.name}: {rule}, got {layer.num_experts}")
        check_whole(positions, layer.expert_groups, layer.name)
    order = np.argsort(order, axis=1) if inverse else order
    tensors = _tensors(model, layers)
    blocks: dict[str, str | None] = {_block(layer): layer.name for layer in layers}
    changes = plan.plan_changes(tensors, TensorPlan.for_names(tensors, order, blocks))
    registered = Registered(model)
    for layer in layers:
        _check_weights(layer, changes, tensors, registered)
    plan.check_ties(changes, lambda name, experts: plan.view_bytes(tensors[name], experts))
    steps: list[Exchange] = []
    # All tables are read before anything moves.
    for change in [changes[name] for name in _list_moving(changes, tensors)]:
        tensor = tensors[change.name].detach()
        if change.order is not None:
            # Gradients that wait for an optimizer's step are of the same experts.
            gradient = tensors[change.name].grad
            for rows in [tensor] if gradient is None else [tensor, gradient]:
                is_first = len(rows) == len(change.order)
                steps += list_exchanges(rows if is_first else rows[0], change.order)
        else:
            steps.append(Exchange([tensor, plan.reorder(change.name, tensor, change)], 0, 1))
    for layer, positions in zip(layers, order, strict=True):
        if isinstance(layer.experts, nn.ModuleList):
            steps += list_exchanges(layer.experts, positions)
    # Tensors loaded in inference mode can be written in it alone; all others can be, too.
    is_inference = any(tensors[name].is_inference() for name in changes)
    with torch.inference_mode() if is_inference else torch.no_grad():
        exchange_all(steps)
    return order


def _tensors(model: nn.Module, layers: tuple[MoELayer, ...]) -> dict[str, Tensor]:
    """Return the tensors of a model by all their names; a block that runs twice has one name."""
    blocks = {id(layer.block): _block(layer) for layer in layers}
    modules = model.named_modules(remove_duplicate=False)
    repeated = tuple(f"{name}." for name, module in modules if blocks.get(id(module), name) != name)
    kinds = (model.named_parameters, model.named_buffers)
    named = itertools.chain(*(kind(remove_duplicate=False) for kind in kinds))
    return {name: tensor for name, tensor in named if not name.startswith(repeated)}


def _check_weights(
    layer: MoELayer, changes: Changes, tensors: Tensors, registered: Registered
) -> None:
    """Raise unless a layer's weights can move and its experts are stacked or in a list."""
    is_list, has_weights = isinstance(layer.experts, nn.ModuleList), False
    for name, change in changes.items():
        if change.block != _block(layer):
            continue
        tensor = tensors[name]
        if tensor.is_meta or hasattr(tensor, "placements"):
            what = "on the meta device" if tensor.is_meta else "spread over devices"
            raise ValueError(f"{layer.name}: weights must be in memory, some are {what}")
        is_norm = tensor.dim() == 1 and "norm" in name  # one for all experts
        if not (_moves(change) or tensor.numel() <= 1 or is_list or is_norm):
            raise ValueError(f"{name}: must be of all experts [experts, ..]")
        if _moves(change):
            _check_rows(name, tensor)
        has_weights |= change.order is not None and not change.is_router and tensor.dim() > 2
    _check_outside(layer, registered)
    if not (is_list or has_weights):
        rule = "experts must hold weights [experts, .., ..]"
        raise ValueError(f"{layer.name}: {rule}, they hold none as parameters")


def _check_rows(name: str, tensor: Tensor) -> None:
    """Raise unless the rows of a tensor can be written one by one."""
    plan.check_memory(name, tensor, f": {ADVICE}")
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and step == 0 for size, step in sizes):
        raise ValueError(f"{name}: its elements must not share memory, as those of an expanded one")


def _check_outside(layer: MoELayer, registered: Registered) -> None:
    """Raise unless all weights of a layer are parameters or buffers: nothing else moves."""
    block = _block(layer)
    for path, module in layer.block.named_modules(prefix=block):
        name_in_block = path.removeprefix(block).removeprefix(".")
        # The experts of a list move as modules, and modules that do not depend on the order stay.
        is_expert = re.fullmatch(r"experts\.\d+(\..*)?", name_in_block) is not None
        is_routing = (
            module is layer.block or is_under(f"{path}.", layer.name) or "experts" in name_in_block
        )
        if (isinstance(layer.experts, nn.ModuleList) and is_expert) or plan.is_apart(name_in_block):
            continue
        for name, shape in registered.outside(module):
            if is_routing or layer.num_experts in shape:
                raise ValueError(
                    f"{path}.{name}: weights must be parameters or buffers to change places, "
                    f"these are an attribute, as quantisers set them: {ADVICE}"
                )


def _list_moving(changes: Changes, tensors: Tensors) -> list[str]:
    """Return the tensors that change, one for each memory; raise if those of one memory differ."""

    def describe_move(name: str) -> object:
        """Return what happens to a tensor: equal for tensors that move alike; None if it stays."""
        tensor, change = tensors[name], changes[name]
        orders = [
            None if order is None else order.tobytes() for order in (change.order, change.ids)
        ]
        # An expert of a list moves as a module, which has another name then.
        new_name = change.name if change.name != name else None
        if orders == [None, None] and new_name is None:
            return None
        return _span(tensor), tensor.shape, *orders, new_name

    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    moving, end, owner = [], ("", 0), ""
    # Sorted by where they begin, tensors that overlap follow each other.
    for device, begin, size, _, name in spans:
        if (device, begin) >= end:
            moving += [name] if _moves(changes[name]) else []
        elif describe_move(name) != describe_move(owner):
            raise ValueError(f"{name}: must not share memory with {owner}, which moves otherwise")
        if (device, begin + size) > end:
            end, owner = (device, begin + size), name
    return moving


def _span(tensor: Tensor) -> tuple[str, int, int, tuple[int, ...]]:
    """Return device, address, bytes and strides of a tensor's memory."""
    if not has_memory(tensor):
        return "", id(tensor), 1, ()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    size = (1 + sum((n - 1) * step for n, step in steps)) * tensor.element_size()
    return str(tensor.device), tensor.data_ptr(), size, tensor.stride()


def _moves(change: TensorChange) -> bool:
    return change.order is not None or change.ids is not None


def _block(layer: MoELayer) -> str:
    return layer.name.rpartition(".")[0]
