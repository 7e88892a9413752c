"""From device to host without waiting: a bounded buffer that leaves while the next one fills."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
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
Receive = Callable[[IdArray, NDArray[np.bool_], list[Labels]], None]


@dataclass
class _Half:
    """Ids [capacity,L,K] and marks [capacity] on the device, and their copies on the host."""

    ids: Tensor
    keep: Tensor
    host_ids: Tensor
    host_keep: Tensor
    filled: int = 0
    labels: list[Labels] = field(default_factory=list)
    copied: torch.cuda.Event | None = None


class Offload:
    """Two halves: one takes what the device writes while the other is copied to the host.

    On CUDA the copies go to pinned memory on a stream of their own, so the host only waits if a
    half fills sooner than the one before it has left. Elsewhere the copy is made at once.

    Parameters
    ----------
    capacity
        Tokens of a half.
    receive
        Called on the host, in order, with ids [T,L,K], which of them to keep [T] and the labels.
        The arrays are overwritten afterwards.
    """

    def __init__(self, capacity: int, receive: Receive) -> None:
        self._capacity = capacity
        self._receive = receive
        self._halves: list[_Half] = []
        self._stream: torch.cuda.Stream | None = None

    def put(self, ids: Tensor, keep: Tensor | None, labels: Labels) -> None:
        """Take ids [T,L,K], marks [T] (None keeps all) and labels ([T], [T])."""
        if not self._halves:
            self._allocate(ids)
        first = 0
        while first < len(ids):
            half = self._halves[0]
            if half.filled == self._capacity:
                self._turn()
                continue
            count = min(len(ids) - first, self._capacity - half.filled)
            here, there = slice(half.filled, half.filled + count), slice(first, first + count)
            half.ids[here].copy_(ids[there], non_blocking=True)
            if keep is None:
                half.keep[here] = True
            else:
                half.keep[here].copy_(keep[there], non_blocking=True)
            half.labels.append((labels[0][there], labels[1][there]))
            half.filled += count
            first += count

    def flush(self) -> None:
        """Hand over everything; waits for the device."""
        if self._halves:
            self._turn()
            self._turn()

    def _turn(self) -> None:
        """Send the full half on its way and make room in the other."""
        full, other = self._halves
        if full.filled:
            self._send(full)
        self._halves = [other, full]
        self._arrive(other)

    def _send(self, half: _Half) -> None:
        n = half.filled
        if self._stream is None:
            half.host_ids[:n].copy_(half.ids[:n])
            half.host_keep[:n].copy_(half.keep[:n])
            return
        self._stream.wait_stream(torch.cuda.current_stream(half.ids.device))
        with torch.cuda.stream(self._stream):
            half.host_ids[:n].copy_(half.ids[:n], non_blocking=True)
            half.host_keep[:n].copy_(half.keep[:n], non_blocking=True)
            half.copied = self._stream.record_event()

    def _arrive(self, half: _Half) -> None:
        """Receive a half on the host; from then on the device may write to it again."""
        if not half.filled:
            return
        if half.copied is not None:
            half.copied.synchronize()
        n = half.filled
        self._receive(half.host_ids[:n].numpy(), half.host_keep[:n].numpy(), half.labels)
        half.filled, half.labels, half.copied = 0, [], None

    def _allocate(self, ids: Tensor) -> None:
        cuda = ids.device.type == "cuda"
        sizes = (self._capacity, *ids.shape[1:])
        # Tensors born in inference mode could not be written outside it.
        with torch.inference_mode(False):
            for _ in range(2):
                half = _Half(
                    torch.empty(sizes, dtype=ids.dtype, device=ids.device),
                    torch.empty(self._capacity, dtype=torch.bool, device=ids.device),
                    torch.empty(sizes, dtype=ids.dtype, pin_memory=cuda),
                    torch.empty(self._capacity, dtype=torch.bool, pin_memory=cuda),
                )
                self._halves.append(half)
            if cuda:
                self._stream = torch.cuda.Stream(ids.device)  # type: ignore[no-untyped-call]


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
        layers, top_k = self._sizes
        for name, array, dtype, each in (
            ("expert_ids", ids, self._dtype, layers * top_k),
            ("sequence", sequence, SEQUENCE, 1),
            ("group", group, GROUP, 1),
        ):
            self._files[name].seek(self.tokens * each * dtype.itemsize)
            self._files[name].write(np.ascontiguousarray(array, dtype=dtype).data)
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
