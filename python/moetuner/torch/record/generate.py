"""Listen to ``generate`` of transformers, which does not pass all that it knows on to the model.

No argument of ``generate`` shows which sequences its criteria have ended, and none has the padding
if a pass gets a mask of pairs. So two methods that it calls are wrapped: the one that makes the
criteria, and ``prepare_inputs_for_generation``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

TOKEN_NAMES = ("input_ids", "inputs_embeds")


@dataclass(eq=False)
class Generation:
    """One call of ``generate``.

    Parameters
    ----------
    mask
        Padding mask [B,S] of the tokens so far; None without one. A pass may get it in another
        shape.
    ended
        Which sequences have ended [B], on the device; None before any pass. ``generate`` goes on to
        feed them until the last one ends.
    repeated
        Tokens of each sequence in the previous pass, which a pass without a cache computes again.
    length
        Tokens of each sequence in the next pass.
    tokens
        Returns the tokens of the next pass, by which it is recognised; None once they are deleted.
    """

    mask: Tensor | None = None
    ended: Tensor | None = None
    repeated: int = 0
    length: int = 0
    tokens: Callable[[], Tensor | None] = lambda: None


class Generations:
    """The running calls of ``generate`` of a model, for all recorders of the model."""

    def __init__(self) -> None:
        self.users = 0
        # Weak references: objects of generate are gone when it returns.
        self._calls: list[Callable[[], Generation | None]] = []

    def find(self, arguments: Mapping[str, Any]) -> Generation | None:
        """Return the call that prepared the arguments of a forward pass; None if none did."""
        generation = self._innermost()
        tokens = None if generation is None else generation.tokens()
        if tokens is None or all(arguments.get(name) is not tokens for name in TOKEN_NAMES):
            return None
        return generation

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
                earlier, ended = generation.ended, done.bool()
                # In a beam search the size may change.
                if earlier is not None and earlier.shape == ended.shape:
                    ended = earlier | ended
                generation.ended = ended
                return done

        return Watched(criteria)

    def prepare(self, inputs: Any, arguments: Mapping[str, Any]) -> Any:
        """Return the inputs of the next pass, and store what a pass does not get of them."""
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
        _wrap_method(model, "_get_stopping_criteria", calls.begin)
        _wrap_method(model, "prepare_inputs_for_generation", calls.prepare)
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


def _wrap_method(
    model: nn.Module, name: str, change: Callable[[Any, Mapping[str, Any]], Any]
) -> None:
    """Wrap a method of a model, not of its copies, so that ``change`` gets its results."""
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
