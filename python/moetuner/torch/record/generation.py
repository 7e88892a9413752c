"""What ``generate`` of transformers knows and does not tell the forward pass that it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

TOKEN_NAMES = ("input_ids", "inputs_embeds")


@dataclass(eq=False)
class Generation:
    """One call of ``generate``.

    Attributes
    ----------
    mask
        Padding of the tokens so far [B,S], where there is any; a pass may get it in another shape.
    ended
        Sequences that have ended [B], on the device; they are fed on until the last one ends.
    repeated
        Tokens of each sequence that the pass before had; a pass without a cache repeats them.
    """

    mask: Tensor | None = None
    ended: Tensor | None = None
    repeated: int = 0
    _length: int = 0
    _tokens: ReferenceType[Tensor] | None = None

    def prepare(self, tokens: Tensor | None, mask: object) -> None:
        """Take what the next pass will be given."""
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.repeated, self._length = self._length, 0 if tokens is None else tokens.shape[1]
        self._tokens = None if tokens is None else ref(tokens)

    def has_prepared(self, given: Mapping[str, Any]) -> bool:
        """Whether a pass is given what was prepared last."""
        tokens = None if self._tokens is None else self._tokens()
        return tokens is not None and any(given.get(name) is tokens for name in TOKEN_NAMES)

    def end(self, done: Tensor) -> None:
        """Take which sequences a new token has ended [B]; those of other sizes are of beams."""
        same = self.ended is not None and self.ended.shape == done.shape
        self.ended = self.ended | done if same and self.ended is not None else done


class GenerateHooks:
    """Listens to the calls of ``generate`` of a model, for all that record the model.

    No argument of ``generate`` tells which sequences its criteria have ended, and none keeps the
    padding where a pass gets a mask of pairs. So two methods that it calls are listened to: the
    one that makes the criteria, and ``prepare_inputs_for_generation``.
    """

    _of: ClassVar[WeakKeyDictionary[nn.Module, GenerateHooks]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._users = 0
        self._before: dict[str, Any] = {}
        self._calls: list[ReferenceType[Generation]] = []

    @classmethod
    def attach(cls, model: nn.Module) -> GenerateHooks:
        """Start to listen, once per model."""
        hooks = cls._of.setdefault(model, cls(model))
        hooks._users += 1
        if hooks._users == 1:
            hooks._listen(model, "_get_stopping_criteria", hooks._criteria)
            hooks._listen(model, "prepare_inputs_for_generation", hooks._prepared)
        return hooks

    def detach(self) -> None:
        """Stop to listen; after the last one the model is as it was before."""
        self._users -= 1
        model = self._model()
        if self._users or model is None:
            return
        for name, before in self._before.items():
            if before is None:
                model.__dict__.pop(name, None)
            else:
                model.__dict__[name] = before
        self._before = {}
        del self._of[model]

    def of(self, given: Mapping[str, Any]) -> Generation | None:
        """Return the call of ``generate`` that a forward pass with these arguments belongs to."""
        generation = self._current()
        return generation if generation is not None and generation.has_prepared(given) else None

    def _current(self) -> Generation | None:
        """Return the innermost call that runs: what generate holds is gone when it returns."""
        while self._calls and self._calls[-1]() is None:
            self._calls.pop()
        return self._calls[-1]() if self._calls else None

    def _listen(
        self, model: nn.Module, name: str, change: Callable[[Any, Mapping[str, Any]], Any]
    ) -> None:
        """Pass what a method returns through ``change``; the method of a copy stays as it is."""
        own = model.__dict__.get(name)
        is_function = own is not None and not isinstance(own, MethodType)
        method = getattr(own, "__func__", own) or getattr(type(model), name, None)
        if method is None:
            return

        @functools.wraps(method)
        def call(of: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs) if is_function else method(of, *args, **kwargs)
            return change(result, kwargs) if of is self._model() else result

        self._before[name] = own
        model.__dict__[name] = MethodType(call, model)

    def _criteria(self, criteria: Any, arguments: Mapping[str, Any]) -> Any:
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
                generation.end(done.bool())
                return done

        return Watched(criteria)

    def _prepared(self, inputs: Any, arguments: Mapping[str, Any]) -> Any:
        generation = self._current()
        if generation is not None:
            tokens = [inputs[name] for name in TOKEN_NAMES if inputs.get(name) is not None]
            mask = arguments.get("attention_mask")
            generation.prepare(tokens[0] if tokens else None, mask)
        return inputs
