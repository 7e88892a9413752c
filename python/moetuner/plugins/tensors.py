"""Functions of the engines' modules that need torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.formats.eplb import eplb_maps
from moetuner.placement import Placement
from moetuner.plugins.rounds import Group


def make_eplb_tensors(slots: NDArray[np.int64], ranks: int, experts: int) -> tuple[Any, ...]:
    """Return experts of slots [L,P], slots of experts [L,E,X] and copies [L,E] as tensors."""
    import torch

    placement = Placement(
        slots.reshape(len(slots), ranks, -1).astype(np.int32), num_experts=experts
    )
    return tuple(torch.from_numpy(array) for array in eplb_maps(placement).values())


def read_array(values: Any) -> NDArray[Any]:
    """Return the NumPy array of a tensor on any device; bfloat16 becomes float32."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    tensor = values.detach().cpu()
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    array: NDArray[Any] = (tensor.float() if narrow else tensor).numpy()
    return array


def changing_in_place() -> AbstractContextManager[Any]:
    """Return a context in which tensors may be changed that an engine made while it served.

    They were made in torch's inference mode, and outside it they refuse to be changed.
    """
    import torch

    return torch.inference_mode()


def find_process_rank() -> int:
    """Return the rank of this process in the whole job; 0 without ranks."""
    return int(torch_distributed().get_rank()) if torch_distributed() else 0


def torch_distributed() -> Any:
    """Return ``torch.distributed`` if this process has a rank in it, else None."""
    from torch import distributed

    return distributed if distributed.is_available() and distributed.is_initialized() else None


def find_group(get_coordinator: Callable[[], Any]) -> Group | None:
    """Return the ranks of an engine's group; None if this process is alone.

    ``get_coordinator`` returns a ``GroupCoordinator`` of vLLM or SGLang; None if one rank decides.
    """
    coordinator = get_coordinator() if torch_distributed() else None
    if coordinator is None:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    ranks = tuple(int(rank) for rank in coordinator.ranks)
    if len(ranks) == 1:
        return None
    # Groups of vLLM's elastic expert parallelism have a store of their own.
    elastic = getattr(coordinator, "tcp_store_group", None)
    store = _get_default_store() if elastic is None else elastic.store
    return Group(store, ranks, int(coordinator.rank_in_group))
