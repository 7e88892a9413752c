"""Weights of experts that are on some ranks only, in the state of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from moetuner.placement import EMPTY

SAME_WEIGHT = {Tensor.detach, Tensor.clone, Tensor.to, Tensor.cpu, Tensor.__deepcopy__}


class ExpertTensor(DTensor):
    """A weight of an expert in a state: whole on some ranks of a group, absent on the others.

    ``torch.distributed.checkpoint`` saves and loads it where it is, ``full_state_dict`` gathers it.
    Pickled, it is the tensor of this rank, without rows where the expert is elsewhere.
    """

    ranks: list[int]

    @staticmethod
    def make(
        local: Tensor | None, like: Tensor, ranks: list[int], mesh: DeviceMesh
    ) -> ExpertTensor:
        """Make a weight like another one that is whole on these ranks of a mesh."""
        local = like.new_empty(0, *like.shape[1:]) if local is None else local
        # No placement of torch says this. A partial one is refused by checkpoints, if by some
        # operation only that is left.
        sizes: Any = {"shape": like.shape, "stride": like.stride()}
        full = DTensor.from_local(local, mesh, [Partial()], run_check=False, **sizes)
        return ExpertTensor._made(full._local_tensor, full._spec, ranks)

    @staticmethod
    def _made(local: Tensor, spec: Any, ranks: list[int]) -> ExpertTensor:
        weight = ExpertTensor(local, spec, requires_grad=False)
        weight.ranks = ranks
        return weight

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Apply a function that keeps the weight, in other memory or of another type, locally."""
        kwargs = kwargs or {}
        if function not in SAME_WEIGHT:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        weight, *arguments = args
        local = function(weight._local_tensor, *arguments, **kwargs)
        return cls._made(local, weight._spec, weight.ranks)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._local_tensor.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _is_here(self) -> bool:
        return dist.get_rank(self.device_mesh.get_group()) in self.ranks

    def redistribute(self, *_: Any, **__: Any) -> DTensor:
        """Return the whole weight on every rank; all ranks must call it."""
        group = self.device_mesh.get_group()
        local = self._local_tensor if self._is_here() else self._local_tensor.new_empty(self.shape)
        full = local.contiguous()
        dist.broadcast(full, dist.get_global_rank(group, self.ranks[0]), group=group)
        return DTensor.from_local(full, self.device_mesh, [Replicate()], run_check=False)

    def full_tensor(self, *_: Any, **__: Any) -> Tensor:
        """Return the whole weight on every rank; all ranks must call it."""
        return self.redistribute().to_local()

    def __create_write_items__(self, fqn: str, _: Any) -> Any:
        return _create_write_items(fqn, self._local_tensor) if self._is_here() else []

    def __create_chunk_list__(self) -> Any:
        if not self._is_here():
            return []
        local = self._local_tensor
        return [ChunkStorageMetadata(torch.Size([0] * local.ndim), local.shape)]

    def __get_tensor_shard__(self, _: Any) -> Tensor:
        return self._local_tensor


def list_expert_weights(layer: Any) -> dict[str, Tensor]:
    """Return weights of experts by names such as ``3.up``, as views of the weights of a rank."""
    slots, views = layer.placement.slots[layer.layer], {}
    local_slots = slots[layer.rank].tolist()
    for name, weight in layer.experts.weights().items():
        for expert in np.unique(slots[slots != EMPTY]).tolist():
            local = weight[local_slots.index(expert)] if expert in local_slots else None
            if layer.ranks > 1 and weight.ndim > 1:
                ranks = np.flatnonzero((slots == expert).any(axis=1)).tolist()
                kind = "cpu" if weight.is_meta else weight.device.type
                mesh = _mesh(layer.group or dist.group.WORLD, kind)
                local = ExpertTensor.make(local, weight[0], ranks, mesh)
            if local is not None:
                views[f"{expert}.{name}"] = local
    return views


def nest(weights: Mapping[str, Tensor]) -> SimpleNamespace:
    """Return weights with names such as ``3.up`` as nested attributes, for checkpoints of torch."""
    root = SimpleNamespace()
    for key, weight in weights.items():
        *path, name = key.split(".")
        node = root
        for key_part in path:
            node = vars(node).setdefault(key_part, SimpleNamespace())
        setattr(node, name, weight)
    return root


def stack(
    name: str, weight: Tensor, slots: Sequence[int], stored: Mapping[str, Any]
) -> tuple[Tensor, list[str], list[str]]:
    """Put given weights of experts, by names such as ``3.up``, in the order of slots [S].

    Returns the weight to be [S,..], in which empty slots stay as they are, keys that are missing,
    and what else is wrong.
    """
    missing, wrong = [], []
    rows: dict[int, Tensor] = {}
    for slot, expert in enumerate(slots):
        key = f"{expert}.{name}"
        value: Any = stored.get(key)
        value = value.to_local() if hasattr(value, "to_local") else value
        if value is None:
            missing += [key] if expert != EMPTY else []
        elif value.shape != weight.shape[1:]:
            wrong.append(f"{key} must be {list(weight.shape[1:])}, got {list(value.shape)}")
        else:
            rows[slot] = value
    like = next(iter(rows.values()), weight)
    full = like.new_zeros(weight.shape)
    for slot in range(len(slots)):
        if slot in rows or not weight.is_meta:
            full[slot] = rows.get(slot, weight[slot].detach())
    return full, missing, wrong


_mesh = cache(DeviceMesh.from_group)
