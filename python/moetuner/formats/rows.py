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
LABELS = ("group", "sequence")
LIMITS = {"layer": LAYER_LIMIT, "expert": EXPERT_LIMIT}
# Cells of a table that may be larger than the rows that fill it, and cells for each row: a token
# with one of 128 experts leaves as many empty.
FREE_CELLS, CELLS_PER_ROW = 1 << 22, 128
# As Python writes it, so that no two texts are one number.
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)
Columns = dict[str, NDArray[Any]]


@dataclass
class Labels:
    """Names, numbered in the order in which they appear; 7 and "7" are the same."""

    numbers: dict[Any, int] = field(default_factory=dict)
    seen: dict[Any, int] = field(default_factory=dict)

    def of(self, values: Any) -> NDArray[np.int32]:
        """Return the numbers of some of them."""
        if isinstance(values, np.ndarray):
            distinct, first, place = np.unique(values, return_index=True, return_inverse=True)
            order = np.argsort(first)
            numbers = np.empty(len(distinct), dtype=np.int32)
            numbers[order] = self.of(distinct[order].tolist())
            return numbers[place]
        seen = self.seen
        return np.asarray(
            [seen[value] if value in seen else self._new(value) for value in values],
            dtype=np.int32,
        )

    def _new(self, value: Any) -> int:
        is_integer = isinstance(value, str) and INTEGER.fullmatch(value)
        name = int(value) if is_integer else value
        self.seen[value] = self.numbers.setdefault(name, len(self.numbers))
        return self.seen[value]

    def as_integers(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the names themselves where all are integers of 32 bits, else their numbers."""
        names = list(self.numbers)
        if not all(type(name) is int and -(1 << 31) <= name < 1 << 31 for name in names):
            return numbers
        return np.asarray(names, dtype=np.int32)[numbers]

    def texts(self) -> list[str]:
        """Return the names as texts.

        Raises
        ------
        ValueError
            If two are the same.
        """
        texts = [str(name) for name in self.numbers]
        if len(set(texts)) < len(texts):
            raise ValueError("groups must differ as texts")
        return texts


class Rows:
    """Columns of a table so far, narrow; a row is one choice of a token, or a count.

    With a column ``token`` the rows are a trace: those of one token (of one sequence, where there
    is a column ``sequence``) and layer are its experts, and a column ``weight`` is the router's and
    left out. Without, they are counts, of ``weight`` tokens each, in windows by sequence, else by
    group. Layers may be numbered in any way that keeps their order.
    """

    def __init__(self, names: list[str]) -> None:
        self.is_trace = "token" in names
        self.names = [name for name in COLUMNS if name in names]
        if not {"layer", "expert"} <= set(names):
            raise ValueError(
                f"must have columns 'layer' and 'expert' (and may have 'token', 'sequence', "
                f"'group', 'weight'), got {names[:8]}"
            )
        if self.is_trace and "weight" in self.names:
            self.names.remove("weight")
        self.parts: dict[str, list[NDArray[Any]]] = {name: [] for name in self.names}
        self.labels = {name: Labels() for name in LABELS}
        self.count = 0

    def add(self, columns: dict[str, Any]) -> None:
        """Take in rows: integers, and any values for sequences and groups.

        Raises
        ------
        ValueError
            Naming the column that is wrong.
        """
        for name in self.names:
            if name in self.labels:
                self.parts[name].append(self.labels[name].of(columns[name]))
                continue
            values = _integers(name, columns[name], LIMITS.get(name, 1 << 48))
            self.parts[name].append(values.astype(np.uint16) if name in LIMITS else values)
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
        layers, layer = np.unique(columns["layer"], return_inverse=True)
        hints.check_have_experts(layers.tolist())
        build = self._trace if self.is_trace else self._counts
        return build({**columns, "layer": layer}, layers, hints)

    def _trace(self, columns: Columns, layers: NDArray[Any], hints: Hints) -> RoutingTrace:
        experts = hints.experts_needed()
        first, token = _tokens(columns["token"], columns.get("sequence"))
        cells = len(first) * len(layers)
        if cells > max(self.count, FREE_CELLS):
            raise ValueError(
                f"each token must have experts in each layer, got {self.count} rows for "
                f"{len(first)} tokens and {len(layers)} layers"
            )
        cell = token * len(layers) + columns["layer"]
        sizes = np.bincount(cell, minlength=cells)
        if (sizes != sizes[0]).any():
            at = int(np.argmax(sizes != sizes[0]))
            row = first[at // len(layers)]
            raise ValueError(
                f"token {columns['token'][row]} must have {sizes[0]} experts in layer "
                f"{layers[at % len(layers)]} like token {columns['token'][first[0]]} in layer "
                f"{layers[0]}, got {sizes[at]}"
            )
        labels: dict[str, Any] = {name: columns[name] for name in LABELS if name in columns}
        for name, numbers in labels.items():
            other = numbers != numbers[first][token]
            if other.any():
                row = int(np.argmax(other))
                raise ValueError(f"token {columns['token'][row]} must be of one {name}, not two")
            labels[name] = numbers[first]
        if "sequence" in labels:
            labels["sequence"] = self.labels["sequence"].as_integers(labels["sequence"])
        order = np.argsort(cell, kind="stable")
        return RoutingTrace.from_arrays(
            columns["expert"][order].reshape(len(first), len(layers), -1),
            num_experts=experts,
            group_names=self.labels["group"].texts() if "group" in labels else None,
            **labels,
        )

    def _counts(self, columns: Columns, layers: NDArray[Any], hints: Hints) -> RoutingStatistics:
        expert = columns["expert"].astype(np.int64)
        experts = int(expert.max()) + 1 if hints.num_experts is None else hints.num_experts
        if expert.max() >= experts:
            raise ValueError(f"expert {expert.max()} must be below num_experts {experts}")
        group = columns.get("group")
        window = columns.get("sequence", group)
        window = np.zeros(self.count, int) if window is None else window.astype(np.int64)
        shape = (int(window.max()) + 1, len(layers), experts)
        if np.prod(shape, dtype=float) > max(FREE_CELLS, CELLS_PER_ROW * self.count):
            raise ValueError(
                f"counts must fill their table, got {self.count} rows for {shape[0]} windows of "
                f"{shape[1]} layers x {experts} experts"
            )
        weight = columns.get("weight")
        if weight is not None and not float(weight.sum(dtype=np.float64)) < 2.0**63:
            raise ValueError("weight must add up to less than 2**63")
        load = np.zeros(shape, dtype=np.int64)
        np.add.at(load, (window, columns["layer"], expert), 1 if weight is None else weight)
        of_window = None
        if group is not None:
            of_window = np.zeros(shape[0], dtype=np.int64)
            of_window[window] = group
            if (of_window[window] != group).any():
                raise ValueError("each sequence must be of one group, got several")
        names = () if group is None else tuple(self.labels["group"].texts())
        return RoutingStatistics.from_load(load, group=of_window, group_names=names)


def _tokens(
    token: NDArray[Any], sequence: NDArray[Any] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first row of every token, in order of appearance, and the token of every row."""
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
            numbers = np.fromiter(map(int, values), np.int64, len(values))
        else:
            numbers = np.asarray(values)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be integers, got {shown(_wrong(values))}") from None
    if numbers.dtype.kind == "f" and np.array_equal(numbers, np.floor(numbers)):
        numbers = numbers.astype(np.int64)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise ValueError(f"{name} must be integers, got {shown(_wrong(values))}")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= limit):
        wrong = numbers.min() if numbers.min() < 0 else numbers.max()
        raise ValueError(f"{name} must be from 0 to {limit - 1}, got {wrong}")
    return numbers.astype(np.int64)


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
