"""Record the routing of a running model into a trace.

Ids are copied from the device to the host without waiting, and written to disk meanwhile.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner._checks import IdArray, instance, listed, path_in, text_or_none, whole_number
from moetuner._core import validate
from moetuner.files.ids import Ids
from moetuner.files.safetensors import TensorInFile
from moetuner.torch.models import moe_layers
from moetuner.torch.record.hooks import Step, StepHooks
from moetuner.trace import RoutingTrace

# Labels of a token in a trace.
LABEL = np.dtype([("sequence", "<i4"), ("group", "<i2")])
Labels = NDArray[np.void]
BUFFER_BYTES = 64 << 20
PARTIAL = ".partial.safetensors"  # ending of the file of a recording that failed
UNNAMED = "other"  # tokens outside every group, in a recording that has groups
SEQUENCE_LIMIT = 1 << 31


def find_expert_size(model: nn.Module) -> tuple[int, int] | None:
    """Find hidden and intermediate size of an expert in a model's configuration."""
    config = getattr(model, "config", None)
    # Models of several kinds of input have a configuration for text.
    config = getattr(config, "text_config", None) or config
    names = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    inner = next(filter(None, (getattr(config, name, None) for name in names)), None)
    sizes = (getattr(config, "hidden_size", None), inner)
    are_known = all(isinstance(size, int) and 0 < size < 1 << 24 for size in sizes)
    return sizes if are_known else None  # type: ignore[return-value]


class Recorder:
    """Record what the routers of a model choose, for use in a ``with`` statement.

    Works with any forward pass in any mode, and with ``generate``: a step that is given the cache
    of an earlier one continues its sequences. Padding, and what ``generate`` feeds to sequences
    that have ended, is left out; with ``use_cache=False`` each token is recorded once, although
    every step computes the earlier ones again. A compiled model runs eagerly while it is recorded;
    routers that run inside a CUDA graph are not recorded.

    Recording never makes the model fail: a step that cannot be read (paged batches, a mask of
    another shape, a router that runs several times in a pass) is left out and counted in
    ``Recorder.dropped``; the first one is warned of. No recording is lost: after an error or Ctrl-C
    in the block ``Recorder.trace`` returns what was recorded until then. With a path, a file beside
    it that ends in ``.partial.safetensors`` has it as well.

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
        Which tokens to record [batch, tokens], instead of the mask that the model is called with.
        The attribute may change from pass to pass.
    routers
        Routers to record, as modules or their names, where they cannot be found by themselves.
    name
        Name of the model in the trace; its class by default.
    buffer_bytes
        Largest number of bytes of ids that wait to be copied from the device.

    Attributes
    ----------
    dropped
        Forward passes that were left out.
    layers
        The MoE layers that are recorded.

    Raises
    ------
    ValueError
        If the model has no MoE layers, its layers differ in experts or top-k, or an argument is
        wrong. At the end of the block: if a router gave NaN, an id out of range or an expert twice
        (the other tokens are kept, as after an error), or no step could be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        path: str | Path | None = None,
        group: str | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        routers: Iterable[str | nn.Module] | None = None,
        name: str | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        text_or_none("name", name)
        is_one = group is None or isinstance(group, str)
        for label in () if is_one else listed("group", group, "names"):
            text_or_none("group", label)
        if attention_mask is not None:
            instance("attention_mask", attention_mask, Tensor)
        buffer_limit = whole_number("buffer_bytes", buffer_bytes)
        self._path = None if path is None else path_in(path)
        self.layers = moe_layers(model, routers)
        if self._path is not None and self._path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {self._path.name!r}")
        self._description = {
            "model": name or type(model).__name__,
            "expert_size": find_expert_size(model),
        }
        self.attention_mask = attention_mask
        self._hooks = StepHooks(model, self.layers, self._copy_step, lambda: self.attention_mask)
        experts, self._sizes = self._hooks.num_experts, (len(self.layers), self._hooks.top_k)
        self._id_type = torch.uint8 if experts <= 256 else torch.uint16
        # Largest number of tokens that wait for the device, beside those of the last step.
        self._capacity = max(1, buffer_limit // (math.prod(self._sizes) * self._id_type.itemsize))
        self._waiting: deque[tuple[Tensor, Tensor, Labels, torch.cuda.Event | None]] = deque()
        self._waiting_tokens = 0
        # Tokens that have arrived, in the order of serving: ids on disk, and labels.
        self._id_file = Path()
        self._labels: dict[int, Labels] = {0: np.empty(0, LABEL)}
        self._tokens = 0
        self._trace: RoutingTrace | None = None
        self._write_error: Exception | None = None
        self._id_error: Exception | None = None
        self._group = group
        self._group_numbers: dict[str, int] = {}
        self._sequences = 0
        self._labels_of_cache: WeakKeyDictionary[Any, NDArray[np.int32]] = WeakKeyDictionary()

    @property
    def dropped(self) -> int:
        """Forward passes that were left out, as they could not be read or stored."""
        return self._hooks.dropped

    @contextmanager
    def group(self, name: str | Sequence[str]) -> Iterator[None]:
        """Give the tokens of a ``with`` block a group, or each sequence of a batch its own."""
        outer_group, self._group = self._group, name
        try:
            yield
        finally:
            self._group = outer_group

    def trace(self) -> RoutingTrace:
        """Return the trace, once the ``with`` block has ended; after an error, what came before.

        Raises
        ------
        RuntimeError
            If the block has not ended, or an error ended it before anything was recorded.
        """
        if self._trace is None:
            raise RuntimeError("trace() needs a recording that has ended and has tokens")
        return self._trace

    @property
    def tokens(self) -> int:
        """Tokens that have arrived on the host so far."""
        return self._tokens

    def __enter__(self) -> Recorder:
        if self._id_file.name:
            raise RuntimeError("a Recorder records once; call capture again")
        # Beside the trace, where there is room for it.
        parent = None if self._path is None else self._path.parent
        descriptor, name = tempfile.mkstemp(prefix=".moetuner-", dir=parent)
        os.close(descriptor)
        self._id_file = Path(name)
        try:
            self._hooks.attach()
        except BaseException:
            self._id_file.unlink()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hooks.remove()
        fault, path = self._flush(), self._path
        if kind is None and fault is None:
            try:
                self._finish(path)
                return
            except Exception as unwritten:
                fault = unwritten
        if self._tokens:
            path = path and path.with_name(f"{path.stem}{PARTIAL}")
            try:
                self._finish(path)
                where = "trace() has" if path is None else f"{path} has"
            except Exception as unwritten:
                where = f"{unwritten}; {self._id_file} has, as raw ids,"
            name = (kind or type(fault)).__name__
            text = f"the recording ended with {name}: {where} the {self._tokens} tokens until then"
            with suppress(Warning):
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        else:
            self._id_file.unlink(missing_ok=True)
        if kind is None and fault is not None:
            raise fault

    def _flush(self) -> Exception | None:
        """Write the tokens that are still on the device; return the recording's error, if any."""
        try:
            while self._waiting and self._write_error is None:
                self._take_first()
            self._hooks.check()
        except Exception as error:
            return self._write_error or error
        return self._write_error or self._id_error or (None if self.tokens else self._hooks.fault)

    def _finish(self, path: Path | None) -> None:
        """Build the trace, and write it if there is a path."""
        experts, labels = self._hooks.num_experts, np.concatenate([*self._labels.values()])
        labelled: dict[str, Any] = {"sequence": labels["sequence"], **self._description}
        # A trace has groups if any token was given one.
        if set(self._group_numbers) - {UNNAMED}:
            labelled |= {"group": labels["group"], "group_names": tuple(self._group_numbers)}
        dtype = np.dtype(f"<u{self._id_type.itemsize}")
        place = TensorInFile(dtype, (self._tokens, *self._sizes), 0)
        ids = Ids.in_file(self._id_file, place, experts)
        if path is None:
            self._trace = RoutingTrace(Ids.of(ids.array(), experts), experts, **labelled)
        else:
            trace = RoutingTrace(ids, experts, **labelled)
            trace.save(path, source="moetuner.torch.record.capture")
            self._trace = RoutingTrace.load(path)
        self._id_file.unlink(missing_ok=True)

    def _append(self, ids: IdArray, labels: Labels) -> None:
        """Write tokens [T,L,K] and their labels [T], over the rest of a write that failed."""
        with self._id_file.open("r+b") as file:
            file.seek(self._tokens * ids.strides[0])
            file.write(ids.tobytes())
        self._labels[self._tokens] = labels
        self._tokens += len(ids)

    def _copy_step(self, step: Step) -> None:
        """Copy ids of a step to the host without waiting for the device."""
        if self._write_error is not None:
            raise self._write_error
        experts, choices, top_k = (self._hooks.num_experts, self._hooks.choices, self._hooks.top_k)
        if step.paged:
            raise ValueError(
                "paged batches do not say which sequences they continue: RoutingCounters counts "
                "them, a trace needs batches of their own"
            )
        if choices > experts:
            raise ValueError(
                f"a trace needs {top_k} experts for each token, and these routers also choose "
                f"among {choices - experts} zero-computation experts: RoutingCounters counts the "
                "others"
            )
        labels = np.empty(step.rows, LABEL)
        labels["sequence"] = self._label_sequences(step)
        labels["group"] = self._number_groups(step.rows)
        # On CUDA to pinned memory, behind the work of the step.
        tables = (step.ids.to(self._id_type), step.is_counted)
        ids, is_counted = (table.to("cpu", non_blocking=True) for table in tables)
        is_cuda = step.ids.is_cuda
        copied = torch.cuda.current_stream(step.ids.device).record_event() if is_cuda else None
        self._waiting.append((ids, is_counted, np.repeat(labels, step.length), copied))
        # The host waits for work that the device has done long before.
        self._waiting_tokens += len(ids)
        while len(self._waiting) > 1 and self._waiting_tokens > self._capacity:
            self._take_first()

    def _take_first(self) -> None:
        """Write the tokens of the first waiting step."""
        ids_copy, counted_copy, labels, copied = self._waiting[0]
        if copied is not None:
            copied.synchronize()
        ids, is_counted = ids_copy.numpy(), counted_copy.numpy()
        try:
            validate(ids[is_counted], self._hooks.num_experts, self.tokens)
        except ValueError as error:
            # A table of experts by token may name one twice; a trace would not be read again.
            self._id_error = self._id_error or error
            ordered = np.sort(ids, axis=2)
            is_counted = is_counted & (ordered[:, :, 1:] != ordered[:, :, :-1]).all((1, 2))
        try:
            self._append(ids[is_counted], labels[is_counted])
        except Exception as error:
            self._write_error = error  # a full disk: nothing more can be written
            raise
        self._waiting.popleft()
        self._waiting_tokens -= len(ids)

    def _label_sequences(self, step: Step) -> NDArray[np.int32]:
        """Return the labels of a batch's sequences [B]: those of its cache, or new ones."""
        rows, cache = step.rows, step.cache
        labels = self._labels_of_cache.get(cache) if _is_weak(cache) else None
        if labels is None or len(labels) != rows:
            if self._sequences + rows > SEQUENCE_LIMIT:
                raise ValueError(f"a trace has at most {SEQUENCE_LIMIT} sequences")
            labels = np.arange(self._sequences, self._sequences + rows, dtype=np.int32)
            self._sequences += rows
        # The next step has the cache that was passed in, or the one that the model has returned.
        for following in filter(_is_weak, (cache, step.following)):
            self._labels_of_cache[following] = labels
        return labels

    def _number_groups(self, rows: int) -> list[int]:
        """Return the group numbers of the sequences of a batch [B]."""
        group = UNNAMED if self._group is None else self._group
        names = [group] * rows if isinstance(group, str) else list(group)
        if len(names) != rows or not all(isinstance(name, str) for name in names):
            raise ValueError(f"group must be a name, or one for each of {rows} sequences: {names}")
        numbers = self._group_numbers
        return [numbers.setdefault(name, len(numbers)) for name in names]


def _is_weak(cache: object) -> bool:
    """Return whether weak references to a cache are possible; not to tuples of tensors."""
    return hasattr(cache, "__weakref__") and type(cache).__hash__ is not None


capture = Recorder
