"""Weights that a module keeps outside its parameters and buffers, where nothing can move them.

Quantisers do so: MXFP4 sets tensors of Triton as attributes, others dictionaries of scales, tensor
subclasses that hold tensors, or attributes of the parameters themselves.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What every module has, and what accelerate adds to one whose weights it loads when they are used.
# What torch.distributed adds begins with two underscores.
OWN = {*vars(nn.Module()), "_hf_hook", "_old_forward"}
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    type,
    str,
    bytes,
    int,
    float,
)
DEEPEST = 8


class Registered:
    """What a model knows of itself: its modules, and the memory of its parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module) for module in model.modules()}
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors = {id(tensor) for tensor in tensors}
        self.memory = {_memory(tensor) for tensor in tensors} - {None}

    def outside(self, module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of what a module keeps outside, not what is in its children."""
        seen: set[int] = set()
        for name, value in vars(module).items():
            if name not in OWN and not name.startswith("__"):
                yield from self._within(name, value, seen)
        own = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in own:
            for inner, value in vars(tensor).items() if tensor is not None else ():
                yield from self._within(f"{name}.{inner}", value, seen)

    def _within(
        self, name: str, value: Any, seen: set[int], depth: int = 0
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors that a value has in it."""
        if id(value) in seen or isinstance(value, FUNCTIONS) or depth > DEEPEST:
            return
        seen.add(id(value))
        parts: Any = ()
        kind = type(value)
        if isinstance(value, Tensor):
            known = id(value) in self.tensors or _memory(value) in self.memory
            if not known and value.numel() > 1:
                yield name, tuple(value.shape)
        elif isinstance(value, np.ndarray):
            if value.size > 1:
                yield name, value.shape
        elif isinstance(value, torch.ScriptObject):
            yield name, ()
        elif str(kind.__module__).startswith("torch.distributed"):
            return  # meshes of ranks, and what shards a module
        elif isinstance(value, nn.Module):
            if id(value) not in self.modules:
                parts = value.state_dict(keep_vars=True).items()
        elif isinstance(value, Mapping):
            parts = value.items()
        elif isinstance(value, list | tuple | set | frozenset):
            parts = enumerate(value)
        else:
            slots = [slot for cls in kind.__mro__ for slot in getattr(cls, "__slots__", ())]
            held = {slot: getattr(value, slot, None) for slot in slots if isinstance(slot, str)}
            parts = {**held, **getattr(value, "__dict__", {})}.items()
        for inner, part in list(parts):
            yield from self._within(f"{name}.{inner}", part, seen, depth + 1)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own, in which its elements are as it shows them."""

    def function_of(kind: Any) -> Any:
        return getattr(kind.__torch_function__, "__func__", kind.__torch_function__)

    kind: Any = type(tensor)
    dispatches = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not dispatches and function_of(kind) in (function_of(Tensor), function_of(nn.Parameter))


def has_memory(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor lie in memory with strides."""
    return is_plain(tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _memory(tensor: Tensor) -> tuple[str, int] | None:
    """Return where the memory of a tensor begins."""
    if not has_memory(tensor) or not tensor.numel():
        return None
    return str(tensor.device), tensor.untyped_storage().data_ptr()
