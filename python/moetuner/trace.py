"""RoutingTrace: which experts every token visited."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Skeleton: to be completed."""

    expert_ids: NDArray[Any]
    num_experts: int
    sequence: NDArray[np.int32] | None = None
    group: NDArray[np.int16] | None = None
    group_names: tuple[str, ...] = ()
    model: str | None = None

    @classmethod
    def from_arrays(cls, expert_ids: ArrayLike, *, num_experts: int, **fields: Any) -> RoutingTrace:
        """Validate and wrap."""
        ids = np.ascontiguousarray(expert_ids)
        _core.validate(ids, num_experts)
        return cls(ids, num_experts, **fields)

    @property
    def layers(self) -> int:
        """L."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.expert_ids.shape[2])

    def shards(self, tokens: int = 1 << 16) -> Iterator[NDArray[Any]]:
        """Runs of tokens."""
        for start in range(0, len(self.expert_ids), tokens):
            yield self.expert_ids[start : start + tokens]
