"""Put tensors into the order of a placement one by one, as trainers send them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from moetuner._checks import flag, instance, listed
from moetuner.placement import Placement
from moetuner.torch.models import moe_layers
from moetuner.torch.reorder import plan
from moetuner.torch.reorder.names import find_blocks, is_mtp, parse_name
from moetuner.torch.reorder.plan import ROUTER_NAMES, Order, TensorPlan
from moetuner.torch.reorder.settings import Config, make_empty_model, read_settings

# Text before all names of an adapter that PEFT writes.
ADAPTED = "base_model.model."


class Renumbering:
    """Renumbers named tensors one by one, so that contiguous experts are the placement.

    ``renumber(name, tensor)`` gives the new name and tensor: those that ``permute_state_dict``
    gives for the whole checkpoint. A trainer that updates an engine whose checkpoint was renumbered
    calls it with each tensor that it sends: all weights, some of them, or adapters of single
    experts and of routers. Calls do not depend on each other. A tensor that does not change is
    returned as it is.

    Parameters
    ----------
    placement
        One copy of each expert, equally many on every device.
    config
        The model's configuration, or the settings of its ``config.json``.
    names
        Names of all tensors of the checkpoint, as its index has them; by default those that the
        model of transformers with this configuration has, in memory and in its checkpoints.
    inverse
        Give tensors of a renumbered checkpoint their old names and rows.

    Raises
    ------
    ValueError
        If the result could not be exact, with the reason: here if the configuration shows it, else
        in the call with the tensor. Two experts with equal router rows, which
        ``permute_state_dict`` refuses, are not found, as single tensors do not show them.

    Examples
    --------
    >>> renumber = Renumbering(placement, model.config)  # doctest: +SKIP
    >>> engine.load_weights(renumber(*named) for named in weights)  # doctest: +SKIP
    """

    def __init__(
        self,
        placement: Placement,
        config: Config,
        *,
        names: Iterable[str] | None = None,
        inverse: bool = False,
    ) -> None:
        instance("placement", placement, Placement)
        flag("inverse", inverse)
        names = None if names is None else listed("names", names, "names")
        settings = read_settings(config, names or ())
        order = plan.order_experts(placement)
        settings.check_order(order)
        order = np.argsort(order, axis=1) if inverse else order
        self._hidden_layers = settings.hidden_layers
        if names is None:
            self._plans = _make_plans(config, order, self._hidden_layers)
        else:
            blocks = find_blocks(names, len(order), self._hidden_layers)
            self._plans = [TensorPlan.for_names(names, order, dict.fromkeys(blocks))]

    def __call__(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """Return the new name and the new tensor."""
        start = ADAPTED if name.startswith(ADAPTED) else ""
        name = name.removeprefix(start)
        expert_name = parse_name(name)
        plan_of_block = next((p for p in self._plans if p.has(name, expert_name)), None)
        block = expert_name.block if expert_name else name
        if plan_of_block is None and is_mtp(block, self._hidden_layers):
            return start + name, tensor
        plan_of_layer = next((p for p in self._plans if p.is_beside(name)), None)
        may_route = plan_of_layer is None and self._routes(name, tensor)
        if plan_of_block is None and (expert_name is not None or may_route):
            raise ValueError(
                f"{start}{name}: must be of one of the model's MoE layers, such as "
                f"{next(iter(self._plans[0].routers))}: if its names are others, give them in names"
            )
        chosen = plan_of_block or plan_of_layer or self._plans[0]
        if (
            expert_name is not None
            and expert_name.is_padded
            and expert_name.head not in chosen.widths
        ):
            raise ValueError(f"{start}{name}: names with leading zeros must be given in names")
        change = chosen.change(name, tensor, expert_name)
        if change.order is not None or change.ids is not None:
            plan.check_memory(f"{start}{name}", tensor)
        return start + change.name, plan.reorder(name, tensor, change)

    def _routes(self, name: str, tensor: Tensor) -> bool:
        """Return whether a tensor may be of a router with an unknown name."""
        experts = self._plans[0].experts
        return experts in tensor.shape and not ROUTER_NAMES.isdisjoint(name.split("."))


def _make_plans(config: Any, order: Order, hidden_layers: int | None) -> list[TensorPlan]:
    """Return the plans for a model of transformers, for names on disk and in memory."""
    model = make_empty_model(config)
    layers = moe_layers(model)
    if len(layers) != len(order):
        text = f"placement must have {len(layers)} layers as the model has, got {len(order)}"
        raise ValueError(
            f"{text}: with layers beyond it, give all names of the checkpoint in names"
        )
    from transformers.core_model_loading import revert_weight_conversion

    tensors = model.state_dict()
    stored = revert_weight_conversion(model, dict(tensors))
    plans = [_check_plan(stored, order, hidden_layers)]
    if stored.keys() != tensors.keys():
        with suppress(ValueError):  # where only the checkpoint can be renumbered
            plans.append(_check_plan(tensors, order, hidden_layers))
    return plans


def _check_plan(tensors: plan.Tensors, order: Order, hidden_layers: int | None) -> TensorPlan:
    """Return the plan for tensors of a whole model; raise if it cannot be exact."""
    blocks = find_blocks(tensors, len(order), hidden_layers)
    tensor_plan = TensorPlan.for_names(tensors, order, dict.fromkeys(blocks))
    plan.plan_changes(tensors, tensor_plan)
    return tensor_plan
