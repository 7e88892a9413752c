"""Hooks on a model's routers: each forward pass becomes one step of expert ids on the device.

Further hooks record what ``generate`` of transformers does not pass on to the model.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from moetuner.torch.models import MoELayer, find_choices, same_sizes

TOKEN_NAMES = ("input_ids", "inputs_embeds")
# The new name first: transformers warns where the old one is looked up.
CACHE_NAMES = ("cache", "past_key_values")
# Argument with the begins and ends of the sequences of a packed row.
PACKED = "cu_seq_lens_q"


@dataclass(eq=False)
class Generation:
    """One call of ``generate``.

    ``mask`` [B,S] is the padding of the tokens so far, where there is any: a pass may get it in
    another shape. ``ended`` [B] are the sequences that have ended, on the device: they are fed on
    until the last one ends. The pass before had ``repeated`` tokens of each sequence, which a pass
    without a cache repeats; the next one is recognised by its ``tokens``, of this ``length``.
    """

    mask: Tensor | None = None
    ended: Tensor | None = None
    repeated: int = 0
    length: int = 0
    tokens: Callable[[], Tensor | None] = lambda: None


class Generations:
    """The running calls of ``generate`` of a model, for all recorders of the model.

    No argument of ``generate`` shows which sequences its criteria have ended, and none has the
    padding if a pass gets a mask of pairs. So two methods that it calls are wrapped: the one that
    makes the criteria, and ``prepare_inputs_for_generation``.
    """

    def __init__(self) -> None:
        self.users = 0
        # Weak references: objects of generate are gone when it returns.
        self._calls: list[Callable[[], Generation | None]] = []

    def find(self, arguments: Mapping[str, Any]) -> Generation | None:
        """Return the call that prepared the arguments of a forward pass; None if none did."""
        generation = self._innermost()
        tokens = None if generation is None else generation.tokens()
        same = tokens is not None and any(arguments.get(name) is tokens for name in TOKEN_NAMES)
        return generation if same else None

    def _innermost(self) -> Generation | None:
        while self._calls and self._calls[-1]() is None:
            self._calls.pop()
        return self._calls[-1]() if self._calls else None

    def begin(self, criteria: Any, arguments: Mapping[str, Any]) -> Any:
        """Return the stopping criteria of a new call, which report the sequences that they end."""
        generation = Generation()
        self._calls.append(ref(generation))
        # A pass that generate compiles for a static cache would run past the hooks.
        if (config := arguments.get("generation_config")) is not None:
            config.disable_compile = True
        kind: Any = type(criteria)

        class Watched(kind):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                done = super().__call__(*args, **kwargs)
                before, ended = generation.ended, done.bool()
                # Those of another size are of beams.
                same = before is not None and before.shape == ended.shape
                generation.ended = before | ended if same else ended
                return done

        return Watched(criteria)

    def prepare(self, inputs: Any, arguments: Mapping[str, Any]) -> Any:
        """Remember the inputs of the next pass, and return them."""
        if (generation := self._innermost()) is not None:
            tokens = next(
                (inputs[name] for name in TOKEN_NAMES if inputs.get(name) is not None), None
            )
            mask = arguments.get("attention_mask")
            generation.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            generation.repeated = generation.length
            generation.length = 0 if tokens is None else tokens.shape[1]
            generation.tokens = (lambda: None) if tokens is None else ref(tokens)
        return inputs


_running: WeakKeyDictionary[nn.Module, Generations] = WeakKeyDictionary()


@contextmanager
def listen_to_generate(model: nn.Module) -> Iterator[Generations]:
    """Wrap the methods of ``generate``, once per model, until the last user has left."""
    calls = _running.setdefault(model, Generations())
    calls.users += 1
    if calls.users == 1:
        _listen(model, "_get_stopping_criteria", calls.begin)
        _listen(model, "prepare_inputs_for_generation", calls.prepare)
    try:
        yield calls
    finally:
        calls.users -= 1
        if not calls.users:
            _running.pop(model, None)  # gone already, where the model is collected
            for name in ("_get_stopping_criteria", "prepare_inputs_for_generation"):
                wrapper = model.__dict__.pop(name, None)
                if (method := getattr(wrapper, "wrapped", None)) is not None:
                    model.__dict__[name] = method


def _listen(model: nn.Module, name: str, change: Callable[[Any, Mapping[str, Any]], Any]) -> None:
    """Pass the results of a method through ``change``; the method of a copy stays as it is."""
    method, model_of = getattr(model, name, None), ref(model)
    if method is None:
        return
    function = getattr(method, "__func__", None)

    @functools.wraps(method)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs) if function is None else function(model, *args, **kwargs)
        return change(result, kwargs) if model is model_of() else result

    call.wrapped = model.__dict__.get(name)  # type: ignore[attr-defined]
    model.__dict__[name] = MethodType(call, model)


@dataclass(eq=False)
class Step:
    """The tokens of one forward pass, and the routers' choices for them.

    It has ``rows`` sequences, B, of ``length`` tokens, S, padding included, and is ``paged`` if
    tokens of many sequences, each with a past, stand in one row. ``marks`` [B*S] say which tokens
    count: those of all marks. A key-value cache marks a later step of the same sequences: ``cache``
    was passed in, or is the generation that goes without one, ``following`` was returned.

    ``ids`` [B*S,L,K] are the chosen rows of the routers, int64 on the device of the first router;
    those from E on are zero-computation experts. ``keep`` [B*S] are the tokens that count, without
    those that have scores that are no numbers, or ids out of range.
    """

    rows: int
    length: int
    marks: list[Tensor]
    cache: object | None
    paged: bool
    following: object | None = field(init=False)
    ids: Tensor = field(init=False)
    keep: Tensor = field(init=False)


def read_step(
    model: nn.Module,
    arguments: Mapping[str, Any],
    mask: object | None,
    generation: Generation | None,
) -> Step:
    """Read the arguments of a forward pass; ``mask`` replaces that of its arguments."""
    tokens = _tokens(model, arguments)
    rows, length = tokens.shape[:2]
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    packed, column, marks = arguments.get(PACKED), torch.arange(length, device=tokens.device), []
    if mask is None:
        mask = arguments.get("attention_mask")
        if generation is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = generation.mask
    if isinstance(packed, Tensor) and rows == 1:
        # Sequences one after the other, and padding behind the last; the mask is of pairs.
        marks = [column < packed[-1]]
    elif mask is not None:
        marks = [_marked(mask, rows, length)]
    paged = isinstance(packed, Tensor) and cache is not None
    if generation is not None:
        if cache is None and 0 < generation.repeated < length:
            marks.append((column >= generation.repeated).repeat(rows))
        if generation.ended is not None and len(generation.ended) == rows:
            marks.append(~generation.ended.repeat_interleave(length))
        cache = generation if cache is None else cache
    return Step(rows, length, marks, cache, paged)


def _tokens(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Return the argument that holds the tokens [B,S,..]."""
    for tokens in [*(arguments.get(name) for name in TOKEN_NAMES), *arguments.values()]:
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            # A matrix of numbers is tokens by features, without a batch.
            return tokens[None] if tokens.dim() == 2 and tokens.is_floating_point() else tokens
    rule = f"{type(model).__name__} must be called with input_ids [batch, tokens] or inputs_embeds"
    raise ValueError(f"{rule}, got {sorted(arguments)}")


def _marked(mask: object, rows: int, length: int) -> Tensor:
    """Return the last ``length`` columns of a mask; the others are for tokens of earlier steps."""
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
    """Collects the choices of all routers and hands a step to ``receive`` after each forward pass.

    Nothing here waits for the device: sizes are known on the host, and whether a router gave NaN or
    an id out of range is kept in flags on the device until ``check`` reads them. And nothing here
    fails the model: a pass that cannot be understood, or received, is left out, counted as
    ``dropped``, and the first one warned of and kept as ``fault``. A compiled model runs eagerly
    meanwhile, since hooks are not heard in compiled code. ``mask`` gives which tokens to keep
    [batch, tokens], instead of the mask that the model is given.
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
        self._describing = _describing(self._model, layers)
        self._attached, self._generations = ExitStack(), Generations()
        self._step: Step | None = None  # the pass at hand, if it is recorded
        self._routed: dict[int, tuple[Tensor, Tensor]] = {}
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
            begin, end = self._safe(model, self._begin), self._safe(model, self._end)
            handles = [model.register_forward_pre_hook(begin, with_kwargs=True)]
            for module in self._describing:
                take_in = self._safe(module, functools.partial(self._describe, module))
                handles.append(module.register_forward_pre_hook(take_in, with_kwargs=True))
            handles.append(model.register_forward_hook(end))
            for number, layer in enumerate(self._layers):
                take = self._safe(layer.router, functools.partial(self._take, number))
                handles.append(layer.router.register_forward_hook(take))
            for handle in handles:
                attached.callback(handle.remove)
            self._attached = attached.pop_all()

    def remove(self) -> None:
        """Remove the hooks; the model is as it was before."""
        self._attached.close()

    def _safe(self, module: nn.Module, call: Callable[[Any, Any], None]) -> Callable[..., None]:
        """Return a hook of one module, not of its copies, that never fails it.

        It is a function, which a copy of the model shares; a method would be copied with all that
        it holds.
        """

        def hook(called: nn.Module, inputs: Any, more: Any) -> None:
            if called is module:
                try:
                    with torch.no_grad():
                        call(inputs, more)
                except Exception as error:
                    self._drop(error)

        return hook

    def forget(self) -> None:
        """Forget the faults so far."""
        self._faults = self.fault = None

    def check(self) -> None:
        """Wait for the device; raise if a router gave NaN, or ids out of range."""
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
        # One that failed half-way has left its layers behind.
        self._routed, self._step, self._is_dropped, self._is_running = {}, None, False, True
        if not self._describing:
            self._describe(self._model, args, kwargs)

    def _describe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of the model, or of the first module in it that names them."""
        if self._is_running and self._step is None and not self._is_dropped:
            arguments = {**dict(zip(_arguments_of(module), args, strict=False)), **kwargs}
            self._step = read_step(
                module, arguments, self._mask(), self._generations.find(arguments)
            )

    def _take(self, number: int, _inputs: Any, output: Any) -> None:
        """Take the output of a router."""
        step, layer = self._step, self._layers[number]
        if step is None:
            # A recomputation in the backward pass chooses what was chosen before.
            if self._is_dropped or self._has_recorded:
                return
            text = f"{layer.name} ran outside a forward pass of {type(self._model).__name__}"
            raise ValueError(f"{text}: the model given must be the module that is called")
        if number in self._routed:
            raise ValueError(
                f"{layer.name} ran more than once in a forward pass, and a token can have one "
                "choice of experts in each layer: name the routers that run once in routers=[...]"
            )
        parts = find_choices(output)
        if parts is None:
            rule = "a router must return expert ids [tokens, top_k] as integers"
            raise ValueError(f"{layer.name}: {rule}, {type(layer.router).__name__} does not")
        ids, scores = (part.detach().flatten(0, -2) for part in parts)
        tokens = step.rows * step.length
        if ids.shape != (tokens, self.top_k):
            rule = f"[{tokens}, {self.top_k}], [tokens, top_k] as the forward pass was called"
            raise ValueError(f"{layer.name}: expert ids must be {rule}, got {[*parts[0].shape]}")
        self._routed[number] = ids.clone(), scores  # a router may write to its ids again

    def _end(self, _inputs: Any, output: Any) -> None:
        """Hand over a pass, without the tokens whose ids or scores are wrong."""
        step, self._step, self._is_running = self._step, None, False
        if self._is_dropped:
            return
        missing = [layer.name for n, layer in enumerate(self._layers) if n not in self._routed]
        if step is None or missing:
            raise ValueError(
                f"every router must run in a forward pass, {missing[0]} did not "
                "(what torch.compile or a CUDA graph runs is not heard: give the compiled model)"
            )
        self._has_recorded = True
        routed = [self._routed.pop(number) for number in range(len(self._layers))]
        device = routed[0][0].device
        columns = zip(*routed, strict=True)
        parts = [[part.to(device, non_blocking=True) for part in column] for column in columns]
        ids, scores = (torch.stack(part, dim=1) for part in parts)
        ids = ids.long()
        # Ids are checked before they become one or two bytes, in which they would be others.
        outside = (ids < 0) | (ids >= self.choices)
        faults = torch.stack([scores.isnan().any(-1), outside.any(-1)])
        keep = torch.ones_like(faults[0, :, 0])
        for mark in step.marks:
            keep &= mark.to(device, non_blocking=True)
        faults &= keep[:, None]
        wrong = faults.any(1)
        self._faults = wrong if self._faults is None else self._faults.to(device) | wrong
        step.ids, step.keep = ids, keep & ~faults.any(0).any(-1)
        made = (getattr(output, name) for name in CACHE_NAMES if hasattr(output, name))
        step.following = next(made, None)
        self._receive(step)


def _describing(model: nn.Module, layers: tuple[MoELayer, ...]) -> list[nn.Module]:
    """Return the modules that are called with tokens and their mask by name; none if the model is.

    A wrapper (DistributedDataParallel, one of PEFT, one's own) has other names for its arguments,
    or none; what is in it and has all routers in it tells. That may be called past its hooks, then
    the next one in it tells.
    """
    way, routers = [model], {layer.router for layer in layers}
    while True:
        inner = [child for child in way[-1].children() if routers <= set(child.modules()) - {child}]
        if len(inner) != 1:
            break
        way += inner

    def tells(module: nn.Module) -> int:
        parameters = _arguments_of(module)
        kinds = [parameter.kind for parameter in parameters.values()]
        has_tokens = not parameters.keys().isdisjoint(TOKEN_NAMES)
        named = inspect.Parameter.VAR_POSITIONAL not in kinds
        return 4 * ("attention_mask" in parameters) + 2 * has_tokens + named

    highest = max(map(tells, way))
    return [] if tells(model) == highest else [module for module in way if tells(module) == highest]


def _arguments_of(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


# The stance of those who record compiled models, which then run eagerly in the whole process.
_eager: list[Any] = []


@contextmanager
def _running_eagerly() -> Iterator[None]:
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError("model must not be compiled by this version of torch: give its original")
    # The first one has the stance; the last one to leave ends it, in whatever order they do.
    _eager.append(_eager[0] if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        stance = _eager.pop()
        if not _eager:
            stance.__exit__(None, None, None)
