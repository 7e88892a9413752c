"""State: the weights of experts that are on some ranks only, as states of models hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from moetuner.placement import EMPTY


class ExpertTensor(DTensor):
    """A weight of an expert in a state: whole on some ranks of a group, absent on the others.

    ``torch.distributed.checkpoint`` saves and loads it where it is, ``full_state_dict`` gathers it.
    Pickled, it is the tensor of this rank, without rows where the expert is elsewhere.
    """

    ranks: list[int]

    @staticmethod
    def of(local: Tensor | None, like: Tensor, ranks: list[int], mesh: DeviceMesh) -> ExpertTensor:
        """Return the weight that is whole, and like another one, on these ranks of a mesh."""
        local = like.new_empty(0, *like.shape[1:]) if local is None else local
        # No placement of torch says this. A partial one is refused by checkpoints, if by some
        # operation only that is left.
        whole = DTensor.from_local(
            local, mesh, [Partial()], run_check=False, shape=like.shape, stride=like.stride()
        )
        weight = ExpertTensor(whole._local_tensor, whole._spec, requires_grad=False)
        weight.ranks = ranks
        return weight

    def _map(self, call: Callable[[Tensor], Tensor]) -> ExpertTensor:
        weight = ExpertTensor(call(self._local_tensor), self._spec, requires_grad=False)
        weight.ranks = self.ranks
        return weight

    def detach(self) -> ExpertTensor:
        """Return the same memory."""
        return self._map(Tensor.detach)

    def clone(self, **options: Any) -> ExpertTensor:
        """Return the same weight in new memory."""
        return self._map(lambda local: local.clone(**options))

    def to(self, *arguments: Any, **options: Any) -> ExpertTensor:
        """Return the weight on another device, or of another type."""
        return self._map(lambda local: local.to(*arguments, **options))

    def cpu(self, *arguments: Any) -> ExpertTensor:
        """Return the weight in the memory of the host."""
        return self._map(lambda local: local.cpu(*arguments))

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertTensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._local_tensor.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _is_here(self) -> bool:
        return dist.get_rank(self.device_mesh.get_group()) in self.ranks

    def redistribute(self, *_: Any, **__: Any) -> DTensor:
        """Return the whole weight on every rank, which all take part in."""
        group = self.device_mesh.get_group()
        local = self._local_tensor if self._is_here() else self._local_tensor.new_empty(self.shape)
        whole = local.contiguous()
        dist.broadcast(whole, dist.get_global_rank(group, self.ranks[0]), group=group)
        return DTensor.from_local(whole, self.device_mesh, [Replicate()], run_check=False)

    def full_tensor(self, *_: Any, **__: Any) -> Tensor:
        """Return the whole weight on every rank, which all take part in."""
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


class ByExpert:
    """Weights by names such as ``3.up``, which are attributes as well: first ``3``, then ``up``.

    So ``torch.distributed.checkpoint`` finds what the keys of a state name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)

    def __getattr__(self, name: str) -> Any:
        """Return the weight of that name, or those whose names begin with it."""
        weights = self.__dict__.get("weights", {})
        if name in weights:
            return weights[name]
        start = f"{name}."
        below = {key.removeprefix(start): w for key, w in weights.items() if key.startswith(start)}
        if not below:
            raise AttributeError(f"no expert or weight {name!r}")
        return ByExpert(below)


def by_expert(
    weights: Mapping[str, Tensor],
    slots: NDArray[np.int32],
    rank: int,
    group: dist.ProcessGroup | None,
) -> ByExpert:
    """Return the weights of all experts one by one, as views of a rank's weights [S,...].

    Parameters
    ----------
    weights
        Weights by name [S,...].
    slots
        Experts of the slots of all ranks [D,S], -1 for none.
    rank
        This one.
    group
        The ranks.
    """
    views: dict[str, Tensor] = {}
    own = slots[rank].tolist()
    for name, weight in weights.items():
        for expert in np.unique(slots[slots != EMPTY]).tolist():
            local = weight[own.index(expert)] if expert in own else None
            if len(slots) > 1 and weight.ndim > 1:
                ranks = np.flatnonzero((slots == expert).any(axis=1)).tolist()
                mesh = mesh_of(group, "cpu" if weight.is_meta else weight.device.type)
                local = ExpertTensor.of(local, weight[0], ranks, mesh)
            if local is not None:
                views[f"{expert}.{name}"] = local
    return ByExpert(views)


def stacked(
    name: str, weight: Tensor, slots: Sequence[int], given: Mapping[str, Any]
) -> tuple[Tensor, list[str], list[str]]:
    """Put the weights of experts in the order of slots.

    Parameters
    ----------
    name, weight
        A weight as it is [S,..]: empty slots keep theirs.
    slots
        Experts of the slots, -1 for none.
    given
        Weights by expert and name, as ``3.up``.

    Returns
    -------
    tuple
        The weight to be [S,..], keys that are missing, and what else is wrong.
    """
    missing: dict[str, None] = {}
    wrong: list[str] = []
    rows: list[Tensor | None] = []
    for expert in slots:
        key = f"{expert}.{name}"
        value: Any = given.get(key)
        value = value.to_local() if hasattr(value, "to_local") else value
        if expert != EMPTY and value is None:
            missing[key] = None
        elif value is not None and value.shape != weight.shape[1:]:
            shapes = list(weight.shape[1:]), list(value.shape)
            wrong.append(f"{key} must be {shapes[0]}, got {shapes[1]}")
            value = None
        rows.append(value)
    like = next((row for row in rows if row is not None), weight)
    whole = like.new_zeros(weight.shape)
    for slot, row in enumerate(rows):
        if row is not None or not weight.is_meta:
            whole[slot] = weight[slot].detach() if row is None else row
    return whole, list(missing), wrong


def mesh_of(group: dist.ProcessGroup | None, device: str) -> DeviceMesh:
    """Return the ranks of a group, None for all, as a mesh of devices of a type."""
    return _mesh(group or dist.group.WORLD, device)


@cache
def _mesh(group: dist.ProcessGroup, device: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device)
