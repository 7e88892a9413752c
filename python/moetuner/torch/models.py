"""Find the MoE layers of a model: their routers, their experts, and how many of them there are.

No list of architectures: an MoE layer is a module with a child ``experts`` beside a child that
routes. That is the shape of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek, GLM-4-MoE, gpt-oss and
most others in transformers. In models of another shape, routers can be named.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moetuner._checks import instance, listed, shown
from moetuner.router_groups import count_groups
from moetuner.torch.reorder.plan import ROUTER_NAMES

SIZE_NAMES = ("num_experts", "n_routed_experts", "num_local_experts")
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "topk", "top_k_experts")


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One MoE layer of a model.

    Attributes
    ----------
    name
        Dotted name of the router in the model.
    block
        The module that holds router and experts.
    router
        The module that chooses the experts.
    experts
        The module that holds their weights; None if the block has none of that name.
    num_experts
        Experts, E.
    choices
        Rows of the router. LongCat-Flash has more of them than experts: the others are
        zero-computation experts, which return a token as it is and have no weights, device or load.
    top_k
        Experts per token, K.
    expert_groups
        Equal runs of experts among which the router chooses first, and then only within the chosen
        runs; 1 if it chooses among all experts at once.
    """

    name: str
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    experts: nn.Module | None = field(repr=False)
    num_experts: int
    choices: int
    top_k: int
    expert_groups: int


def moe_layers(
    model: nn.Module, routers: Iterable[str | nn.Module] | None = None
) -> tuple[MoELayer, ...]:
    """Find the MoE layers of a model, in the order of its modules.

    Parameters
    ----------
    model
        The model to look into.
    routers
        Routers to use, as modules of the model or their dotted names, in the order of the layers;
        by default those that are found.
    """
    instance("model", model, nn.Module)
    modules = dict(model.named_modules())
    if routers is None:
        names = [name for name in modules if _is_router(name, modules)]
        if not names:
            raise ValueError(
                f"model must have MoE layers, {type(model).__name__} has no module with 'experts' "
                "and a router: name its routers in routers=[...]"
            )
    else:
        name_of = {id(module): name for name, module in modules.items()}
        chosen = listed("routers", routers, "names")
        names = [name_of.get(id(router), router) for router in chosen]
        for name in names:
            if not isinstance(name, str) or name not in modules:
                raise ValueError(f"routers must be modules of the model, got {shown(name)}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"routers must be at least one and differ, got {names}")
    return tuple(_make_layer(name, modules) for name in names)


def same_sizes(layers: tuple[MoELayer, ...]) -> tuple[int, int]:
    """Return experts E and top-k K; raise unless all layers have the same."""
    first = layers[0]
    names = {"num_experts": "experts", "choices": "rows of the router", "top_k": "top_k"}
    for layer, (name, what) in itertools.product(layers, names.items()):
        ours, theirs = getattr(first, name), getattr(layer, name)
        if ours != theirs:
            raise ValueError(
                f"MoE layers must have the same {what}, got {ours} in {first.name} and "
                f"{theirs} in {layer.name}: name the routers to use in routers=[...]"
            )
    return first.num_experts, first.top_k


def find_choices(output: object) -> tuple[Tensor, Tensor] | None:
    """Return expert ids [T,K] and weights [T,K] from the output of a router; None without ids.

    The ids are the only matrix of integers, in any place: transformers puts it last, models with
    their own code often first. Without weights the ids are returned twice, as they are never NaN.
    """
    values = output if isinstance(output, (tuple, list)) else (output,)
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim() >= 2]
    integers = [t for t in tensors if not t.is_floating_point() and t.element_size() > 1]
    if len(integers) != 1:
        return None
    ids = integers[0]
    weights = (t for t in tensors if t.is_floating_point() and t.shape == ids.shape)
    return ids, next(weights, ids)


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Return whether a module is the router of the experts beside it, by its class or name."""
    if not name or _name_sibling(name, "experts") not in modules:
        return False
    # A block may have both a router and some other gate, for instance of its shared expert.
    siblings = [modules.get(_name_sibling(name, other)) for other in sorted(ROUTER_NAMES)]
    routers = [m for m in (modules[name], *siblings) if type(m).__name__.endswith("Router")]
    return modules[name] in routers or (name.rpartition(".")[2] in ROUTER_NAMES and not routers)


def _name_sibling(name: str, sibling: str) -> str:
    """Return the dotted name of a module beside another one."""
    return f"{name.rpartition('.')[0]}.{sibling}".removeprefix(".")


def _make_layer(name: str, modules: dict[str, nn.Module]) -> MoELayer:
    router, block = modules[name], modules[name.rpartition(".")[0]]
    experts = modules.get(_name_sibling(name, "experts"))
    holders: list[Any] = [holder for holder in (router, experts, block) if holder is not None]
    size, weight = _find_number(holders, SIZE_NAMES), getattr(router, "weight", None)
    if size is None and isinstance(experts, nn.ModuleList):
        size = len(experts)
    if size is None and isinstance(weight, Tensor) and weight.dim() == 2:
        size = weight.shape[0]
    holders += [holder.config for holder in holders if hasattr(holder, "config")]
    top_k = _find_number(holders, TOP_K_NAMES)
    if size is None or top_k is None:
        missing, names = ("experts", SIZE_NAMES) if size is None else ("top-k", TOP_K_NAMES)
        raise ValueError(
            f"{name}: the number of {missing} must be an attribute {' or '.join(names)} of the "
            f"router or its block, {type(router).__name__} has none"
        )
    choices = size + (_find_number(holders, ("zero_expert_num",)) or 0)
    groups = _count_groups(router, block)
    return MoELayer(name, block, router, experts, size, choices, top_k, groups)


def _count_groups(router: nn.Module, block: nn.Module) -> int:
    """Count the groups among which a router chooses first, by its own settings or its model's."""
    configs = [getattr(module, "config", None) for module in (router, block)]
    names = ("n_group", "topk_group", "topk_method")
    attributes_of = [vars(module).items() for module in (router, block)]
    settings: list[dict[str, Any]] = [
        {k: v for k, v in attributes if type(v) in (int, str)} for attributes in attributes_of
    ]
    settings += [
        {name: getattr(config, name, None) for name in names} for config in configs if config
    ]
    return next((groups for setting in settings if (groups := count_groups(setting)) > 1), 1)


def _find_number(holders: Iterable[object], names: Iterable[str]) -> int | None:
    """Return the first attribute of these names that is a positive number."""
    values = (getattr(*pair, None) for pair in itertools.product(holders, names))
    return next((value for value in values if type(value) is int and value > 0), None)
