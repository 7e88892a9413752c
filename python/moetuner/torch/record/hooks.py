"""Hooks on a model's routers: each forward pass becomes one step of expert ids on the device."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moetuner.torch.models import MoELayer, chosen, same_sizes
from moetuner.torch.record.generation import GenerateHooks, Generation

# The new name first: transformers warns where the old one is looked up.
CACHE_NAMES = ("cache", "past_key_values")
# Where the sequences of a packed row begin and end.
PACKED = "cu_seq_lens_q"


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of one forward pass, and what the routers chose for them.

    Attributes
    ----------
    rows
        Sequences, B.
    length
        Tokens of each, padding included, S.
    keep
        Which tokens count [B*S], boolean; None if all do. In the end those are left out that are
        padding or have scores that are no numbers or ids out of range.
    cache
        The key-value cache that was passed in, or the generation that goes without, which tells a
        later step of the same sequences.
    paged
        Whether tokens of many sequences, each with a past, stand in one row.
    ids
        Chosen rows of the routers [T,L,K], int64, on the device of the first router; those from E
        on are zero-computation experts.
    output
        What the model returned.
    """

    rows: int
    length: int
    keep: Tensor | None
    cache: object | None
    paged: bool = False
    ids: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Any = None


def step_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mask: Tensor | None,
    generations: GenerateHooks,
) -> Step:
    """Read the arguments of a forward pass; ``mask`` replaces that of its arguments."""
    names = inspect.signature(model.forward).parameters
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rows, length = _sizes(model, given)
    generation = generations.of(given)
    cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
    packed = given.get(PACKED)
    if mask is None:
        mask = given.get("attention_mask")
        if generation is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            mask = generation.mask
    if isinstance(packed, Tensor) and rows == 1:
        # Sequences one after the other, and padding behind the last; the mask is of pairs.
        keep: Tensor | None = torch.arange(length, device=packed.device) < packed[-1]
    else:
        keep = None if mask is None else _tokens_of(mask, rows, length)
    if generation is not None:
        keep = _generated(keep, rows, length, cache, generation)
        cache = generation if cache is None else cache
    return Step(rows, length, keep, cache, isinstance(packed, Tensor) and cache is not None)


def cache_of(output: object) -> object | None:
    """Return the key-value cache that a model returned, if it did."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def _sizes(model: nn.Module, given: Mapping[str, Any]) -> tuple[int, int]:
    named = [given.get(name) for name in ("input_ids", "inputs_embeds")]
    for tokens in [*named, *given.values()]:
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            # A matrix of numbers is tokens by features, without a batch.
            flat = tokens.dim() == 2 and tokens.is_floating_point()
            return (1, tokens.shape[0]) if flat else (tokens.shape[0], tokens.shape[1])
    raise ValueError(
        f"{type(model).__name__} must be called with input_ids [batch, tokens] or inputs_embeds, "
        f"got {sorted(given)}"
    )


def _tokens_of(mask: object, rows: int, length: int) -> Tensor:
    """Return the last ``length`` columns of a mask: others are tokens of earlier steps."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] with a batch of {rows}, got {given}; where "
            "the model is called with another, set the recorder's attention_mask"
        )
    if mask.shape[1] < length:
        raise ValueError(
            f"attention_mask must have at least {length} tokens, got {list(mask.shape)}"
        )
    return (mask[:, mask.shape[1] - length :] != 0).reshape(-1)


def _generated(
    keep: Tensor | None, rows: int, length: int, cache: object | None, generation: Generation
) -> Tensor | None:
    """Leave out sequences that have ended and, without a cache, tokens that were there before."""
    marks = [] if keep is None else [keep]
    if cache is None and 0 < generation.repeated < length:
        columns = torch.arange(length, device=None if keep is None else keep.device)
        marks.append((columns >= generation.repeated).repeat(rows))
    ended = generation.ended
    if ended is not None and len(ended) == rows:
        marks.append(~ended.repeat_interleave(length))
    while len(marks) > 1:
        mark = marks.pop()
        marks[0] = marks[0].to(mark.device, non_blocking=True) & mark
    return marks[0] if marks else None


class StepHooks:
    """Collects the choices of all routers and hands them over after each forward pass.

    Nothing here waits for the device: sizes are known on the host, and whether a router gave NaN or
    an id out of range is kept in flags on the device until ``check`` reads them. And nothing here
    fails the model: a pass that cannot be understood, or received, is left out, counted and warned
    of once. A compiled model runs eagerly meanwhile, since hooks are not heard in compiled code.

    Parameters
    ----------
    model
        The module that is called; its forward pass is one step.
    layers
        Its MoE layers.
    receive
        Called with every step.

    Attributes
    ----------
    attention_mask
        Which tokens to keep [batch, tokens], instead of the mask that the model is called with.
    dropped
        Passes that were left out.
    fault
        What was wrong with the first of them.
    """

    def __init__(
        self, model: nn.Module, layers: tuple[MoELayer, ...], receive: Callable[[Step], None]
    ) -> None:
        self.num_experts, self.top_k = same_sizes(layers)
        self.choices = layers[0].choices
        self.attention_mask: Tensor | None = None
        self.dropped = 0
        self.fault: Exception | None = None
        # What torch.compile gives only calls the model that it was given.
        self._wrapped = hasattr(model, "_orig_mod")
        model = getattr(model, "_orig_mod", model)
        self._generations: GenerateHooks | None = None
        self._is_eager = False
        self._model = model
        self._layers = layers
        self._receive = receive
        self._handles: list[RemovableHandle] = []
        self._step: Step | None = None
        self._routed: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._dropping = False
        self._steps = 0
        self._faults: Tensor | None = None

    def attach(self) -> None:
        """Start to listen."""
        if self._wrapped or any(_is_compiled(module) for module in self._model.modules()):
            _run_eagerly()
            self._is_eager = True
        self._generations = GenerateHooks.attach(self._model)
        # Functions, which a copy of the model shares; methods would be copied with all they hold.
        self._handles = [
            self._model.register_forward_pre_hook(
                lambda model, args, kwargs: self._before_pass(model, args, kwargs), with_kwargs=True
            ),
            self._model.register_forward_hook(
                lambda model, _, output: self._after_pass(model, output)
            ),
        ]
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.router.register_forward_hook(self._listener(number)))

    def remove(self) -> None:
        """Stop to listen; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._generations is not None:
            self._generations.detach()
            self._generations = None
        if self._is_eager:
            _run_compiled()
            self._is_eager = False

    def forget(self) -> None:
        """Forget what was wrong so far."""
        self._faults = self.fault = None

    def check(self) -> None:
        """Wait for the device and check that routers gave numbers, and ids of their rows.

        Raises
        ------
        ValueError
            If one did not.
        """
        if self._faults is None:
            return
        rules = (
            ("router scores must be numbers", "NaN"),
            (f"expert ids must be from 0 to {self.choices - 1}", "others"),
        )
        for wrong, (rule, got) in zip(self._faults.tolist(), rules, strict=True):
            if any(wrong):
                number = wrong.index(True)
                name = self._layers[number].name
                raise ValueError(f"{rule}, got {got} in layer {number} ({name})")

    def _before_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model or self._generations is None:
            return
        # A pass that failed half-way has left its layers behind.
        self._routed = {}
        self._step, self._dropping = None, False
        try:
            self._step = step_of(model, args, kwargs, self.attention_mask, self._generations)
        except Exception as error:
            self._drop(error)

    def _listener(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def listen(router: nn.Module, _inputs: Any, output: Any) -> None:
            if self._dropping or router is not self._layers[number].router:
                return
            try:
                self._take(number, output)
            except Exception as error:
                self._drop(error)

        return listen

    def _after_pass(self, model: nn.Module, output: Any) -> None:
        if model is not self._model:
            return
        try:
            with torch.no_grad():
                self._end(output)
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Leave out the pass at hand; the first time say so."""
        self._step, self._dropping, self._routed = None, True, {}
        self.dropped += 1
        if self.fault is not None:
            return
        self.fault = error
        # Where warnings are errors, a warning would fail the model.
        with suppress(Warning):
            text = f"a forward pass is not recorded, nor are others like it: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _take(self, number: int, output: Any) -> None:
        """Take what a router returned."""
        step, name = self._step, self._layers[number].name
        if step is None:
            if self._steps:  # a recomputation in the backward pass chooses what was chosen before
                return
            raise ValueError(
                f"{name} ran outside a forward pass of {type(self._model).__name__}: "
                "the model given must be the module that is called"
            )
        if number in self._routed:
            raise ValueError(
                f"{name} ran more than once in a forward pass, and a token can have one choice of "
                "experts in each layer: name the routers that run once in routers=[...]"
            )
        parts = chosen(output)
        if parts is None:
            raise ValueError(
                f"{name}: a router must return expert ids [tokens, top_k] as integers, "
                f"{type(self._layers[number].router).__name__} does not"
            )
        ids, scores = (None if part is None else part.detach().flatten(0, -2) for part in parts)
        assert ids is not None  # chosen gives ids, if anything
        tokens = step.rows * step.length
        if ids.shape != (tokens, self.top_k):
            raise ValueError(
                f"{name}: expert ids must be [{tokens}, {self.top_k}], [tokens, top_k] as "
                f"the forward pass was called, got {[*parts[0].shape]}"
            )
        self._routed[number] = ids.clone(), scores  # a router may write to its ids again

    def _end(self, output: Any) -> None:
        """Hand over a pass, without the tokens whose ids or scores are wrong."""
        step, self._step = self._step, None
        if step is None:
            return
        missing = [n for n in range(len(self._layers)) if n not in self._routed]
        if missing:
            raise ValueError(
                f"every router must run in a forward pass, {self._layers[missing[0]].name} did not "
                "(what torch.compile or a CUDA graph runs is not heard: give the compiled model)"
            )
        self._steps += 1
        routed = [self._routed[number] for number in range(len(self._layers))]
        self._routed = {}
        device = routed[0][0].device
        ids = torch.stack(
            [of.to(device, torch.int64, non_blocking=True) for of, _ in routed], dim=1
        )
        # Where a router gives no scores, its ids stand in: they are never NaN.
        scores = torch.stack(
            [(of if by is None else by).to(device, non_blocking=True) for of, by in routed], dim=1
        )
        # Ids are checked before they become one or two bytes, in which they would be others.
        outside = (ids < 0) | (ids >= self.choices)
        faults = torch.stack([scores.isnan().any(-1), outside.any(-1)])
        keep = torch.ones_like(faults[0, :, 0])
        if step.keep is not None:
            keep = step.keep.to(device, non_blocking=True)
        faults = faults & keep[:, None]
        wrong = faults.any(1)
        self._faults = wrong if self._faults is None else self._faults.to(device) | wrong
        keep = keep & ~faults.any(0).any(-1)
        self._receive(replace(step, ids=ids, keep=keep, output=output))


# Observers of compiled models: while there is one, compiled code runs eagerly in the whole process.
_eager: list[Any] = []


def _run_eagerly() -> None:
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError(
            "model must not be compiled by this version of torch: give the model without "
            "torch.compile"
        )
    # The first one has the stance; the last one to leave ends it, in whatever order they do.
    _eager.append(torch.compiler.set_stance("force_eager") if not _eager else _eager[0])


def _run_compiled() -> None:
    stance = _eager.pop()
    if not _eager:
        stance.__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
