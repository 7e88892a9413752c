"""Hooks on a model's routers: each forward pass becomes one step of expert ids on the device."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moetuner.torch.models import MoELayer, find_choices, same_sizes
from moetuner.torch.record.generate import (
    TOKEN_NAMES,
    Generation,
    Generations,
    listen_to_generate,
)

# The new name first: transformers warns where the old one is looked up.
CACHE_NAMES = ("cache", "past_key_values")
# Argument with the begins and ends of the sequences of a packed row.
PACKED = "cu_seq_lens_q"


@dataclass(eq=False)
class Step:
    """The tokens of one forward pass, and the routers' choices for them.

    Parameters
    ----------
    rows, length
        Number of sequences, B, and tokens of each, S, padding included.
    masks
        Which tokens count [B*S]: those that all masks mark.
    cache
        Key-value cache that was passed in, or the generation that goes without one. A later step
        with the same cache is of the same sequences.
    paged
        Whether tokens of many sequences, each with earlier tokens in the cache, are in one row.
    following
        Key-value cache that the model returned.
    ids
        Chosen rows of the routers [B*S,L,K], int64 on the device of the first router; those from E
        on are zero-computation experts.
    is_counted
        Which tokens count [B*S], without those with scores that are NaN, or ids out of range.
    """

    rows: int
    length: int
    masks: list[Tensor]
    cache: object | None
    paged: bool
    following: object | None = field(init=False)
    ids: Tensor = field(init=False)
    is_counted: Tensor = field(init=False)


def read_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    mask: object | None,
    generation: Generation | None,
) -> Step:
    """Return the step of a forward pass; ``mask`` replaces the mask among its arguments."""
    tokens = _find_tokens(model, arguments)
    rows, length = tokens.shape[:2]
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    packed, column, masks = arguments.get(PACKED), torch.arange(length, device=tokens.device), []
    if mask is None:
        mask = arguments.get("attention_mask")
        if generation is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = generation.mask
    if isinstance(packed, Tensor) and rows == 1:
        # Sequences one after the other, and padding behind the last; the mask is of pairs.
        masks = [column < packed[-1]]
    elif mask is not None:
        masks = [_read_mask(mask, rows, length)]
    paged = isinstance(packed, Tensor) and cache is not None
    if generation is not None:
        if cache is None and 0 < generation.repeated < length:
            masks.append((column >= generation.repeated).repeat(rows))
        if generation.ended is not None and len(generation.ended) == rows:
            masks.append(~generation.ended.repeat_interleave(length))
        cache = generation if cache is None else cache
    return Step(rows, length, masks, cache, paged)


def _find_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Return the argument that holds the tokens [B,S,..]."""
    for tokens in [*(arguments.get(name) for name in TOKEN_NAMES), *arguments.values()]:
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            # A matrix of numbers is tokens by features, without a batch.
            return tokens[None] if tokens.dim() == 2 and tokens.is_floating_point() else tokens
    rule = f"{type(model).__name__} must be called with input_ids [batch, tokens] or inputs_embeds"
    raise ValueError(f"{rule}, got {sorted(arguments)}")


def _read_mask(mask: object, rows: int, length: int) -> Tensor:
    """Return which tokens of a step a mask marks [B*S]; its first columns are for earlier steps."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] with a batch of {rows}, got {shape}; where "
            "the model is called with another, set the recorder's attention_mask"
        )
    if mask.shape[1] < length:
        shape = list(mask.shape)
        raise ValueError(f"attention_mask must have at least {length} tokens, got {shape}")
    return (mask[:, mask.shape[1] - length :] != 0).reshape(-1)


class StepHooks:
    """Hooks that pass a step with the choices of all routers to ``receive`` after a forward pass.

    The hooks never wait for the device: sizes are known on the host, and flags on the device say
    whether a router gave NaN or an id out of range, until ``check`` reads them. They never make the
    model fail: a pass that cannot be read or received is left out and counted in ``dropped``; the
    first one is warned of, and its error is ``fault``. A compiled model runs eagerly meanwhile,
    since compiled code calls no hooks. ``mask`` returns which tokens count [batch, tokens], instead
    of the mask that the model is called with; None if there is no other.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[MoELayer, ...],
        receive: Callable[[Step], None],
        mask: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.num_experts, self.top_k = same_sizes(layers)
        self.choices = layers[0].choices
        self.dropped = 0
        self.fault: Exception | None = None
        # What torch.compile gives only calls the model that it was given.
        self._called, self._model = model, getattr(model, "_orig_mod", model)
        self._layers, self._receive, self._mask = layers, receive, mask
        self._modules_with_names = _find_modules_with_names(self._model, layers)
        self._attached, self._generations = ExitStack(), Generations()
        self._step: Step | None = None  # the pass at hand, if it is recorded
        self._outputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_running = self._is_dropped = self._has_recorded = False
        self._faults: Tensor | None = None

    def attach(self) -> None:
        """Register the hooks."""
        model = self._model
        with ExitStack() as attached:
            compiled = [hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()]
            if self._called is not model or any(compiled):
                attached.enter_context(_running_eagerly())
            self._generations = attached.enter_context(listen_to_generate(model))
            begin, end = self._make_hook(model, self._begin), self._make_hook(model, self._end)
            handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
            for module in self._modules_with_names:
                read = self._make_hook(module, functools.partial(self._read_arguments, module))
                handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
            handles.append(model.register_forward_hook(end))
            for number, layer in enumerate(self._layers):
                store = functools.partial(self._store_choices, number)
                hook = self._make_hook(layer.router, store)
                handles.append(layer.router.register_forward_hook(hook))
            for handle in handles:
                attached.callback(handle.remove)
            self._attached = attached.pop_all()

    def remove(self) -> None:
        """Remove the hooks; the model is as it was before."""
        self._attached.close()

    def _make_hook(
        self, module: nn.Module, call: Callable[[Any, Any], None]
    ) -> Callable[..., None]:
        """Return a hook of one module, not of its copies, whose errors drop the pass.

        It is a function, which a copy of the model shares; a method would be copied together with
        this object.
        """

        def hook(called: nn.Module, inputs: Any, kwargs_or_output: Any) -> None:
            if called is module:
                try:
                    with torch.no_grad():
                        call(inputs, kwargs_or_output)
                except Exception as error:
                    self._drop(error)

        return hook

    def forget(self) -> None:
        """Forget the faults so far."""
        self._faults = self.fault = None

    def check(self) -> None:
        """Raise if a router gave NaN, or ids out of range; this waits for the device."""
        ids = f"expert ids must be from 0 to {self.choices - 1}, got others"
        rules = "router scores must be numbers, got NaN", ids
        faults = [] if self._faults is None else self._faults.nonzero().tolist()
        for rule, layer in faults[:1]:
            raise ValueError(f"{rules[rule]} in layer {layer} ({self._layers[layer].name})")

    def _drop(self, error: Exception) -> None:
        """Leave out the current pass; warn the first time."""
        self._step, self._is_dropped = None, True
        self.dropped += 1
        if self.fault is not None:
            return
        self.fault = error
        # Where warnings are errors, a warning would fail the model.
        with suppress(Warning):
            text = f"a forward pass is not recorded, nor are others like it: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass, and read the model's arguments if it names them."""
        # A pass that failed half-way has left the outputs of its first layers.
        self._outputs, self._step, self._is_dropped, self._is_running = {}, None, False, True
        if not self._modules_with_names:
            self._read_arguments(self._model, args, kwargs)

    def _read_arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Read the arguments of the model, or of the first module in it that names them."""
        if self._is_running and self._step is None and not self._is_dropped:
            arguments = {**dict(zip(_arguments_of(module), args, strict=False)), **kwargs}
            self._step = read_step(
                module, arguments, self._mask(), self._generations.find(arguments)
            )

    def _store_choices(self, number: int, _inputs: Any, output: Any) -> None:
        """Store the expert ids and scores that a router has returned."""
        step, layer = self._step, self._layers[number]
        if step is None:
            # A recomputation in the backward pass chooses what was chosen before.
            if self._is_dropped or self._has_recorded:
                return
            text = f"{layer.name} ran outside a forward pass of {type(self._model).__name__}"
            raise ValueError(f"{text}: the model given must be the module that is called")
        if number in self._outputs:
            raise ValueError(
                f"{layer.name} ran more than once in a forward pass, and a token can have one "
                "choice of experts in each layer: name the routers that run once in routers=[...]"
            )
        choices = find_choices(output)
        if choices is None:
            rule = "a router must return expert ids [tokens, top_k] as integers"
            raise ValueError(f"{layer.name}: {rule}, {type(layer.router).__name__} does not")
        ids, scores = (table.detach().flatten(0, -2) for table in choices)
        tokens = step.rows * step.length
        if ids.shape != (tokens, self.top_k):
            rule = f"[{tokens}, {self.top_k}], [tokens, top_k] as the forward pass was called"
            raise ValueError(f"{layer.name}: expert ids must be {rule}, got {[*choices[0].shape]}")
        self._outputs[number] = ids.clone(), scores  # a router may write to its ids again

    def _end(self, _inputs: Any, output: Any) -> None:
        """Pass a step to ``receive``, without the tokens whose ids or scores are wrong."""
        step, self._step, self._is_running = self._step, None, False
        if self._is_dropped:
            return
        missing = [layer.name for n, layer in enumerate(self._layers) if n not in self._outputs]
        if step is None or missing:
            raise ValueError(
                f"every router must run in a forward pass, {missing[0]} did not "
                "(what torch.compile or a CUDA graph runs is not heard: give the compiled model)"
            )
        self._has_recorded = True
        outputs = [self._outputs.pop(number) for number in range(len(self._layers))]
        device = outputs[0][0].device
        columns = zip(*outputs, strict=True)
        ids, scores = (
            torch.stack([table.to(device, non_blocking=True) for table in column], dim=1)
            for column in columns
        )
        ids = ids.long()
        # Ids are checked before they become one or two bytes, in which they would be others.
        outside = (ids < 0) | (ids >= self.choices)
        faults = torch.stack([scores.isnan().any(-1), outside.any(-1)])
        is_counted = torch.ones_like(faults[0, :, 0])
        for mask in step.masks:
            is_counted &= mask.to(device, non_blocking=True)
        faults &= is_counted[:, None]
        wrong = faults.any(1)
        self._faults = wrong if self._faults is None else self._faults.to(device) | wrong
        step.ids, step.is_counted = ids, is_counted & ~faults.any(0).any(-1)
        caches = (getattr(output, name) for name in CACHE_NAMES if hasattr(output, name))
        step.following = next(caches, None)
        self._receive(step)


def _find_modules_with_names(model: nn.Module, layers: tuple[MoELayer, ...]) -> list[nn.Module]:
    """Return the modules that are called with tokens and their mask by name; none if the model is.

    A wrapper (of DistributedDataParallel, of PEFT, of a user) names its arguments otherwise, or not
    at all; the module in it that holds all routers names them. That may be called without its
    hooks; then the next module in it names them.
    """
    nested, routers = [model], {layer.router for layer in layers}
    while True:
        children = nested[-1].children()
        inner = [child for child in children if routers <= set(child.modules()) - {child}]
        if len(inner) != 1:
            break
        nested += inner

    def rank_names(module: nn.Module) -> int:
        parameters = _arguments_of(module)
        kinds = [parameter.kind for parameter in parameters.values()]
        has_tokens = not parameters.keys().isdisjoint(TOKEN_NAMES)
        has_names = inspect.Parameter.VAR_POSITIONAL not in kinds
        return 4 * ("attention_mask" in parameters) + 2 * has_tokens + has_names

    ranks = [rank_names(module) for module in nested]
    if ranks[0] == max(ranks):
        return []
    return [module for module, rank in zip(nested, ranks, strict=True) if rank == max(ranks)]


def _arguments_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


# The stance of torch.compile, once for each recorder of a compiled model: all models of the
# process run eagerly meanwhile.
_stances: list[Any] = []


@contextmanager
def _running_eagerly() -> Iterator[None]:
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError("model must not be compiled by this version of torch: give its original")
    # The first one has the stance; the last one to leave ends it, in whatever order they do.
    _stances.append(_stances[0] if _stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        stance = _stances.pop()
        if not _stances:
            stance.__exit__(None, None, None)
