"""Rows of layer and expert, as tables have them, put together to a trace or to counts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT, LAYER_LIMIT, shown
from moetuner.formats.hints import Hints, Traffic
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

COLUMNS = ("token", "layer", "expert", "sequence", "group", "weight")
# Cells of a table that may be larger than the rows that fill it, and cells for each row: a token
# with one of 128 experts leaves as many empty.
FREE_CELLS, CELLS_PER_ROW = 1 << 22, 128
# As Python writes it, so that no two texts are one number.
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)


@dataclass
class Labels:
    """Names, numbered in the order in which they appear; 7 and "7" are the same."""

    numbers: dict[Any, int] = field(default_factory=dict)
    seen: dict[Any, int] = field(default_factory=dict)

    def of(self, values: Any) -> NDArray[np.int32]:
        """Return the numbers of some of them."""
        if isinstance(values, np.ndarray):
            found, first, place = np.unique(values, return_index=True, return_inverse=True)
            order = np.argsort(first)
            known = np.empty(len(found), dtype=np.int32)
            known[order] = self.of(found[order].tolist())
            return known[place]
        seen = self.seen
        return np.asarray(
            [seen[value] if value in seen else self._new(value) for value in values],
            dtype=np.int32,
        )

    def _new(self, value: Any) -> int:
        name = value
        if isinstance(value, str) and INTEGER.fullmatch(value):
            name = int(value)
        number = self.numbers.setdefault(name, len(self.numbers))
        self.seen[value] = number
        return number


def as_integers(labels: Labels, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return labels themselves where all are integers of 32 bits, else their numbers."""
    known = list(labels.numbers)
    if not all(type(value) is int and -(1 << 31) <= value < 1 << 31 for value in known):
        return numbers
    return np.asarray(known, dtype=np.int32)[numbers]


class Rows:
    """Columns of a table so far, narrow; a row is one choice of a token, or a count.

    With a column ``token`` the rows are a trace: those of one token (of one sequence, where there
    is a column ``sequence``) and layer are its experts, and a column ``weight`` is the router's and
    left out. Without, they are counts, of ``weight`` tokens each, in windows by sequence, else by
    group. Layers may be numbered in any way that keeps their order.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = [name for name in COLUMNS if name in names]
        missing = [name for name in ("layer", "expert") if name not in names]
        if missing:
            raise ValueError(
                f"must have columns 'layer' and 'expert' (and may have 'token', 'sequence', "
                f"'group', 'weight'), got {names[:8]}"
            )
        self.is_trace = "token" in names
        if self.is_trace and "weight" in self.names:
            self.names.remove("weight")
        self.parts: dict[str, list[NDArray[Any]]] = {name: [] for name in self.names}
        self.groups, self.sequences = Labels(), Labels()
        self.count = 0

    def add(self, columns: dict[str, Any]) -> None:
        """Take in rows: integers, and any values for sequences and groups.

        Raises
        ------
        ValueError
            Naming the column that is wrong.
        """
        for name in self.names:
            values = columns[name]
            if name in ("sequence", "group"):
                labels = self.groups if name == "group" else self.sequences
                self.parts[name].append(labels.of(values))
                continue
            limit = {"layer": LAYER_LIMIT, "expert": EXPERT_LIMIT}.get(name)
            found = _integers(name, values, limit or 1 << 48)
            self.parts[name].append(found.astype(np.uint16) if limit else found)
        self.count += len(columns["layer"])

    def traffic(self, hints: Hints) -> Traffic:
        """Return the trace or the counts.

        Raises
        ------
        ValueError
            If a token has not as many experts in one layer as in another, or experts are unknown.
        """
        if not self.count:
            raise ValueError("must have at least one row, got none")
        columns = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        self.parts = {}
        layers, layer = np.unique(columns.pop("layer"), return_inverse=True)
        if hints.dense_layers is not None:
            wrong = sorted(set(layers.tolist()) & set(hints.dense_layers))
            if wrong:
                raise ValueError(
                    f"layer {wrong[0]} must be dense as dense_layers says, got experts of it"
                )
        build = self._trace if self.is_trace else self._counts
        return build(columns, layer, layers, hints)

    def _names(self, labels: Labels) -> list[str]:
        names = [str(value) for value in labels.numbers]
        if len(set(names)) < len(names):
            raise ValueError("groups must differ as texts")
        return names

    def _trace(
        self,
        columns: dict[str, NDArray[Any]],
        layer: NDArray[np.intp],
        layers: NDArray[Any],
        hints: Hints,
    ) -> RoutingTrace:
        if hints.num_experts is None:
            raise ValueError("num_experts is needed: the file does not say it")
        first, token = _numbered(columns["token"], columns.get("sequence"))
        tokens = len(first)
        if tokens * len(layers) > max(self.count, FREE_CELLS):
            raise ValueError(
                f"each token must have experts in each layer, got {self.count} rows for {tokens} "
                f"tokens and {len(layers)} layers"
            )
        cell = token * len(layers) + layer
        sizes = np.bincount(cell, minlength=tokens * len(layers))
        if (sizes != sizes[0]).any():
            at = int(np.argmax(sizes != sizes[0]))
            row = first[at // len(layers)]
            raise ValueError(
                f"token {columns['token'][row]} must have {sizes[0]} experts in layer "
                f"{layers[at % len(layers)]} like token {columns['token'][first[0]]} in layer "
                f"{layers[0]}, got {sizes[at]}"
            )
        order = np.argsort(cell, kind="stable")
        ids = columns["expert"][order].reshape(tokens, len(layers), -1)
        group = columns.get("group")
        sequence = columns.get("sequence")
        for name, labels in (("group", group), ("sequence", sequence)):
            if labels is not None and (labels != labels[first][token]).any():
                row = int(np.argmax(labels != labels[first][token]))
                raise ValueError(f"token {columns['token'][row]} must be of one {name}, not two")
        return RoutingTrace.from_arrays(
            ids,
            num_experts=hints.num_experts,
            sequence=None if sequence is None else as_integers(self.sequences, sequence[first]),
            group=None if group is None else group[first],
            group_names=None if group is None else self._names(self.groups),
        )

    def _counts(
        self,
        columns: dict[str, NDArray[Any]],
        layer: NDArray[np.intp],
        layers: NDArray[Any],
        hints: Hints,
    ) -> RoutingStatistics:
        expert = columns["expert"].astype(np.int64)
        experts = int(expert.max()) + 1 if hints.num_experts is None else hints.num_experts
        if expert.max() >= experts:
            raise ValueError(f"expert {expert.max()} must be below num_experts {experts}")
        by = next((name for name in ("sequence", "group") if name in columns), None)
        window = np.zeros(self.count, dtype=np.int64) if by is None else columns[by]
        windows = int(window.max()) + 1
        if windows * len(layers) * experts > max(FREE_CELLS, CELLS_PER_ROW * self.count):
            raise ValueError(
                f"counts must fill their table, got {self.count} rows for {windows} windows of "
                f"{len(layers)} layers x {experts} experts"
            )
        load = np.zeros(windows * len(layers) * experts, dtype=np.int64)
        cell = (window.astype(np.int64) * len(layers) + layer) * experts + expert
        weight = columns.get("weight")
        if weight is not None and not float(weight.sum(dtype=np.float64)) < 2.0**63:
            raise ValueError("weight must add up to less than 2**63")
        np.add.at(load, cell, 1 if weight is None else weight)
        group = columns.get("group")
        of_window = None
        if group is not None:
            of_window = np.zeros(windows, dtype=np.int64)
            of_window[window] = group
            if (of_window[window] != group).any():
                raise ValueError("each sequence must be of one group, got several")
        return RoutingStatistics.from_load(
            load.reshape(windows, len(layers), experts),
            group=of_window,
            group_names=() if group is None else tuple(self._names(self.groups)),
        )


def _numbered(
    token: NDArray[Any], sequence: NDArray[Any] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First row of every token, in the order in which they appear, and the token of every row."""
    key = token
    if sequence is not None:
        _, dense = np.unique(token, return_inverse=True)
        key = sequence.astype(np.int64) * (int(dense.max()) + 1) + dense
    _, first, token_of = np.unique(key, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(order), dtype=np.intp)
    number[order] = np.arange(len(order))
    return first[order], number[token_of]


def _integers(name: str, values: Any, limit: int) -> NDArray[np.int64]:
    """Check whole numbers from 0, or texts of them."""
    try:
        if len(values) and isinstance(values[0], str):
            found = np.fromiter(map(int, values), np.int64, len(values))
        else:
            found = np.asarray(values)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be integers, got {shown(_wrong(values))}") from None
    if found.dtype.kind == "f" and np.array_equal(found, np.floor(found)):
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise ValueError(f"{name} must be integers, got {shown(_wrong(values))}")
    if found.size and (found.min() < 0 or found.max() >= limit):
        wrong = found.min() if found.min() < 0 else found.max()
        raise ValueError(f"{name} must be from 0 to {limit - 1}, got {wrong}")
    return found.astype(np.int64)


def _wrong(values: Any) -> Any:
    """Return the first value that is no integer."""
    for value in values:
        try:
            if isinstance(value, str | int | np.integer) and not isinstance(value, bool):
                int(value)
                continue
        except ValueError:
            pass
        return value
    return values[0] if len(values) else None
