"""Recording the routing of a running model into a trace.

Ids go from the device to the host without waiting, and to disk while the recording runs.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moetuner._checks import IdArray, id_type, instance, listed, path_in, text_or_none, whole_number
from moetuner._core import validate
from moetuner.files.contents import TraceContents, write_trace
from moetuner.files.ids import Ids
from moetuner.files.safetensors import TensorInFile
from moetuner.torch.models import moe_layers
from moetuner.torch.record.hooks import Step, StepHooks, cache_of
from moetuner.trace import SHARD_BYTES, RoutingTrace

# What a trace says of a token besides its experts.
LABEL = np.dtype([("sequence", "<i4"), ("group", "<i2")])
Labels = NDArray[np.void]
BUFFER_BYTES = 64 << 20
PARTIAL = ".partial.safetensors"  # what a recording that did not end well is called
UNNAMED = "other"  # tokens outside every group, in a recording that has groups
SEQUENCE_LIMIT = 1 << 31


def expert_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Return hidden and intermediate size of an expert, as a model's configuration tells them."""
    config = getattr(model, "config", None)
    # Models of several kinds of input have one for text.
    config = getattr(config, "text_config", None) or config
    names = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    inner = next(filter(None, (getattr(config, name, None) for name in names)), None)
    sizes = (getattr(config, "hidden_size", None), inner)
    is_right = all(isinstance(size, int) and 0 < size < 1 << 24 for size in sizes)
    return sizes if is_right else None  # type: ignore[return-value]


class Recorder:
    """Record what the routers of a model choose, for use in a ``with`` statement.

    Works with any forward pass in any mode, and with ``generate``: a step that is given the cache
    of an earlier one continues its sequences. Padding, and what ``generate`` feeds to sequences
    that have ended, is left out; with ``use_cache=False`` each token is recorded once, although
    every step computes the earlier ones again. A compiled model runs eagerly while it is recorded;
    routers that run inside a CUDA graph are not heard.

    The model is never failed by its recording: a step that cannot be understood (paged batches, a
    mask of another shape, a router that runs several times in a pass) is left out, counted in
    ``Recorder.dropped``, and the first one warned of. Nor is a recording lost: after an error or
    Ctrl-C in the block what was recorded until then is given by ``Recorder.trace`` and, with a
    path, in a file beside it that ends in ``.partial.safetensors``.

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
        Bytes of ids that wait at most, on their way from the device.

    Attributes
    ----------
    attention_mask
        Which tokens of coming passes to keep [batch, tokens]; None takes the model's mask.
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
        whole = group is None or isinstance(group, str)
        for label in () if whole else listed("group", group, "names"):
            text_or_none("group", label)
        if attention_mask is not None:
            instance("attention_mask", attention_mask, Tensor)
        most = whole_number("buffer_bytes", buffer_bytes)
        self._path = None if path is None else path_in(path)
        self.layers = moe_layers(model, routers)
        if self._path is not None and self._path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {self._path.name!r}")
        self._about = {"model": name or type(model).__name__, "expert_size": expert_size_of(model)}
        self.attention_mask = attention_mask
        self._hooks = StepHooks(model, self.layers, self._step, lambda: self.attention_mask)
        self._dtype = torch.uint8 if self._hooks.num_experts <= 256 else torch.uint16
        token_bytes = len(self.layers) * self._hooks.top_k * self._dtype.itemsize
        self._offload = Offload(max(1, most // token_bytes), self._arrived)
        self._parts: Parts | None = None
        self._trace: RoutingTrace | None = None
        self._lost: Exception | None = None
        self._wrong: Exception | None = None
        self._group = group
        self._numbers: dict[str, int] = {}
        self._sequences = 0
        self._of_cache: WeakKeyDictionary[Any, NDArray[np.int32]] = WeakKeyDictionary()

    @property
    def dropped(self) -> int:
        """Forward passes that were left out, as they could not be understood or kept."""
        return self._hooks.dropped

    @contextmanager
    def group(self, name: str | Sequence[str]) -> Iterator[None]:
        """Put the tokens of a block into a group, or each sequence of a batch into its own."""
        before, self._group = self._group, name
        try:
            yield
        finally:
            self._group = before

    def trace(self) -> RoutingTrace:
        """Return what was recorded, once the ``with`` block has ended; after an error, until then.

        Raises
        ------
        RuntimeError
            If it has not ended, or an error ended it before anything was recorded.
        """
        if self._trace is None:
            raise RuntimeError("trace() needs a recording that has ended and has tokens")
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
        try:
            hooks.attach()
        except BaseException:
            self._parts.discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.remove()
        fault = self._flush()
        if kind is None and fault is None:
            try:
                self._finish(self._path)
                return
            except Exception as unwritten:
                fault = unwritten
        self._rescue(type(fault) if kind is None else kind)
        if kind is None and fault is not None:
            raise fault

    def _flush(self) -> Exception | None:
        """Take what is still on the device; gives what is wrong with the recording."""
        if self._lost is not None:
            return self._lost
        try:
            self._offload.flush()
            self._hooks.check()
        except Exception as error:
            return error
        return self._wrong or (None if self.tokens else self._hooks.fault)

    def _rescue(self, kind: type) -> None:
        """Finish an incomplete recording, beside where it was to be; never fails."""
        parts = self._parts
        assert parts is not None  # set by __enter__
        if not parts.tokens:
            parts.discard()
            return
        path = self._path and self._path.with_name(f"{self._path.stem}{PARTIAL}")
        try:
            self._finish(path)
            where = "trace() has" if path is None else f"{path} has"
        except Exception as error:
            where = f"{error}; {parts.folder} has, as raw arrays,"
        with suppress(Warning):
            text = f"the recording ended with {kind.__name__}: {where} the {parts.tokens} tokens"
            warnings.warn(f"{text} until then", RuntimeWarning, stacklevel=3)

    def _finish(self, path: Path | None) -> None:
        parts = self._parts
        assert parts is not None  # set by __enter__
        # Groups are only kept if there are any.
        names = list(self._numbers) if set(self._numbers) - {UNNAMED} else []
        source = "moetuner.torch.record.capture"
        self._trace = parts.finish(path, source, group_names=names, **self._about)
        parts.discard()

    def _step(self, step: Step) -> None:
        if self._lost is not None:
            raise self._lost
        if step.paged:
            raise ValueError(
                "paged batches do not say which sequences they continue: RoutingCounters counts "
                "them, a trace needs batches of their own"
            )
        if self._hooks.choices > self._hooks.num_experts:
            raise ValueError(
                f"a trace needs {self._hooks.top_k} experts for each token, and these routers also "
                f"choose among {self._hooks.choices - self._hooks.num_experts} zero-computation "
                "experts: RoutingCounters counts the others"
            )
        labels = np.empty(step.rows, LABEL)
        labels["sequence"], labels["group"] = self._sequence_of(step), self._group_of(step.rows)
        self._offload.put(step.ids.to(self._dtype), step.keep, np.repeat(labels, step.length))

    def _sequence_of(self, step: Step) -> NDArray[np.int32]:
        """Return labels of a batch's sequences [B]: of the cache that it continues, or new."""
        rows, cache = step.rows, step.cache
        labels = self._of_cache.get(cache) if _is_weak(cache) else None
        if labels is None or len(labels) != rows:
            if self._sequences + rows > SEQUENCE_LIMIT:
                raise ValueError(f"a trace has at most {SEQUENCE_LIMIT} sequences")
            labels = np.arange(self._sequences, self._sequences + rows, dtype=np.int32)
            self._sequences += rows
        # The cache of the next step: the one that was given, or one that the model has made.
        for following in (cache, cache_of(step.output)):
            if _is_weak(following):
                self._of_cache[following] = labels
        return labels

    def _group_of(self, rows: int) -> list[int]:
        """Return the groups of the sequences of a batch [B]."""
        given = UNNAMED if self._group is None else self._group
        names = [given] * rows if isinstance(given, str) else list(given)
        if len(names) != rows or not all(isinstance(name, str) for name in names):
            raise ValueError(f"group must be a name, or one for each of {rows} sequences: {names}")
        return [self._numbers.setdefault(name, len(self._numbers)) for name in names]

    def _arrived(self, ids: IdArray, keep: NDArray[np.bool_], labels: Labels) -> None:
        assert self._parts is not None  # hooks are attached after it was made
        try:
            validate(ids[keep], self._hooks.num_experts, self.tokens)
        except ValueError as error:
            # A table of experts by token may name one twice; a trace would not be read again.
            self._wrong = self._wrong or error
            ordered = np.sort(ids, axis=2)
            keep = keep & (ordered[:, :, 1:] != ordered[:, :, :-1]).all((1, 2))
        try:
            self._parts.append(ids[keep], labels[keep])
        except Exception as error:
            self._lost = error  # a full disk: what it holds is kept, nothing more can be
            raise


def _is_weak(cache: object) -> bool:
    """Whether a cache is an object that can be recognised; tuples of tensors cannot."""
    return hasattr(cache, "__weakref__") and type(cache).__hash__ is not None


class Offload:
    """Copies ids to the host without waiting for the device, and hands them over later.

    On CUDA they go to pinned memory behind the work of their step. When enough steps wait, those of
    the older half are handed over: the host waits only for work that is long done.

    Parameters
    ----------
    capacity
        Tokens that wait at most, beside the last step.
    receive
        Called on the host, in order, with ids [T,L,K], which of them to keep [T] and labels [T].
    """

    def __init__(
        self, capacity: int, receive: Callable[[IdArray, NDArray[np.bool_], Labels], None]
    ) -> None:
        self._capacity, self._receive = capacity, receive
        self._waiting: deque[tuple[Tensor, Tensor, Labels, torch.cuda.Event | None]] = deque()
        self._tokens = 0

    def put(self, ids: Tensor, keep: Tensor, labels: Labels) -> None:
        """Take ids [T,L,K], marks [T] and labels [T]."""
        # Copies that need not wait go to pinned memory.
        host = ids.to("cpu", non_blocking=True), keep.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None
        self._waiting.append((*host, labels, copied))
        self._tokens += len(ids)
        if self._tokens > self._capacity:
            self._hand_over(self._capacity // 2, last=1)

    def flush(self) -> None:
        """Hand over everything; waits for the device."""
        self._hand_over(-1, last=0)

    def _hand_over(self, most: int, *, last: int) -> None:
        """Receive first steps until at most so many tokens wait, or so many last steps."""
        while self._tokens > most and len(self._waiting) > last:
            ids, keep, labels, copied = self._waiting[0]
            if copied is not None:
                copied.synchronize()
            self._receive(ids.numpy(), keep.numpy(), labels)
            self._waiting.popleft()
            self._tokens -= len(ids)


class Parts:
    """Tokens in the order in which they were served, on disk; memory holds none of them.

    Parameters
    ----------
    path
        Beside which file to keep them; None for a temporary folder.
    layers, top_k, num_experts
        Sizes L, K and E.

    Attributes
    ----------
    folder
        Where they are until ``discard``.
    tokens
        How many there are.
    """

    def __init__(self, path: Path | None, layers: int, top_k: int, num_experts: int) -> None:
        self._sizes, self._experts = (layers, top_k), num_experts
        self._dtype = id_type(np.dtype(np.int64), num_experts).newbyteorder("<")
        # Beside the trace, where there is room for it.
        parent = None if path is None else path.parent
        self.folder = Path(tempfile.mkdtemp(prefix=".moetuner-", dir=parent))
        self._files = [(self.folder / name).open("wb") for name in ("expert_ids", "labels")]
        self.tokens = 0

    def append(self, ids: IdArray, labels: Labels) -> None:
        """Take tokens [T,L,K] and their labels [T]; what failed half-way is written anew."""
        for file, array in zip(self._files, (ids.astype(self._dtype), labels), strict=True):
            file.seek(self.tokens * math.prod(array.shape[1:]) * array.itemsize)
            file.write(array.tobytes())
            file.flush()
        self.tokens += len(ids)

    def discard(self) -> None:
        """Delete what was recorded."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(
        self, path: Path | None, source: str, group_names: list[str], **about: Any
    ) -> RoutingTrace:
        """Make the trace, and write it if there is a path; without names it has no groups.

        ``about`` is what ``TraceContents`` says of the model.
        """
        self._close()
        place = TensorInFile(self._dtype, (self.tokens, *self._sizes), 0)
        ids = Ids.in_file(self.folder / "expert_ids", place, self._experts)
        labels = np.fromfile(self.folder / "labels", LABEL, self.tokens)
        group = labels["group"] if group_names else None
        about |= {"sequence": labels["sequence"], "group": group, "group_names": group_names}
        if path is None:
            return RoutingTrace.from_arrays(ids.array(), num_experts=self._experts, **about)
        write_trace(TraceContents(ids, self._experts, **about), path, source, SHARD_BYTES)
        return RoutingTrace.load(path)

    def _close(self) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk was said when it was written to
                file.close()


capture = Recorder
