"""Find weights that a module keeps outside its parameters and buffers, where nothing moves them.

Quantisers do so: MXFP4 sets Triton's tensors as attributes, others set dictionaries of scales,
tensor subclasses that hold tensors, or attributes of the parameters.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes of every module, and those of accelerate for modules whose weights it loads on use.
# Attributes of torch.distributed begin with two underscores.
USUAL_ATTRIBUTES = {*vars(nn.Module()), "_hf_hook", "_old_forward"}
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
    """The modules of a model, and the memory of its parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {id(module) for module in model.modules()}
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors = {id(tensor) for tensor in tensors}
        self.memory = {_memory(tensor) for tensor in tensors} - {None}

    def outside(self, module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of a module's tensors outside, without those of its children."""
        seen: set[int] = set()
        for name, value in vars(module).items():
            if name not in USUAL_ATTRIBUTES and not name.startswith("__"):
                yield from self._within(name, value, seen)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            for inner, value in vars(tensor).items() if tensor is not None else ():
                yield from self._within(f"{name}.{inner}", value, seen)

    def _within(
        self, name: str, value: Any, seen: set[int], depth: int = 0
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors in a value, and in the values within it."""
        if id(value) in seen or isinstance(value, FUNCTIONS) or depth > DEEPEST:
            return
        seen.add(id(value))
        parts: Any = ()
        kind = type(value)
        if isinstance(value, Tensor):
            is_registered = id(value) in self.tensors or _memory(value) in self.memory
            if not is_registered and value.numel() > 1:
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
            attributes = {s: getattr(value, s, None) for s in slots if isinstance(s, str)}
            parts = {**attributes, **getattr(value, "__dict__", {})}.items()
        for inner, member in list(parts):
            yield from self._within(f"{name}.{inner}", member, seen, depth + 1)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's own memory has its elements as it shows them."""

    def function_of(kind: Any) -> Any:
        return getattr(kind.__torch_function__, "__func__", kind.__torch_function__)

    kind: Any = type(tensor)
    dispatches = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return not dispatches and function_of(kind) in (function_of(Tensor), function_of(nn.Parameter))


def has_memory(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor lie in memory with strides."""
    return is_plain(tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _memory(tensor: Tensor) -> tuple[str, int] | None:
    """Return device and address of a tensor's memory; None without memory."""
    if not has_memory(tensor) or not tensor.numel():
        return None
    return str(tensor.device), tensor.untyped_storage().data_ptr()
