"""RoutingStatistics: windows of load, transitions and co-activation. Plain counts, so they add up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner._files import replacing
from moetuner.trace import RoutingTrace

FORMAT = "moetuner.statistics"


@dataclass(frozen=True, eq=False)
class RoutingStatistics:
    """What a placement needs to know of a trace.

    Parameters
    ----------
    window_load
        Tokens per window, layer and expert [W,L,E].
    transitions
        Tokens routed to expert e in layer l and to f in layer l+1 [L-1,E,E]; None if not counted.
    coactivation
        Tokens routed to e and f in one layer [L,E,E], symmetric, zero diagonal; None if not counted.
    window
        Tokens per window; None where windows are something else (a whole trace, a prompt, a language).
    group
        Group of every window [W], an index into ``group_names``; None without groups.
    """

    window_load: NDArray[np.uint64]
    transitions: NDArray[np.uint64] | None = None
    coactivation: NDArray[np.uint64] | None = None
    window: int | None = None
    group: NDArray[np.int64] | None = None
    group_names: tuple[str, ...] = ()
    model: str | None = None

    def __post_init__(self) -> None:
        load = _counts("load", self.window_load, "[windows, layers, experts]")
        if 0 in load.shape:
            raise ValueError(f"load must have at least one window, layer and expert, got {list(load.shape)}")
        object.__setattr__(self, "window_load", load)
        _, layers, experts = load.shape
        for name, n in (("transitions", layers - 1), ("coactivation", layers)):
            table = getattr(self, name)
            if table is None:
                continue
            table = _counts(name, table, "[.., experts, experts]")
            if table.shape != (n, experts, experts):
                raise ValueError(f"{name} must be [{n}, {experts}, {experts}], got {list(table.shape)}")
            object.__setattr__(self, name, table)
        if self.group is not None:
            group = np.asarray(self.group)
            if group.shape != (load.shape[0],) or not np.issubdtype(group.dtype, np.integer):
                raise ValueError(f"group must be integers [{load.shape[0]}], got {list(group.shape)}")
            if group.min() < 0 or group.max() >= len(self.group_names):
                raise ValueError(
                    f"group must be from 0 to {len(self.group_names) - 1}, got {group.min()} to {group.max()}"
                )
            object.__setattr__(self, "group", group.astype(np.int64))
        object.__setattr__(self, "group_names", tuple(self.group_names))

    @classmethod
    def from_trace(
        cls,
        trace: RoutingTrace,
        *,
        window: int | None = None,
        transitions: bool = True,
        coactivation: bool = True,
        threads: int | None = None,
    ) -> RoutingStatistics:
        """Count a trace, shard by shard; memory holds one shard and the counts.

        Parameters
        ----------
        trace
            The routing to count.
        window
            Tokens per window of load; None counts the whole trace as one window.
        transitions, coactivation
            Whether to count these pairs.
        threads
            Threads to use, all cores by default. The counts do not depend on it.
        """
        counter = _core.StatisticsCounter(
            trace.layers,
            trace.num_experts,
            trace.top_k,
            window=window,
            transitions=transitions,
            coactivation=coactivation,
        )
        for shard in trace.shards():
            counter.push(shard, threads)
        _, load, pairs, together = counter.finish()
        return cls(load, pairs, together, window=window, model=trace.model)

    @classmethod
    def from_load(cls, load: ArrayLike, **fields: Any) -> RoutingStatistics:
        """Wrap a load table [W,L,E] (or [L,E], one window); no pairs are known."""
        load = np.asarray(load)
        return cls(load[None] if load.ndim == 2 else load, **fields)

    @property
    def windows(self) -> int:
        """Number of windows, W."""
        return int(self.window_load.shape[0])

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        return int(self.window_load.shape[1])

    @property
    def experts(self) -> int:
        """Experts per layer, E."""
        return int(self.window_load.shape[2])

    @cached_property
    def total_load(self) -> NDArray[np.uint64]:
        """Load over all windows [L,E]."""
        total: NDArray[np.uint64] = self.window_load.sum(axis=0, dtype=np.uint64)
        return total

    @property
    def transitions_or_empty(self) -> NDArray[np.uint64]:
        """Transitions, or no tables at all where they were not counted."""
        return self.transitions if self.transitions is not None else self._no_tables

    @property
    def coactivation_or_empty(self) -> NDArray[np.uint64]:
        """Co-activation, or no tables at all where it was not counted."""
        return self.coactivation if self.coactivation is not None else self._no_tables

    @property
    def _no_tables(self) -> NDArray[np.uint64]:
        return np.zeros((0, self.experts, self.experts), dtype=np.uint64)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of all counts: two statistics with the same fingerprint are the same."""
        digest = hashlib.sha256()
        for table in (self.window_load, self.transitions, self.coactivation):
            if table is None:
                digest.update(b"none")
            else:
                digest.update(repr(table.shape).encode())
                digest.update(np.ascontiguousarray(table, dtype="<u8").data)
        return digest.hexdigest()[:16]

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Statistics of both traces: windows one after the other, pairs summed.

        Pairs that only one side has counted are dropped. Groups are kept where both sides name the same ones.
        """
        if not isinstance(other, RoutingStatistics):
            return NotImplemented
        if self.window_load.shape[1:] != other.window_load.shape[1:]:
            raise ValueError(
                "statistics must have the same layers and experts, got "
                f"{list(self.window_load.shape[1:])} and {list(other.window_load.shape[1:])}"
            )
        group = None
        names = self.group_names if self.group_names == other.group_names else ()
        if names and self.group is not None and other.group is not None:
            group = np.concatenate([self.group, other.group])
        return RoutingStatistics(
            np.concatenate([self.window_load, other.window_load]),
            _sum(self.transitions, other.transitions),
            _sum(self.coactivation, other.coactivation),
            window=self.window if self.window == other.window else None,
            group=group,
            group_names=names if group is not None else (),
            model=self.model if self.model == other.model else None,
        )

    @classmethod
    def sum(cls, parts: Iterable[RoutingStatistics]) -> RoutingStatistics:
        """Add many: of shards, ranks or days."""
        parts = iter(parts)
        total = next(parts, None)
        if total is None:
            raise ValueError("sum needs at least one RoutingStatistics")
        for part in parts:
            total = total + part
        return total

    def save(self, path: str | Path) -> None:
        """Write as safetensors; the file appears whole or not at all."""
        tensors = {"load": self.window_load}
        for name in ("transitions", "coactivation", "group"):
            table = getattr(self, name)
            if table is not None:
                tensors[name] = table
        metadata = {
            "format": FORMAT,
            "version": "1",
            "group_names": json.dumps(self.group_names),
            **({"window": str(self.window)} if self.window is not None else {}),
            **({"model": self.model} if self.model is not None else {}),
        }
        with replacing(path) as temporary:
            safetensors.numpy.save_file(
                {name: np.ascontiguousarray(table) for name, table in tensors.items()},
                temporary,
                metadata=metadata,
            )

    @classmethod
    def load(cls, path: str | Path) -> RoutingStatistics:
        """Read statistics that ``save`` wrote.

        Raises
        ------
        ValueError
            If the file is truncated, corrupt, or something else.
        """
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"format must be {FORMAT!r}, got {metadata.get('format')!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            window = metadata.get("window")
            return cls(
                tensors["load"],
                tensors.get("transitions"),
                tensors.get("coactivation"),
                window=None if window is None else int(window),
                group=tensors.get("group"),
                group_names=tuple(json.loads(metadata.get("group_names", "[]"))),
                model=metadata.get("model"),
            )
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not moetuner statistics: {error}") from None


def _counts(name: str, table: Any, dimensions: str) -> NDArray[np.uint64]:
    """Turn a table of counts into uint64, or say what is wrong with it."""
    table = np.asarray(table)
    if table.ndim != 3 or table.dtype.kind not in "uif":
        raise ValueError(f"{name} must be numbers {dimensions}, got {table.dtype} {list(table.shape)}")
    if table.dtype.kind == "u":
        return np.ascontiguousarray(table, dtype=np.uint64)
    wrong = ~((table >= 0) & (table < 2.0**63) & (np.floor(table) == table))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name} must be whole counts of at least 0, got {table[at]} at {list(at)}")
    return np.ascontiguousarray(table.astype(np.uint64))


def _sum(a: NDArray[np.uint64] | None, b: NDArray[np.uint64] | None) -> NDArray[np.uint64] | None:
    return None if a is None or b is None else a + b
