"""What ``generate`` of transformers knows and does not tell the forward pass that it calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn


@dataclass(eq=False)
class Generation:
    """One call of ``generate``.

    Attributes
    ----------
    mask
        Padding of the tokens so far [B,S], where there is any; a pass may get it in another shape.
    ended
        Sequences that have ended [B], on the device; they are fed on until the last one ends.
    seen
        Tokens of each sequence that passes without a cache have had: the next one repeats them.
    """

    mask: Tensor | None = None
    ended: Tensor | None = None
    seen: int = 0
    _tokens: ReferenceType[Tensor] | None = None

    def prepared(self, tokens: Tensor | None, mask: object) -> None:
        """Take what the next pass will be given."""
        self._tokens = None if tokens is None else ref(tokens)
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def has_prepared(self, given: Mapping[str, Any]) -> bool:
        """Whether a pass is given what was prepared last."""
        tokens = None if self._tokens is None else self._tokens()
        return tokens is not None and any(given.get(name) is tokens for name in TOKEN_NAMES)

    def step(self, done: Tensor) -> None:
        """Take which sequences a new token has ended [B]; those of other sizes are of beams."""
        self.ended = (
            done if self.ended is None or len(self.ended) != len(done) else self.ended | done
        )


TOKEN_NAMES = ("input_ids", "inputs_embeds")


class GenerateHooks:
    """Listens to the calls of ``generate`` of a model, if it has any that is known.

    Parameters
    ----------
    model
        The module whose ``generate`` may be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, Any] = {}
        self._current: ReferenceType[Generation] | None = None

    def attach(self) -> None:
        """Start to listen."""
        for name, listen in (
            ("_get_stopping_criteria", self._criteria),
            ("prepare_inputs_for_generation", self._prepare),
            ("get_compiled_call", self._uncompiled),
        ):
            original = getattr(self._model, name, None)
            if callable(original):
                self._before[name] = self._model.__dict__.get(name)
                self._model.__dict__[name] = listen(original)

    def remove(self) -> None:
        """Stop to listen; the model is as it was before."""
        for name, before in self._before.items():
            if before is None:
                self._model.__dict__.pop(name, None)
            else:
                self._model.__dict__[name] = before
        self._before = {}

    def of(self, given: Mapping[str, Any]) -> Generation | None:
        """Return the call of ``generate`` that a forward pass with these arguments belongs to."""
        current = None if self._current is None else self._current()
        return current if current is not None and current.has_prepared(given) else None

    def _criteria(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def criteria(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            generation = Generation()
            # What generate holds is gone when it returns, and the generation with it.
            with suppress(Exception):
                found = _watched(found, generation)
                self._current = ref(generation)
            return found

        return criteria

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def prepare(*args: Any, **kwargs: Any) -> Any:
            inputs = original(*args, **kwargs)
            with suppress(Exception):
                generation = None if self._current is None else self._current()
                if generation is not None:
                    given = inspect.signature(original).bind(*args, **kwargs).arguments
                    mask = given.get("attention_mask", kwargs.get("attention_mask"))
                    named = (inputs.get(name) for name in TOKEN_NAMES)
                    tokens = next((found for found in named if found is not None), None)
                    generation.prepared(tokens, mask)
            return inputs

        return prepare

    def _uncompiled(self, original: Callable[..., Any]) -> Callable[..., Any]:
        # A pass that generate compiles for a static cache would run past the hooks.
        @functools.wraps(original)
        def call(*_args: Any, **_kwargs: Any) -> Any:
            return self._model.__call__

        return call


def _watched(criteria: Any, generation: Generation) -> Any:
    """Return criteria that report what they find to a generation, like the list they come from."""
    kind: Any = type(criteria)

    class Watched(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            done = super().__call__(*args, **kwargs)
            with suppress(Exception):
                generation.step(done.bool())
            return done

    return Watched(criteria)
