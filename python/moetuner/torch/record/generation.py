"""What ``generate`` of transformers knows and does not tell the forward pass that it calls."""

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
    """The calls of ``generate`` of a model that run, for all that record the model.

    No argument of ``generate`` tells which sequences its criteria have ended, and none keeps the
    padding where a pass gets a mask of pairs. So two methods that it calls are listened to: the
    one that makes the criteria, and ``prepare_inputs_for_generation``.
    """

    def __init__(self) -> None:
        self.users = 0
        # What generate holds is gone when it returns.
        self._calls: list[Callable[[], Generation | None]] = []

    def of(self, given: Mapping[str, Any]) -> Generation | None:
        """Return the call that has prepared the arguments of a forward pass."""
        generation = self._innermost()
        tokens = None if generation is None else generation.tokens()
        same = tokens is not None and any(given.get(name) is tokens for name in TOKEN_NAMES)
        return generation if same else None

    def _innermost(self) -> Generation | None:
        while self._calls and self._calls[-1]() is None:
            self._calls.pop()
        return self._calls[-1]() if self._calls else None

    def begin(self, criteria: Any, arguments: Mapping[str, Any]) -> Any:
        """Return the criteria of a new call, which tell what they end."""
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
        """Take what the next pass will be given, and return it."""
        if (generation := self._innermost()) is not None:
            tokens = next((inputs[of] for of in TOKEN_NAMES if inputs.get(of) is not None), None)
            mask = arguments.get("attention_mask")
            generation.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
            generation.repeated = generation.length
            generation.length = 0 if tokens is None else tokens.shape[1]
            generation.tokens = (lambda: None) if tokens is None else ref(tokens)
        return inputs


_running: WeakKeyDictionary[nn.Module, Generations] = WeakKeyDictionary()


@contextmanager
def generations_of(model: nn.Module) -> Iterator[Generations]:
    """Listen to the calls of ``generate``, once per model, until the last one has left."""
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
                if (own := getattr(model.__dict__.pop(name, None), "own", None)) is not None:
                    model.__dict__[name] = own


def _listen(model: nn.Module, name: str, change: Callable[[Any, Mapping[str, Any]], Any]) -> None:
    """Pass what a method returns through ``change``; the method of a copy stays as it is."""
    method, model_of = getattr(model, name, None), ref(model)
    if method is None:
        return
    function = getattr(method, "__func__", None)

    @functools.wraps(method)
    def call(of: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs) if function is None else function(of, *args, **kwargs)
        return change(result, kwargs) if of is model_of() else result

    call.own = model.__dict__.get(name)  # type: ignore[attr-defined]
    model.__dict__[name] = MethodType(call, model)
