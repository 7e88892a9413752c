"""From device to host without waiting, and to disk: a recording while it runs."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner._checks import IdArray, id_type
from moetuner.files.contents import TraceContents, write_trace
from moetuner.files.ids import IdsInFile
from moetuner.files.safetensors import TensorInFile
from moetuner.trace import SHARD_BYTES, RoutingTrace

# What a trace says of a token besides its experts.
LABEL = np.dtype([("sequence", "<i4"), ("group", "<i2")])
Labels = NDArray[np.void]


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
        ids = IdsInFile.of(self.folder / "expert_ids", place, self._experts)
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
