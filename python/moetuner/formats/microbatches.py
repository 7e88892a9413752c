"""Join ids of microbatches, which ranks recorded layer by layer, to a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import id_type, shown
from moetuner.files import naming
from moetuner.files.contents import TraceInParts
from moetuner.trace import RoutingTrace

# A step, the number of the microbatch in that step, and the rank.
Key = tuple[int, int, int]


class Microbatches:
    """Ids [t,K] of every microbatch by layer."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.layers: dict[Key, dict[int, NDArray[Any]]] = {}

    def add(self, key: Key, layer: int, ids: NDArray[Any]) -> None:
        """Add the ids of a layer."""
        where = f"step {key[0]}, layer {layer}"
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            got = f"{ids.dtype} {list(ids.shape)}"
            raise ValueError(f"{where} must be ids [tokens, top_k], got {got}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.experts:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"{where}: expert id {wrong} is not below num_experts {self.experts}")
        layers = self.layers.setdefault(key, {})
        if layer in layers:
            raise ValueError(f"{where}: rank {key[2]} is in another file too")
        layers[layer] = ids.astype(id_type(np.dtype(np.int64), self.experts))

    def trace(self, where: Path) -> RoutingTrace:
        """Join microbatches by step, then rank: each is a sequence, and every rank a group."""
        numbers = sorted(set().union(*self.layers.values()))
        keys = sorted(self.layers)
        last = {rank: step for step, _, rank in keys}
        ranks = sorted(last)
        trace = TraceInParts(self.experts)
        for sequence, (step, _, rank) in enumerate(keys):
            layers = self.layers.pop(keys[sequence])
            place = f"{where}: step {step}, rank {rank}"
            missing = sorted(set(numbers) - layers.keys())
            if missing:
                raise ValueError(
                    f"{place}: must have ids of each of layers {shown(numbers)}, got none of layer "
                    f"{missing[0]}: a file is cut off or missing"
                )
            sizes = {layers[layer].shape for layer in numbers}
            if len(sizes) > 1:
                raise ValueError(f"{place}: layers must have the same tokens, got {sorted(sizes)}")
            ids = np.stack([layers[layer] for layer in numbers], axis=1)
            if trace.ids and trace.ids[0].shape[1:] != ids.shape[1:]:
                raise ValueError(f"{where}: all ids must have the same top-k, got several")
            with naming(where):
                labels = np.full(len(ids), sequence), np.full(len(ids), ranks.index(rank))
                trace.add(ids, sequence=labels[0], group=labels[1])
        short, long = min(last, key=lambda r: (last[r], r)), max(last, key=lambda r: last[r])
        if last[short] != last[long]:
            raise ValueError(
                f"{where}: rank {short} must have steps to {last[long]} like rank {long}, "
                f"got {last[short]} as its last: the file is cut off"
            )
        names = [f"rank {rank}" for rank in ranks]
        return RoutingTrace(**vars(trace.contents(group_names=names)))

    def join_stages(self) -> None:
        """Join the layers of a microbatch from several pipeline stages, under the first rank.

        Stages are the outermost of Megatron's groups, so ranks of a stage have consecutive numbers,
        and the n-th ranks of all stages have the same tokens. Ranks that are no stages stay apart.
        """
        layers_of: dict[int, set[int]] = {}
        for (_, _, rank), layers in self.layers.items():
            layers_of.setdefault(rank, set()).update(layers)
        stages: dict[frozenset[int], list[int]] = {}
        for rank in sorted(layers_of):
            stages.setdefault(frozenset(layers_of[rank]), []).append(rank)
        overlap = sum(map(len, stages)) > len(set().union(*stages))
        if overlap or len({len(ranks) for ranks in stages.values()}) > 1:
            return
        first = {rank: peers[0] for peers in zip(*stages.values(), strict=True) for rank in peers}
        joined: dict[Key, dict[int, NDArray[Any]]] = {}
        for (step, turn, rank), layers in self.layers.items():
            joined.setdefault((step, turn, first[rank]), {}).update(layers)
        self.layers = joined
