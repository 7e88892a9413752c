"""From device to host without waiting, and to disk: a recording while it runs."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner._checks import IdArray, id_type
from moetuner.files.contents import TraceContents, write_trace
from moetuner.files.ids import IdsInFile
from moetuner.files.safetensors import TensorInFile
from moetuner.trace import SHARD_BYTES, RoutingTrace

Labels = tuple[NDArray[np.int32], NDArray[np.int16]]
Receive = Callable[[IdArray, NDArray[np.bool_], Labels], None]


class Offload:
    """Copies ids to the host without waiting for the device, and hands them over later.

    On CUDA they go to pinned memory behind the work of their step. When enough steps wait, those of
    the older half are handed over: the host waits only for work that is long done.

    Parameters
    ----------
    capacity
        Tokens that wait at most, beside the last step.
    receive
        Called on the host, in order, with ids [T,L,K], which of them to keep [T] and the labels.
    """

    def __init__(self, capacity: int, receive: Receive) -> None:
        self._capacity = capacity
        self._receive = receive
        self._waiting: list[tuple[Tensor, Tensor, Labels, torch.cuda.Event | None]] = []
        self._tokens = 0

    def put(self, ids: Tensor, keep: Tensor, labels: Labels) -> None:
        """Take ids [T,L,K], marks [T] and labels ([T], [T])."""
        # Copies that need not wait go to pinned memory.
        host = ids.to("cpu", non_blocking=True), keep.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(ids.device).record_event() if ids.is_cuda else None
        self._waiting.append((*host, labels, copied))
        self._tokens += len(ids)
        if self._tokens > self._capacity:
            self._hand_over(self._capacity // 2, last=1)

    def flush(self) -> None:
        """Hand over everything; waits for the device."""
        self._hand_over(-1)

    def _hand_over(self, most: int, last: int = 0) -> None:
        """Receive first steps until at most so many tokens wait, and so many last steps."""
        count, left = 0, self._tokens
        while left > most and count < len(self._waiting) - last:
            *_, copied = self._waiting[count]
            if copied is not None:
                copied.synchronize()
            left -= len(self._waiting[count][0])
            count += 1
        if not count:
            return
        ids, keep, labels, _ = zip(*self._waiting[:count], strict=True)
        sequence, group = (np.concatenate(part) for part in zip(*labels, strict=True))
        self._receive(torch.cat(ids).numpy(), torch.cat(keep).numpy(), (sequence, group))
        del self._waiting[:count]
        self._tokens = left


SEQUENCE, GROUP = np.dtype("<i4"), np.dtype("<i2")


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
        self._sizes = (layers, top_k)
        self._experts = num_experts
        self._dtype = id_type(np.dtype(np.int64), num_experts).newbyteorder("<")
        # Beside the trace, where there is room for it.
        parent = None if path is None else path.parent
        self.folder = Path(tempfile.mkdtemp(prefix=".moetuner-", dir=parent))
        self._files = {
            name: (self.folder / name).open("wb") for name in ("expert_ids", "sequence", "group")
        }
        self.tokens = 0

    def append(self, ids: IdArray, sequence: NDArray[np.int32], group: NDArray[np.int16]) -> None:
        """Take tokens [T,L,K] and their labels [T]; what failed half-way is written anew."""
        arrays = {
            "expert_ids": np.ascontiguousarray(ids, dtype=self._dtype),
            "sequence": np.ascontiguousarray(sequence, dtype=SEQUENCE),
            "group": np.ascontiguousarray(group, dtype=GROUP),
        }
        for name, array in arrays.items():
            self._files[name].seek(self.tokens * math.prod(array.shape[1:]) * array.itemsize)
            self._files[name].write(array.data)
            self._files[name].flush()
        self.tokens += len(ids)

    def discard(self) -> None:
        """Delete what was recorded."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(
        self,
        path: Path | None,
        group_names: list[str],
        model: str | None,
        source: str | None,
        expert_size: tuple[int, int] | None = None,
    ) -> RoutingTrace:
        """Make the trace, and write it if there is a path; without names it has no groups."""
        self._close()
        layers, top_k = self._sizes
        place = TensorInFile(self._dtype, (self.tokens, layers, top_k), 0)
        ids = IdsInFile.of(self.folder / "expert_ids", place, self._experts)
        count = self.tokens
        sequence = np.fromfile(self.folder / "sequence", SEQUENCE, count)
        group = np.fromfile(self.folder / "group", GROUP, count) if group_names else None
        if path is None:
            return RoutingTrace.from_arrays(
                ids.array(),
                num_experts=self._experts,
                sequence=sequence,
                group=group,
                group_names=group_names,
                model=model,
                expert_size=expert_size,
            )
        contents = TraceContents(
            ids, self._experts, sequence, group, group_names, model, expert_size
        )
        write_trace(contents, path, source, SHARD_BYTES)
        return RoutingTrace.load(path)

    def _close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk was said when it was written to
                file.close()
