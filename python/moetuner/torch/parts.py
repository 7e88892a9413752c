"""Recorded tokens on their way to a trace: raw files that grow, then one trace from all of them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetuner import _trace_file
from moetuner._ids import IdsInFile
from moetuner._safetensors import Tensor
from moetuner._validation import IdArray, id_type
from moetuner.trace import SHARD_BYTES, RoutingTrace

SEQUENCE, GROUP = np.dtype("<i4"), np.dtype("<i2")


class Parts:
    """Tokens in the order in which they were served, on disk; memory holds none of them.

    Parameters
    ----------
    path
        Trace to write in the end; None gives a trace in memory.
    layers, top_k, num_experts
        Sizes L, K and E.
    """

    def __init__(self, path: Path | None, layers: int, top_k: int, num_experts: int) -> None:
        self._path = path
        self._sizes = (layers, top_k)
        self._experts = num_experts
        self._dtype = id_type(np.dtype(np.int64), num_experts).newbyteorder("<")
        # Beside the trace, where there is room for it.
        parent = None if path is None else path.parent
        self._folder = Path(tempfile.mkdtemp(prefix=".moetuner-", dir=parent))
        self._files = {
            name: (self._folder / name).open("wb") for name in ("expert_ids", "sequence", "group")
        }
        self.tokens = 0

    def append(self, ids: IdArray, sequence: NDArray[np.int32], group: NDArray[np.int16]) -> None:
        """Take tokens [T,L,K] and their labels [T]."""
        ids.astype(self._dtype, copy=False).tofile(self._files["expert_ids"])
        sequence.astype(SEQUENCE, copy=False).tofile(self._files["sequence"])
        group.astype(GROUP, copy=False).tofile(self._files["group"])
        self.tokens += len(ids)

    def discard(self) -> None:
        """Delete what was recorded."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def finish(
        self,
        group_names: list[str],
        model: str | None,
        source: str | None,
        expert_size: tuple[int, int] | None = None,
    ) -> RoutingTrace:
        """Make the trace; without names of groups it has none.

        Raises
        ------
        ValueError
            If a recorded id is wrong.
        OSError
            If the trace cannot be written.
        """
        for file in self._files.values():
            file.close()
        layers, top_k = self._sizes
        place = Tensor(self._dtype, (self.tokens, layers, top_k), 0)
        ids = IdsInFile.of(self._folder / "expert_ids", place, self._experts)
        sequence = np.fromfile(self._folder / "sequence", dtype=SEQUENCE)
        group = np.fromfile(self._folder / "group", dtype=GROUP) if group_names else None
        if self._path is None:
            return RoutingTrace.from_arrays(
                ids.array(),
                num_experts=self._experts,
                sequence=sequence,
                group=group,
                group_names=group_names,
                model=model,
                expert_size=expert_size,
            )
        contents = _trace_file.Contents(
            ids, self._experts, sequence, group, group_names, model, expert_size
        )
        _trace_file.write(contents, self._path, source, SHARD_BYTES)
        return RoutingTrace.load(self._path)
