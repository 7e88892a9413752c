"""Join tables of tokens or of choices, batch by batch, to a trace or to counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT, LAYER_LIMIT, shown
from moetuner.files import naming
from moetuner.files.contents import TraceInParts
from moetuner.files.opened import Opened
from moetuner.formats.counts import FREE_CELLS, check_filled
from moetuner.formats.hints import Hints, Traffic
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

LABELS = ("group", "sequence")
LIMITS = {"layer": LAYER_LIMIT, "expert": EXPERT_LIMIT}
# An integer as Python writes it, so that different texts are different numbers.
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)
# Arrays by column; labels may be a list of texts or integers.
Columns = dict[str, Any]
Add = Callable[[Columns], None]


@dataclass(frozen=True)
class OpenTable:
    """An open file: its columns, its number of experts, and a function that passes on columns."""

    names: list[str]
    experts: int | None
    add_to: Callable[[Sequence[str], Add], None]


def read_tables(
    open_table: Callable[[Path], AbstractContextManager[OpenTable]],
    files: Sequence[Opened],
    hints: Hints,
) -> Traffic:
    """Read tables of the same columns one after the other; ``open_table`` opens one."""
    table: Any = None
    for file in files:
        with naming(file.path), open_table(file.path) as source:
            if table is None:
                names = source.names
                hints = replace(hints, num_experts=hints.num_experts or source.experts)
                kind = Choices if {"layer", "expert"} <= set(names) else Tokens
                table = kind(names, hints)
            if source.names != names:
                raise ValueError(
                    f"must have columns {names[:8]} like the others, got {source.names[:8]}"
                )
            source.add_to([*table.numbers, *table.labels], table.add)
    with naming(files[0].path):
        traffic: Traffic = table.traffic()
    return traffic


def add_rows(add: Add, columns_of: Callable[[int, int], Columns], count: int, first: str) -> None:
    """Pass rows to ``add``; if that fails, one by one, so that the error names the wrong row.

    ``columns_of(begin, end)`` returns the columns of rows; ``first`` names the first row in the
    file, such as "line 2".
    """
    try:
        add(columns_of(0, count))
    except ValueError as error:
        word, number = first.split()
        for row in range(count):
            with naming(f"{word} {int(number) + row}"):
                add(columns_of(row, row + 1))
        raise ValueError(f"from {first}: {error}") from None


def split_cells(line: str) -> tuple[str, list[str]]:
    """Return the separator of a line of a table, and its cells."""
    separator = max(",;\t", key=line.count)
    return separator, [cell.strip().strip('"') for cell in line.split(separator)]


class Labels(dict[str, int]):
    """Numbers of names in order of appearance; 7 and "7" are the same name."""

    def number(self, values: Any) -> NDArray[np.int32]:
        """Return the numbers of names; new names get new numbers."""
        names = [str(value) for value in values]
        if "" in names:
            raise ValueError("sequence and group must have a name in every row, got none")
        numbers = [self.setdefault(name, len(self)) for name in names]
        return np.asarray(numbers, dtype=np.int32)

    def as_integers(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the names of numbers if all names are integers of 32 bits, else the numbers."""
        names = [int(name) for name in self if INTEGER.fullmatch(name)]
        if len(names) < len(self) or not all(-(1 << 31) <= name < 1 << 31 for name in names):
            return numbers
        return np.asarray(names, dtype=np.int32)[numbers]


class TokenRows:
    """Rows of a table so far: columns of numbers, and labels."""

    def __init__(self, numbers: list[str], names: list[str], hints: Hints) -> None:
        self.numbers, self.hints = numbers, hints
        self.labels = {name: Labels() for name in LABELS if name in names}

    def number_labels(self, columns: Columns) -> dict[str, NDArray[np.int32]]:
        """Return the numbers of the labels of rows."""
        return {name: label.number(columns[name]) for name, label in self.labels.items()}

    def label_arguments(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a trace for the labels of its tokens, from their numbers."""
        labels = {name: numbers[name] for name in self.labels}
        if "sequence" in labels:
            labels["sequence"] = self.labels["sequence"].as_integers(labels["sequence"])
        if "group" in labels:
            labels["group_names"] = tuple(self.labels["group"])
        return labels


class Tokens(TokenRows):
    """A table whose rows are tokens, with a column of ids [L][K]."""

    def __init__(self, names: list[str], hints: Hints) -> None:
        if "experts" not in names:
            raise ValueError(
                "must have a column 'experts' of ids [layers][top_k], or columns token, layer and "
                f"expert; got {names[:8]}"
            )
        super().__init__(["experts"], names, hints)
        self.trace = TraceInParts(hints.experts_needed())

    def add(self, columns: Columns) -> None:
        """Add ids [T,L,K]."""
        ids = columns["experts"]
        if ids.ndim != 3:
            raise ValueError(f"experts must be ids [layers][top_k], got {shown(ids)}")
        if self.trace.ids and ids.shape[1:] != (before := self.trace.ids[0].shape[1:]):
            raise ValueError(
                f"rows must have {list(before)} ids [layers, top_k] like those before, "
                f"got {list(ids.shape[1:])}"
            )
        self.trace.add(ids, **self.number_labels(columns))

    def traffic(self) -> RoutingTrace:
        """Return the trace."""
        if not self.trace.tokens:
            raise ValueError("must have at least one row, got none")
        contents = self.trace.contents()
        return RoutingTrace(**vars(contents) | self.label_arguments(vars(contents)))


class Choices(TokenRows):
    """A table whose rows are choices of tokens, or counts.

    With a column ``token`` the rows are a trace: rows of one token (of one sequence, if there is a
    column ``sequence``) and layer are its experts; a column ``weight`` has the router's weights and
    is left out. Without ``token``, rows are counts of ``weight`` tokens, and windows are sequences,
    else groups. Layers may have any numbers that keep their order.
    """

    def __init__(self, names: list[str], hints: Hints) -> None:
        wanted = ("token" if "token" in names else "weight", "layer", "expert")
        super().__init__([name for name in wanted if name in names], names, hints)
        self.batches: list[dict[str, NDArray[Any]]] = []

    def add(self, columns: Columns) -> None:
        """Add rows of whole numbers from 0."""
        rows = {name: _whole_numbers(name, columns[name]) for name in self.numbers}
        self.batches.append(rows | self.number_labels(columns))

    def traffic(self) -> Traffic:
        """Return the trace or the counts."""
        batches, self.batches = self.batches, []
        if not any(len(batch["layer"]) for batch in batches):
            raise ValueError("must have at least one row, got none")
        columns = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        layers, columns["layer"] = np.unique(columns["layer"], return_inverse=True)
        self.hints.check_have_experts(layers.tolist())
        build = self._trace if "token" in columns else self._counts
        return build(columns, layers)

    def _trace(self, columns: dict[str, NDArray[Any]], layers: NDArray[Any]) -> RoutingTrace:
        """Build the trace of choices, whose layers have these numbers."""
        first, token = _tokens(columns["token"], columns.get("sequence"))
        cells, rows = len(first) * len(layers), len(token)
        if cells > max(rows, FREE_CELLS):
            raise ValueError(
                f"each token must have experts in each layer, got {rows} rows for "
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
        for name in self.labels:
            other = columns[name] != columns[name][first][token]
            if other.any():
                row = int(np.argmax(other))
                raise ValueError(f"token {columns['token'][row]} must be of one {name}, not two")
        ids = columns["expert"][np.argsort(cell, kind="stable")]
        return RoutingTrace.from_arrays(
            ids.reshape(len(first), len(layers), -1),
            num_experts=self.hints.experts_needed(),
            **self.label_arguments({name: columns[name][first] for name in self.labels}),
        )

    def _counts(self, columns: dict[str, NDArray[Any]], layers: NDArray[Any]) -> RoutingStatistics:
        """Build the counts of choices, whose layers have these numbers."""
        expert = columns["expert"].astype(np.int64)
        experts, rows = self.hints.num_experts or int(expert.max()) + 1, len(expert)
        if expert.max() >= experts:
            raise ValueError(f"expert {expert.max()} must be below num_experts {experts}")
        group = columns.get("group")
        window = columns.get("sequence", group)
        window = np.zeros(rows, int) if window is None else window.astype(np.int64)
        shape = (int(window.max()) + 1, len(layers), experts)
        check_filled(rows, shape)
        weight = columns.get("weight", np.ones(1, np.int64))
        if not float(weight.sum(dtype=np.float64)) < 2.0**63:
            raise ValueError("weight must add up to less than 2**63")
        load = np.zeros(shape, dtype=np.int64)
        np.add.at(load, (window, columns["layer"], expert), weight)
        if group is None:
            return RoutingStatistics.from_load(load)
        group_of_window = np.zeros(shape[0], dtype=np.int64)
        group_of_window[window] = group
        if (group_of_window[window] != group).any():
            raise ValueError("each sequence must be of one group, got several")
        names = tuple(self.labels["group"])
        return RoutingStatistics.from_load(load, group=group_of_window, group_names=names)


def _whole_numbers(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers in few bytes; raise unless they are from 0 to a limit."""
    limit = LIMITS.get(name, 1 << 48)
    if values.dtype.kind == "f" and values.ndim == 1:
        wrong = ~np.isfinite(values) | (values != np.floor(values))
        if wrong.any():
            raise ValueError(f"{name} must be integers, got {values[np.argmax(wrong)]}")
    elif values.dtype.kind not in "iu" or values.ndim != 1:
        raise ValueError(f"{name} must be integers, got {shown(values)}")
    if values.size and (values.min() < 0 or values.max() >= limit):
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name} must be from 0 to {limit - 1}, got {wrong}")
    return values.astype(np.uint16 if name in LIMITS else np.int64)


def _tokens(
    token: NDArray[Any], sequence: NDArray[Any] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first row of every token, in order of appearance, and the token of every row."""
    key = token
    if sequence is not None:
        _, dense = np.unique(token, return_inverse=True)
        key = sequence.astype(np.int64) * (int(dense.max()) + 1) + dense
    _, first, token_of = np.unique(key, return_index=True, return_inverse=True)
    return np.sort(first), np.argsort(np.argsort(first))[token_of]
