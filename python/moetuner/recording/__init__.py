"""Recording: what traces and counts both are, so that callers ask what they need, not which it is.

A recording has rows in the order of time: tokens of a trace, or windows of counts. What only one of
the two has is None or empty for the other; what only one can do is a method of that class.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner.files.ids import LeftOut

Integers = NDArray[np.integer[Any]]
AnyRecording = TypeVar("AnyRecording", bound="Recording")
Value = TypeVar("Value")


class Recording:
    """Base of ``RoutingTrace`` and ``RoutingStatistics``.

    Attributes
    ----------
    ordered
        Whether single tokens are known, in the order in which they were served. If not, the
        recording is counts, which bring windows of their own.
    unit
        What a row is.
    noun
        What to call the recording in a sentence.
    num_experts
        Experts per layer, E.
    group
        Group of every row, an index into ``group_names``; None without groups.
    group_names, model, expert_size
        Names of the groups, name of the model, hidden and intermediate size of an expert.
    """

    ordered: ClassVar[bool]
    unit: ClassVar[Literal["token", "window"]]
    noun: ClassVar[str]
    num_experts: int
    group: Integers | None
    group_names: tuple[str, ...]
    model: str | None
    expert_size: tuple[int, int] | None

    @property
    def length(self) -> int:
        """Number of rows: of tokens, or of windows."""
        raise NotImplementedError

    @property
    def layers(self) -> int:
        """Number of MoE layers, L."""
        raise NotImplementedError

    @property
    def top_k(self) -> int | None:
        """Experts per token and layer, K; None if not known."""
        raise NotImplementedError

    @property
    def window(self) -> int | None:
        """Tokens of a window that the recording brings; None if it brings none, or of no length."""
        return None

    @property
    def sequence(self) -> NDArray[np.int32] | None:
        """Sequence of every token; None if not known."""
        return None

    @property
    def sequences(self) -> int | None:
        """Number of sequences that have tokens; None if not known."""
        return None

    @property
    def left_out(self) -> LeftOut | None:
        """Hidden layers of the model and its dense ones, where some were left out."""
        return None

    @property
    def has_pairs(self) -> bool:
        """Whether pairs are counted, over all rows together, so that no part has its own."""
        return False

    @property
    def is_empty(self) -> bool:
        """Whether no expert was ever chosen."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """How often experts were chosen, in all layers."""
        raise NotImplementedError

    @property
    def size(self) -> dict[str, int]:
        """Return the number of rows by the name of their unit, as JSON has it."""
        return {f"{self.unit}s": self.length}

    def facts(self) -> dict[str, Any]:
        """Return kind and sizes, for JSON."""
        return {
            "model": self.model,
            "layers": self.layers,
            "num_experts": self.num_experts,
            "group_names": [] if self.group is None else [*self.group_names],
        }

    def group_rows(self) -> dict[str | None, Integers]:
        """Return the numbers of all rows (by None), and of every group that has some."""
        kind: type[np.signedinteger[Any]] = np.int32 if self.length < 1 << 31 else np.int64
        rows: dict[str | None, Integers] = {None: np.arange(self.length, dtype=kind)}
        if self.group is not None:
            for number, group in enumerate(self.group_names):
                in_group = np.flatnonzero(self.group == number).astype(kind)
                if in_group.size:
                    rows[group] = in_group
        return rows

    def rows_in(self, window: int | None) -> int:
        """Return the rows of a window of so many tokens, of all if None; counts are windows."""
        raise NotImplementedError

    def take(self: AnyRecording, rows: ArrayLike) -> AnyRecording:
        """Return some rows: those of a mask, or numbered ones in the order wanted, each once."""
        raise NotImplementedError

    def without_pairs(self: AnyRecording) -> AnyRecording:
        """Return the same without what is counted over all rows together: pairs and sets."""
        return self

    @cached_property
    def known(self) -> dict[Any, Any]:
        """Results computed from this recording, by their keys; recordings do not change."""
        return {}

    def compute_once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return the result of ``compute``, which is called once for each key."""
        if key not in self.known:
            self.known[key] = compute()
        return cast(Value, self.known[key])

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the computed results, which no pickle or copy takes along."""
        return {name: value for name, value in self.__dict__.items() if name != "known"}
