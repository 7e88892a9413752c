"""State: the weights of experts that are on some ranks only, as states of models hold them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


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
        found = ExpertTensor(whole._local_tensor, whole._spec, requires_grad=False)
        found.ranks = ranks
        return found

    def _map(self, call: Callable[[Tensor], Tensor]) -> ExpertTensor:
        found = ExpertTensor(call(self._local_tensor), self._spec, requires_grad=False)
        found.ranks = self.ranks
        return found

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


def mesh_of(group: dist.ProcessGroup | None, device: str) -> DeviceMesh:
    """Return the ranks of a group, None for all, as a mesh of devices of a type."""
    return _mesh(group or dist.group.WORLD, device)


@cache
def _mesh(group: dist.ProcessGroup, device: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device)
