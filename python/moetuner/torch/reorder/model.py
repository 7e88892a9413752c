"""Putting the experts of a model in memory into the order of a placement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner._checks import flag, instance
from moetuner.placement import Placement
from moetuner.torch.models import MoELayer, moe_layers
from moetuner.torch.reorder.order import Order, check_groups, check_ties, inverse_of, order_of
from moetuner.torch.reorder.state import dependents, held_as, renumbered


@dataclass(frozen=True, eq=False)
class _Moved:
    """A tensor that changes with the order of a layer: rows [E,..], or ids of experts."""

    name: str
    layer: int
    tensor: Tensor
    is_table: bool = False


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
        raise ValueError(
            f"placement must have {sizes[0]} layers of {sizes[1]} experts as the model has, got "
            f"{placement.layers} of {placement.num_experts}"
        )
    order = order_of(placement)
    tensors = _tensors(model, layers)
    routing = _router_state(tensors, layers)
    moved: list[_Moved] = []
    for number, layer in enumerate(layers):
        moved += _state_of(number, layer, order[number], routing, tensors)
    order = inverse_of(order) if inverse else order
    moved = _once(moved, order, tensors)
    _check_lists(model, layers)
    tables = {
        one.name: renumbered(one.name, one.tensor.detach(), np.argsort(order[one.layer]))
        for one in moved
        if one.is_table
    }
    for one in moved:
        if one.is_table:
            with torch.no_grad():
                one.tensor.copy_(tables[one.name])
        else:
            _permute(one.tensor, order[one.layer])
    for layer, positions in zip(layers, order, strict=True):
        if isinstance(layer.experts, nn.ModuleList):
            reordered = [layer.experts[old] for old in positions.tolist()]
            for position, module in enumerate(reordered):
                layer.experts[position] = module
    return order


def _tensors(model: nn.Module, layers: tuple[MoELayer, ...]) -> dict[str, Tensor]:
    """Return all tensors of a model by all their names; blocks that run twice have one."""
    blocks = {id(layer.block): _block(layer) for layer in layers}
    again = [
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if blocks.get(id(module), name) != name
    ]
    held = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tensor for name, tensor in held if not name.startswith(tuple(again))}


def _router_state(
    tensors: dict[str, Tensor], layers: tuple[MoELayer, ...]
) -> dict[str, list[_Moved]]:
    """Return what depends on the order of the experts beside them, by block."""
    numbers = {_block(layer): number for number, layer in enumerate(layers)}
    parts = [name.split(".") for name in tensors]
    before = {".".join(p[: p.index("experts")]) for p in parts if "experts" in p[:-1]}
    inside = tuple(_join(block, "experts.") for block in {*numbers, *before})
    rest = {n: held_as(tensor) for n, tensor in tensors.items() if not n.startswith(inside)}
    routers = {_block(layer): layer.name for layer in layers}
    found: dict[str, list[_Moved]] = {block: [] for block in routers}
    others = before.difference(routers)
    for name, where in dependents(rest, routers, layers[0].num_experts, others).items():
        tensor = tensors[name]
        if not where.is_table and tensor.shape == (1, layers[0].num_experts):
            tensor = tensor[0]
        one = _Moved(name, numbers[where.block], tensor, where.is_table)
        found[where.block].append(one)
    return found


def _state_of(
    number: int,
    layer: MoELayer,
    order: NDArray[np.int64],
    routing: dict[str, list[_Moved]],
    tensors: dict[str, Tensor],
) -> list[_Moved]:
    """Return what has to change in a layer, if that is exact."""
    if layer.num_experts != len(order):
        raise ValueError(
            f"{layer.name}: must have {len(order)} experts like the first MoE layer, got "
            f"{layer.num_experts}"
        )
    check_groups(order, layer.expert_groups, layer.name)
    router = routing[_block(layer)]
    if all(one.is_table for one in router):
        raise ValueError(f"{layer.name}: the router must hold weights per expert, it has none")
    moved = list(router)
    if not isinstance(layer.experts, nn.ModuleList):
        moved += [_Moved(name, number, t) for name, t in _experts(layer, tensors)]
    for one in moved:
        if one.tensor.is_meta or hasattr(one.tensor, "placements"):
            what = "on the meta device" if one.tensor.is_meta else "spread over devices"
            raise ValueError(f"{layer.name}: weights must be in memory, some are {what}")
    rows = [one.tensor.detach() for one in router if not one.is_table]
    bits = [tensor.reshape(len(order), -1).cpu().double().numpy() for tensor in rows]
    if not np.array_equal(order, np.arange(len(order))):
        check_ties([row.tobytes() for row in np.concatenate(bits, axis=1)], layer.name)
    return moved


def _experts(layer: MoELayer, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Return the weights of the experts, each stacked along the first dimension."""
    if layer.experts is None:
        raise ValueError(f"{layer.name}: its block must have a module 'experts'")
    prefix = _join(_block(layer), "experts.")
    held = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    short = [name.removeprefix(prefix) for name in held]
    if not any(tensor.dim() >= 3 for tensor in held.values()):
        raise ValueError(
            f"{layer.name}: experts must hold weights [experts, ..], "
            f"{type(layer.experts).__name__} holds {short}"
        )
    for name, tensor in held.items():
        if tensor.shape[:1] == (layer.num_experts,):
            yield name, tensor
        elif tensor.numel() > 1:
            raise ValueError(
                f"{layer.name}: experts must hold weights [experts, ..], "
                f"{name.removeprefix(prefix)} is {list(tensor.shape)}"
            )


def _once(moved: list[_Moved], order: Order, tensors: dict[str, Tensor]) -> list[_Moved]:
    """Return each piece of memory once, if all that share it move alike."""
    by_name = {one.name: one for one in moved}
    kept: list[_Moved] = []
    # Sorted by where they begin, whatever overlaps follows at once.
    ends: dict[int, tuple[int, str]] = {}
    for name, (memory, begin, end) in sorted(_spans(tensors).items(), key=lambda item: item[1]):
        until, last = ends.get(memory, (begin, name))
        one, other = by_name.get(name), by_name.get(last)
        if until > begin and (one or other):
            a, b = tensors[name], tensors[last]
            alike = (
                one is not None
                and other is not None
                and one.is_table == other.is_table
                and (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
                and np.array_equal(order[one.layer], order[other.layer])
            )
            if not alike:
                raise ValueError(
                    f"{name}: must not share memory with {last}, which does not move with it"
                )
        elif one is not None:
            kept.append(one)
        if end > until or name == last:
            ends[memory] = (max(end, until), name)
    return kept


def _spans(tensors: dict[str, Tensor]) -> dict[str, tuple[int, int, int]]:
    """Return memory, first byte and end of every tensor that is in memory."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or hasattr(tensor, "placements") or not tensor.numel():
            continue
        size, begin = tensor.element_size(), int(tensor.storage_offset())
        ends = ((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        reach = sum(map(int, ends))
        memory = tensor.untyped_storage().data_ptr()
        found[name] = (memory, begin * size, (begin + reach + 1) * size)
    return found


def _check_lists(model: nn.Module, layers: tuple[MoELayer, ...]) -> None:
    """Check that no list of experts is that of another block as well."""
    lists = {id(la.experts): la for la in layers if isinstance(la.experts, nn.ModuleList)}
    if not lists:
        return
    for name, module in model.named_modules(remove_duplicate=False):
        layer = lists.get(id(module))
        if layer is None or name == _join(_block(layer), "experts"):
            continue
        holder = model.get_submodule(name.rpartition(".")[0])
        if holder is not layer.block:
            raise ValueError(
                f"{name}: must not be the experts of {_block(layer)}, whose router is another"
            )


def _block(layer: MoELayer) -> str:
    return layer.name.rpartition(".")[0]


def _join(block: str, child: str) -> str:
    return f"{block}.{child}" if block else child


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
    """Return cycles of positions, each of which takes what the next one holds."""
    left = set(range(len(order)))
    while left:
        cycle = [left.pop()]
        while (following := order[cycle[-1]]) != cycle[0]:
            cycle.append(following)
            left.discard(following)
        if len(cycle) > 1:
            yield cycle
