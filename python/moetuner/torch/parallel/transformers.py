"""Transformers: run a model's experts by a placement, as one of its ways of expert parallelism.

Transformers loads contiguous shards of experts. Before the first step their weights go to the slots
of the placement, from owner to holder, and stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moetuner.evaluation.rows import LayerSplit
from moetuner.placement import Placement
from moetuner.torch.outside import Registered, has_memory
from moetuner.torch.parallel.layer import ExpertParallelMoE
from moetuner.torch.parallel.migrate import Spares, moves


def register_placement(
    placement: Placement,
    name: str = "moetuner",
    *,
    devices_per_node: int | None = None,
    split: LayerSplit = "even",
    timeout: float = 600.0,
) -> list[ExpertParallelMoE]:
    """Make ``DistributedConfig(ep_implementation=name)`` run experts by a placement.

    Call it on every rank before ``from_pretrained(..., distributed_config=...)``. Layers are
    numbered in the order of the model's modules; a model loaded afterwards starts anew. The experts
    are for inference: they take no gradients, and a model whose experts are placed neither gives
    nor loads a state (``NotImplementedError``), which would have them in the order of the slots.

    Parameters
    ----------
    placement
        For as many MoE layers as the model has, and as many devices as ``ep_size``.
    name
        Under which name.
    devices_per_node, split
        As in ``ExpertParallelMoE``.
    timeout
        Seconds for the weights of one layer to reach their slots.

    Returns
    -------
    list of ExpertParallelMoE
        The layers of the model loaded last; filled before its first step.
    """
    layers: list[ExpertParallelMoE] = []
    parts: list[_PlacedExperts] = []

    def place() -> None:
        if len(parts) != placement.layers:
            count = placement.layers
            raise ValueError(f"placement must have {len(parts)} layers like the model, got {count}")
        # Of all layers, before anything is sent.
        for number, part in enumerate(parts):
            part.check(number)
        options: dict[str, Any] = {"devices_per_node": devices_per_node, "split": split}
        for number, part in enumerate(parts):
            layers.append(part.load(placement, number, timeout, **options))

    def implementation(experts: nn.Module, *meshes: DeviceMesh) -> _PlacedExperts:
        if all(part.layer is not None for part in parts):
            parts.clear()
            layers.clear()
        parts.append(_PlacedExperts(experts, *meshes))
        # The weights are loaded later; before the first step they are there.
        parts[-1].hook = experts.register_forward_pre_hook(lambda *_: place())
        return parts[-1]

    EPImplementationInterface.register(name, implementation)
    return layers


class _PlacedExperts(EPImplementation):
    """The experts of one layer of a transformers model."""

    hook: RemovableHandle

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.module = experts
        self.owned: int = experts.num_experts  # type: ignore[assignment]
        self.layer: ExpertParallelMoE | None = None
        self.served = 0  # tokens of this rank's batches so far

    def check(self, number: int) -> None:
        """Check that the weights of this layer can be sent: they are parameters, row by row."""
        inside = {id(tensor) for tensor in self.module.parameters(recurse=False)}
        others = [*self.module.named_parameters(), *self.module.named_buffers()]
        outside = [
            name
            for name, parameter in others
            if id(parameter) not in inside and parameter.numel() > 1
        ]
        registered = Registered(self.module)
        for path, module in self.module.named_modules():
            outside += [f"{path}.{name}".strip(".") for name, _ in registered.outside(module)]
        parameters = self.module.named_parameters(recurse=False)
        local = ((name, w.to_local() if isinstance(w, DTensor) else w) for name, w in parameters)
        outside += [name for name, weight in local if not has_memory(weight)]
        if outside:
            raise ValueError(
                f"MoE layer {number}: the weights of {type(self.module).__name__} must be its own "
                f"parameters to go to their slots, {outside[0]} is not: a model that a quantiser "
                "has changed can run a placement as a checkpoint renumbered by permute_state_dict"
            )

    def load(
        self, placement: Placement, number: int, timeout: float, **options: Any
    ) -> ExpertParallelMoE:
        """Bring the weights of this rank's slots from the ranks that loaded them."""
        self.hook.remove()
        group, ranks = self.ep_mesh.get_group(), self.ep_mesh.size()
        rank, local = self.ep_mesh.get_local_rank(), self.owned
        if (placement.devices, placement.num_experts) != (ranks, ranks * local):
            rule = f"{ranks} devices and {ranks * local} experts like the model"
            sizes = f"{placement.devices} and {placement.num_experts}"
            raise ValueError(f"placement must have {rule}, got {sizes}")
        named: list[tuple[str, Any]] = list(self.module.named_parameters(recurse=False))
        named = [(name, w.to_local() if isinstance(w, DTensor) else w) for name, w in named]
        loaded = {name: weight.detach() for name, weight in named}
        short = {name: list(w.shape) for name, w in loaded.items() if len(w) != local}
        if short:
            raise ValueError(f"experts must be whole on their ranks ({local} each), got {short}")
        slots = placement.slots[number]
        owners = np.arange(ranks * local, dtype=np.int32).reshape(ranks, local)
        spares = Spares(loaded, moves(owners, slots, options["devices_per_node"]), rank)
        spares.fill(group, timeout)
        # There are at least as many slots as experts that this rank has loaded.
        empty = slots.shape[1] - local
        placed = {n: torch.cat([w, w.new_zeros(empty, *w.shape[1:])]) for n, w in loaded.items()}
        spares.put(placed)
        # The module's parameters are those that run, so that they move with the model.
        parameters = {n: nn.Parameter(w, requires_grad=False) for n, w in placed.items()}
        for name, parameter in parameters.items():
            self.module.register_parameter(name, parameter)
        self.module.num_experts = slots.shape[1]
        self.module.register_state_dict_pre_hook(_no_state)  # type: ignore[no-untyped-call]
        self.module.register_load_state_dict_pre_hook(_no_state)  # type: ignore[no-untyped-call]
        experts = _ModuleExperts(self.module, self.experts_forward, parameters)
        self.layer = ExpertParallelMoE(experts, placement, number, group=group, **options)
        return self.layer

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts of this rank's part of its batch; gives the results of all of it."""
        assert self.layer is not None
        sharing, tokens = self.tp_mesh.size(), len(hidden_states)
        # Ranks that share a batch take a run of tokens each, the first ones a token more.
        lengths = [(tokens + sharing - 1 - rank) // sharing for rank in range(sharing)]
        local_rank = self.tp_mesh.get_local_rank()
        first = sum(lengths[:local_rank])
        part = slice(first, first + lengths[local_rank])
        # Positions run on from step to step as in the layer, but by whole batches.
        batches, batch = self.layer.ranks // sharing, self.layer.rank // sharing
        position = self.served * batches + batch * tokens + first
        inputs = hidden_states[part], top_k_index[part], top_k_weights[part]
        results: Tensor = self.layer(*inputs, first_token=position)
        self.served += tokens
        if sharing == 1:
            return results
        padded = nn.functional.pad(results, (0, 0, 0, lengths[0] - len(results)))
        every = results.new_empty(sharing * lengths[0], results.shape[1])
        dist.all_gather_into_tensor(every, padded, group=self.tp_mesh.get_group())
        runs = zip(torch.split(every, lengths[0]), lengths, strict=True)
        return torch.cat([run[:length] for run, length in runs])


@dataclass
class _ModuleExperts:
    """A transformers module of experts, as ``ExpertParallelMoE`` calls it.

    FSDP puts its own parameters back before every step, so the placed ones take their places for
    the time of a call.
    """

    module: nn.Module
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    placed: dict[str, nn.Parameter]

    def __call__(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Compute each row by its slot alone, with weight 1."""
        if not len(rows):
            return rows
        slots = torch.arange(len(counts), device=rows.device)
        slot = torch.repeat_interleave(slots, counts, output_size=len(rows))
        others = {name: self.module._parameters[name] for name in self.placed}
        self.module._parameters.update(self.placed)
        try:
            return self.forward(rows, slot[:, None], rows.new_ones(len(rows), 1))
        finally:
            self.module._parameters.update(others)

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters in the slots."""
        return dict(self.placed)


def _no_state(*_: object) -> None:
    raise NotImplementedError(
        "a model whose experts are placed cannot be saved, nor a state loaded into it: it would "
        "hold experts in the order of its slots; do that before its first step"
    )
