"""Hooks on a model's routers: each forward pass becomes one step of expert ids on the device."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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
class Batch:
    """The tokens of one forward pass.

    Attributes
    ----------
    rows
        Sequences, B.
    length
        Tokens of each, padding included, S.
    keep
        Which tokens are not padding [B*S], boolean, on the device of the mask; None if all are.
    cache
        The key-value cache that was passed in, or the generation that goes without, which tells a
        later step of the same sequences.
    paged
        Whether tokens of many sequences, each with a past, stand in one row.
    """

    rows: int
    length: int
    keep: Tensor | None
    cache: object | None
    paged: bool = False

    @property
    def tokens(self) -> int:
        """Tokens with padding, T = B*S."""
        return self.rows * self.length


def arguments_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``model.forward`` by name."""
    names = inspect.signature(model.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def batch_of(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mask: Tensor | None = None,
    generations: GenerateHooks | None = None,
) -> Batch:
    """Read the arguments of a forward pass; ``mask`` replaces that of its arguments."""
    given = arguments_of(model, args, kwargs)
    rows, length = _sizes(model, given)
    generation = generations.of(given) if generations is not None else None
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
        keep = None if mask is None else _kept(mask, rows, length)
    if generation is not None:
        keep = _generated(keep, rows, length, cache, generation)
        cache = generation if cache is None else cache
    return Batch(rows, length, keep, cache, isinstance(packed, Tensor) and cache is not None)


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


def _kept(mask: object, rows: int, length: int) -> Tensor:
    """Return the last ``length`` columns of a mask: others are tokens of earlier steps."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, tokens] with a batch of {rows}, got {found}; where "
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
    if cache is None:
        first, generation.seen = generation.seen, length
        if 0 < first < length:
            new = (torch.arange(length) >= first).repeat(rows)
            keep = new if keep is None else keep & new.to(keep.device)
    ended = generation.ended
    if ended is not None and len(ended) == rows:
        goes_on = ~ended.repeat_interleave(length)
        keep = goes_on if keep is None else keep.to(goes_on.device) & goes_on
    return keep


@dataclass(frozen=True, eq=False)
class Step:
    """What the routers chose in one forward pass.

    Attributes
    ----------
    ids
        Expert ids [T,L,K], uint8 or uint16, on the device; overwritten by the next step.
    batch
        The tokens; those of padding, and those with scores that are no numbers, have ids as well.
    output
        What the model returned.
    """

    ids: Tensor
    batch: Batch
    output: Any


@dataclass(frozen=True, eq=False)
class _Room:
    """Where the routers of a step write [T,L,K]; scores stay zero where a router gives none."""

    ids: Tensor
    scores: Tensor


class StepHooks:
    """Collects the choices of all routers and hands them over after each forward pass.

    Nothing here waits for the device: sizes are known on the host, and whether a router gave NaN is
    kept in a flag on the device until ``check_scores`` asks for it. And nothing here fails the
    model: a pass that cannot be understood, or received, is left out, counted and told of once. A
    compiled model runs eagerly meanwhile, since hooks are not heard in compiled code.

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
        self.attention_mask: Tensor | None = None
        self.dropped = 0
        self.fault: Exception | None = None
        # What torch.compile gives only calls the model that it was given.
        self._wrapped = hasattr(model, "_orig_mod")
        model = getattr(model, "_orig_mod", model)
        self._generations = GenerateHooks(model)
        self._stance: _Eagerly | None = None
        self._model = model
        self._layers = layers
        self._receive = receive
        self._handles: list[RemovableHandle] = []
        self._batch: Batch | None = None
        self._seen: set[int] = set()
        self._dropping = False
        self._steps = 0
        self._room: _Room | None = None
        self._nan: Tensor | None = None

    def attach(self) -> None:
        """Start to listen."""
        if self._wrapped or any(_is_compiled(module) for module in self._model.modules()):
            self._stance = _Eagerly()
        self._generations.attach()
        self._handles = [
            self._model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            self._model.register_forward_hook(self._after_pass),
        ]
        for number, layer in enumerate(self._layers):
            self._handles.append(layer.router.register_forward_hook(self._listener(number)))

    def remove(self) -> None:
        """Stop to listen; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._generations.remove()
        if self._stance is not None:
            self._stance.leave()
            self._stance = None

    def forget(self) -> None:
        """Forget which routers gave NaN."""
        if self._nan is not None:
            self._nan.zero_()

    def check_scores(self) -> None:
        """Wait for the device and look whether all routers gave numbers."""
        if self._nan is not None and (wrong := self._nan.nonzero()).numel():
            number = int(wrong[0])
            raise ValueError(
                f"router scores must be numbers, got NaN in layer {number} "
                f"({self._layers[number].name})"
            )

    def _before_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A pass that failed half-way has left its layers behind.
        self._seen.clear()
        self._batch, self._dropping = None, False
        try:
            self._batch = batch_of(
                self._model, args, kwargs, self.attention_mask, self._generations
            )
        except Exception as error:
            self._drop(error)

    def _listener(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def listen(_: nn.Module, _inputs: Any, output: Any) -> None:
            if self._dropping:
                return
            try:
                with torch.no_grad():
                    self._routed(number, output)
            except Exception as error:
                self._drop(error)

        return listen

    def _after_pass(self, _: nn.Module, _args: Any, output: Any) -> None:
        try:
            self._end(output)
        except Exception as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Leave out the pass at hand; the first time say so."""
        self._batch, self._dropping = None, True
        self.dropped += 1
        if self.fault is not None:
            return
        self.fault = error
        # Where warnings are errors, a warning would fail the model.
        with suppress(Warning):
            text = f"a forward pass is not recorded, nor are others like it: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _routed(self, number: int, output: Any) -> None:
        batch, name = self._batch, self._layers[number].name
        if batch is None:
            if self._steps:  # a recomputation in the backward pass chooses what was chosen before
                return
            raise ValueError(
                f"{name} ran outside a forward pass of {type(self._model).__name__}: "
                "the model given must be the module that is called"
            )
        found = chosen(output)
        if found is None:
            raise ValueError(
                f"{name}: a router must return expert ids [tokens, top_k] as integers, "
                f"{type(self._layers[number].router).__name__} does not"
            )
        ids, scores = found
        if ids.flatten(0, -2).shape != (batch.tokens, self.top_k):
            raise ValueError(
                f"{name}: expert ids must be [{batch.tokens}, {self.top_k}], [tokens, top_k] as "
                f"the forward pass was called, got {list(ids.shape)}"
            )
        room = self._room_for(batch.tokens, ids.device)
        room.ids[: batch.tokens, number].copy_(ids.flatten(0, -2), non_blocking=True)
        if scores is not None:
            room.scores[: batch.tokens, number].copy_(scores.flatten(0, -2), non_blocking=True)
        self._seen.add(number)

    def _room_for(self, tokens: int, device: torch.device) -> _Room:
        """Return room for a step, on the device of the first router."""
        if self._room is None or len(self._room.ids) < tokens:
            device = device if self._room is None else self._room.ids.device
            dtype = torch.uint8 if self.num_experts <= 256 else torch.uint16
            sizes = (tokens, len(self._layers), self.top_k)
            # Tensors born in inference mode could not be written outside it.
            with torch.inference_mode(False):
                self._room = _Room(
                    torch.zeros(sizes, dtype=dtype, device=device),
                    torch.zeros(sizes, dtype=torch.float32, device=device),
                )
                if self._nan is None:
                    self._nan = torch.zeros(len(self._layers), dtype=torch.bool, device=device)
        return self._room

    def _end(self, output: Any) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            return
        missing = [n for n in range(len(self._layers)) if n not in self._seen]
        if missing:
            raise ValueError(
                f"every router must run in a forward pass, {self._layers[missing[0]].name} did not "
                "(what torch.compile or a CUDA graph runs is not heard: give the compiled model)"
            )
        self._steps += 1
        if self._room is None or self._nan is None:
            return
        with torch.no_grad():
            wrong = self._room.scores[: batch.tokens].isnan().any(-1)
            keep = ~wrong.any(-1)
            if batch.keep is not None:
                given = batch.keep.to(wrong.device, non_blocking=True)
                wrong &= given[:, None]
                keep &= given
            self._nan |= wrong.any(0)
            self._receive(Step(self._room.ids[: batch.tokens], replace(batch, keep=keep), output))


class _Eagerly:
    """While any of these is there, compiled code runs eagerly, in the whole process."""

    inside = 0
    stance: Any = None

    def __init__(self) -> None:
        if not hasattr(torch.compiler, "set_stance"):
            raise ValueError(
                "model must not be compiled by this version of torch: give the model without "
                "torch.compile"
            )
        if _Eagerly.inside == 0:
            _Eagerly.stance = torch.compiler.set_stance("force_eager")
        _Eagerly.inside += 1

    def leave(self) -> None:
        """Let compiled code run again, if this was the last."""
        _Eagerly.inside -= 1
        if _Eagerly.inside == 0:
            _Eagerly.stance.__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
