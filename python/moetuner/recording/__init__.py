"""Recording: the base class of traces and counts, so that callers need not tell them apart.

A recording has rows in the order of time: tokens of a trace, or windows of counts. An attribute
that only one of the two has is None or empty for the other; a method that makes sense for only one
is in its class.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _checks as check
from moetuner.files.ids import LeftOut
from moetuner.recording.population import Population

Integers = NDArray[np.integer[Any]]
AnyRecording = TypeVar("AnyRecording", bound="Recording")
Value = TypeVar("Value")


class Recording:
    """Base of ``RoutingTrace`` and ``RoutingStatistics``.

    Attributes
    ----------
    ordered
        True if rows are single tokens, in the order in which they were served. If not, the
        recording is counts, which have windows of their own.
    unit
        Name of a row.
    noun
        Name of the recording in a sentence.
    num_experts
        Experts per layer, E.
    group
        Group of every row, an index into ``group_names``; None without groups.
    group_names, model, expert_size
        Names of the groups, name of the model, hidden and intermediate size of an expert.
    population
        Population that the rows were drawn from, if ``moetuner.count`` drew them; else None.
    """

    ordered: ClassVar[bool]
    unit: ClassVar[Literal["token", "window"]]
    noun: ClassVar[str]
    num_experts: int
    group: Integers | None
    group_names: tuple[str, ...]
    model: str | None
    expert_size: tuple[int, int] | None
    population: Population | None

    @property
    def length(self) -> int:
        """Number of rows, which are tokens or windows."""
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
        """Tokens of a window of counts; None for a trace, or if windows have no common length."""
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
        """Hidden layers of the model, and the numbers of dense ones; None if none was left out."""
        return None

    @property
    def has_pairs(self) -> bool:
        """True if pairs were counted, over all rows together: selected rows have none."""
        return False

    @property
    def is_empty(self) -> bool:
        """True if no expert was ever chosen."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """How often experts were chosen, in all layers."""
        raise NotImplementedError

    @property
    def size(self) -> dict[str, int]:
        """Number of rows by the name of their unit, as JSON has it."""
        return {f"{self.unit}s": self.length}

    def facts(self) -> dict[str, Any]:
        """Return kind and sizes, for JSON."""
        counted = {} if self.population is None else {"counted": self.population.facts()}
        return {
            "model": self.model,
            "layers": self.layers,
            "num_experts": self.num_experts,
            "group_names": [] if self.group is None else [*self.group_names],
            **counted,
        }

    def group_rows(self) -> dict[str | None, Integers]:
        """Return the numbers of all rows, by None, and of the rows of every group, by its name."""
        kind: type[np.signedinteger[Any]] = np.int32 if self.length < 1 << 31 else np.int64
        rows: dict[str | None, Integers] = {None: np.arange(self.length, dtype=kind)}
        if self.group is not None:
            for number, group in enumerate(self.group_names):
                in_group = np.flatnonzero(self.group == number).astype(kind)
                if in_group.size:
                    rows[group] = in_group
        return rows

    def rows_in(self, window: int | None) -> int:
        """Return the rows of a window of so many tokens, of all tokens if None; 1 for counts."""
        raise NotImplementedError

    def take(self: AnyRecording, rows: ArrayLike) -> AnyRecording:
        """Return some rows: of a mask, or by distinct numbers, in their order."""
        raise NotImplementedError

    def _check_population(self) -> None:
        """Raise unless the population, if there is one, is what these rows were drawn from."""
        if self.population is None:
            return
        check.instance("population", self.population, Population)
        group = np.zeros(self.length, np.int64) if self.group is None else self.group
        groups = 1 if self.group is None else len(self.group_names)
        rows = np.bincount(group, minlength=groups)
        self.population.check_fits(self.sequence, rows, self.layers, self.num_experts)

    def without_pairs(self: AnyRecording) -> AnyRecording:
        """Return the recording without pairs and sets, which belong to all rows together."""
        return self

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """Results computed from this recording, by their keys; recordings do not change."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the computed results, which no pickle or copy takes along."""
        return {name: value for name, value in self.__dict__.items() if name != "memo"}


def compute_once(recording: Recording, key: Hashable, compute: Callable[[], Value]) -> Value:
    """Return the result of ``compute``, which is called once for each key of a recording."""
    if key not in recording.memo:
        recording.memo[key] = compute()
    return cast(Value, recording.memo[key])
