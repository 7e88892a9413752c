"""Recording the routing of a running model into a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner._validation import IdArray, whole_number
from moetuner.torch.batch import cache_of
from moetuner.torch.offload import Labels, Offload
from moetuner.torch.parts import Parts
from moetuner.torch.routers import MoELayer, moe_layers
from moetuner.torch.steps import Step, StepHooks
from moetuner.trace import RoutingTrace

BUFFER_BYTES = 64 << 20
UNNAMED = "other"  # tokens outside every group, in a recording that has groups
SEQUENCE_LIMIT = 1 << 31


def expert_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Return hidden and intermediate size of an expert, as a model's configuration tells them."""
    config = getattr(model, "config", None)
    # Models of several kinds of input have one for text.
    config = getattr(config, "text_config", None) or config
    intermediate = [
        getattr(config, name, None)
        for name in ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    ]
    found = (getattr(config, "hidden_size", None), next(filter(None, intermediate), None))
    known = all(isinstance(size, int) and 0 < size < 1 << 24 for size in found)
    return found if known else None  # type: ignore[return-value]


def capture(
    model: nn.Module,
    *,
    path: str | Path | None = None,
    group: str | Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    routers: Iterable[str | nn.Module] | None = None,
    name: str | None = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Recorder:
    """Record what the routers of a model choose, for use in a ``with`` statement.

    Works with any forward pass in any mode, and with ``generate``: a step that is given the cache
    of an earlier one continues its sequences. Padding, and what ``generate`` feeds to sequences
    that have ended, is left out. Routers that run inside a CUDA graph are not heard.

    Parameters
    ----------
    model
        The module that will be called.
    path
        Trace to write, ending in ``.safetensors``; it appears when the ``with`` block ends without
        an error. By default the trace is kept in memory.
    group
        Group of the tokens to come, or one for each sequence of a batch.
    attention_mask
        Which tokens to keep [batch, tokens], instead of the mask that the model is called with.
    routers
        Routers to record, as modules or their names, where they cannot be found by themselves.
    name
        Name of the model in the trace; its class by default.
    buffer_bytes
        Most bytes of ids to hold on the device, in each of two halves.

    Returns
    -------
    Recorder
        Listens while its ``with`` block runs.

    Raises
    ------
    ValueError
        If the model has no MoE layers, its layers differ in experts or top-k, or an argument is
        wrong. Inside the block: if a router gives NaN, or a mask does not fit the tokens.
    """
    return Recorder(
        model,
        moe_layers(model, routers),
        path=None if path is None else Path(path),
        group=group,
        attention_mask=attention_mask,
        name=name or type(model).__name__,
        buffer_bytes=whole_number("buffer_bytes", buffer_bytes),
    )


class Recorder:
    """Listens to the routers of a model while its ``with`` block runs; made by ``capture``.

    Attributes
    ----------
    attention_mask
        Which tokens of the coming forward passes to keep [batch, tokens]; None takes the mask that
        the model is called with.
    layers
        The MoE layers that are recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[MoELayer, ...],
        *,
        path: Path | None,
        group: str | Sequence[str] | None,
        attention_mask: Tensor | None,
        name: str,
        buffer_bytes: int,
    ) -> None:
        if path is not None and path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {path.name!r}")
        self.layers = layers
        self._name, self._expert_size = name, expert_size_of(model)
        self._hooks = StepHooks(model, layers, self._step)
        self._hooks.attention_mask = attention_mask
        self._path = path
        token_bytes = len(layers) * self._hooks.top_k * (1 if self._hooks.num_experts <= 256 else 2)
        self._offload = Offload(max(1, buffer_bytes // token_bytes), self._arrived)
        self._parts: Parts | None = None
        self._trace: RoutingTrace | None = None
        self._group = group
        self._numbers: dict[str, int] = {}
        self._sequences = 0
        self._of_cache: WeakKeyDictionary[Any, NDArray[np.int32]] = WeakKeyDictionary()

    @property
    def attention_mask(self) -> Tensor | None:
        """Which tokens of the coming forward passes to keep [batch, tokens]."""
        return self._hooks.attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: Tensor | None) -> None:
        self._hooks.attention_mask = mask

    @contextmanager
    def group(self, name: str | Sequence[str]) -> Iterator[None]:
        """Put the tokens of a block into a group, or each sequence of a batch into its own."""
        before, self._group = self._group, name
        try:
            yield
        finally:
            self._group = before

    def trace(self) -> RoutingTrace:
        """Give what was recorded, once the ``with`` block has ended.

        Raises
        ------
        RuntimeError
            If it has not ended, or ended with an error.
        """
        if self._trace is None:
            raise RuntimeError("trace() needs a recording that has ended without an error")
        return self._trace

    @property
    def tokens(self) -> int:
        """Tokens that have arrived on the host so far."""
        return 0 if self._parts is None else self._parts.tokens

    def __enter__(self) -> Recorder:
        if self._parts is not None:
            raise RuntimeError("a Recorder records once; call capture again")
        hooks = self._hooks
        self._parts = Parts(self._path, len(self.layers), hooks.top_k, hooks.num_experts)
        hooks.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.remove()
        parts = self._parts
        assert parts is not None  # set by __enter__
        try:
            if kind is None:
                self._offload.flush()
                self._hooks.check_scores()
                # Groups are only kept if there are any.
                names = list(self._numbers) if set(self._numbers) - {UNNAMED} else []
                self._trace = parts.finish(
                    names, self._name, "moetuner.torch.capture", self._expert_size
                )
        finally:
            parts.discard()

    def _step(self, step: Step) -> None:
        batch = step.batch
        sequence = self._sequence_of(step)
        group = self._group_of(batch.rows)
        labels = (np.repeat(sequence, batch.length), np.repeat(group, batch.length))
        self._offload.put(step.ids, batch.keep, labels)

    def _sequence_of(self, step: Step) -> NDArray[np.int32]:
        """Labels of the sequences of a batch [B]: those of the cache that it continues, or new."""
        rows, cache = step.batch.rows, step.batch.cache
        known = self._of_cache.get(cache) if _is_weak(cache) else None
        if known is None or len(known) != rows:
            if self._sequences + rows > SEQUENCE_LIMIT:
                raise ValueError(f"a trace has at most {SEQUENCE_LIMIT} sequences")
            known = np.arange(self._sequences, self._sequences + rows, dtype=np.int32)
            self._sequences += rows
        # The cache of the next step: the one that was given, or one that the model has made.
        for following in (cache, cache_of(step.output)):
            if _is_weak(following):
                self._of_cache[following] = known
        return known

    def _group_of(self, rows: int) -> NDArray[np.int16]:
        """Give the groups of the sequences of a batch [B]."""
        given = UNNAMED if self._group is None else self._group
        names = [given] * rows if isinstance(given, str) else list(given)
        if len(names) != rows or not all(isinstance(name, str) for name in names):
            raise ValueError(f"group must be a name, or one for each of {rows} sequences: {names}")
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in names]
        return np.asarray(numbers, dtype=np.int16)

    def _arrived(self, ids: IdArray, keep: NDArray[np.bool_], labels: list[Labels]) -> None:
        self._hooks.check_scores()
        assert self._parts is not None  # hooks are attached after it was made
        sequence = np.concatenate([part[0] for part in labels])
        group = np.concatenate([part[1] for part in labels])
        self._parts.append(ids[keep], sequence[keep], group[keep])


def _is_weak(cache: object) -> bool:
    """Whether a cache is an object that can be recognised; tuples of tensors cannot."""
    return hasattr(cache, "__weakref__") and type(cache).__hash__ is not None
