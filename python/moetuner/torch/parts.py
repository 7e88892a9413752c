"""Recorded tokens on their way to a trace: raw files that grow, then one trace from all of them."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import IdArray, id_type
from moetuner.files.contents import TraceContents, write_trace
from moetuner.files.ids import IdsInFile
from moetuner.files.safetensors import TensorInFile
from moetuner.trace import SHARD_BYTES, RoutingTrace

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
        """Make the trace and write it to a path, if there is one; without names it has no groups.

        Raises
        ------
        ValueError
            If a recorded id is wrong.
        OSError
            If the trace cannot be written.
        """
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
