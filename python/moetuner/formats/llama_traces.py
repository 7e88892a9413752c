"""Read the choices of llama.cpp's routers, token by token, from CSV of tools around it.

There are three forms. ``llama-moe-trace`` of thecodacus' fork (``tools/moe-trace/moe-trace.cpp``)
has a row ``pos,layer,id0,id1,...`` for every token and layer, without a header; tokens of a prompt
have positions below zero, and traces are joined one after the other. Forks of llama.cpp's pull
request 28544 have columns ``phase,token,layer,rank,expert``, BigMoeOnEdge ``# route_trace v1``, a
preamble and columns ``turn,phase,step,layer,slot,expert,...``: a row for every choice.

llama.cpp computes its last layer only for tokens whose logits are needed, which is the last one of
a prompt. Tokens without experts in all layers are left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import EXPERT_LIMIT, LAYER_LIMIT, shown
from moetuner.files import naming, size_of
from moetuner.files.opened import Opened
from moetuner.formats.hints import Hints
from moetuner.trace import RoutingTrace

FIRST = re.compile(r"-\d{1,9},\d{1,5}(?:,\d{1,5})+\r?\n", re.ASCII)
PREAMBLE = "# route_trace v1"
EXPERTS = re.compile(r"\bn_expert=(\d{1,6})\b", re.ASCII)
# Columns of sequence, token, layer, place among a token's choices, and expert, in the form with a
# preamble and in the one without, which has no others but ``phase``.
ROUTE = ("turn", "step", "layer", "slot", "expert")
RANKED = ("token", "layer", "rank", "expert")
INTEGER = re.compile(r"[-+]?\d{1,18}", re.ASCII)
LONGEST_HEADER = 1 << 16
LIMITS = {"layer": LAYER_LIMIT, "slot": EXPERT_LIMIT, "expert": EXPERT_LIMIT}
CAUTION = (
    "Tokens of a prompt are left out where the last layer did not compute them, as llama.cpp does: "
    "the trace tells what decoding asks for, a request at a time, and little or nothing of prefill."
)


@dataclass(frozen=True, eq=False)
class _Choices:
    """Rows of a file: sequence, token, layer, slot and expert [N,5], and how many experts."""

    rows: NDArray[np.int64]
    experts: int | None = None


def recognises(file: Opened) -> bool:
    """Return whether a file is of one of these forms."""
    start = file.head[:LONGEST_HEADER].decode("latin-1")
    line = start.partition("\n")[0].strip()
    is_ranked = {*line.split(",")} == {*RANKED, "phase"}
    return start.startswith(PREAMBLE) or is_ranked or bool(FIRST.match(start))


def read(files: Sequence[Opened], hints: Hints) -> RoutingTrace:
    """Read files as one trace; every prompt with its answer is a sequence."""
    parts: list[NDArray[np.int64]] = []
    experts = hints.num_experts
    for file in files:
        with naming(file.path):
            choices = _read(file.path)
            if choices.experts is not None:
                hints.check_experts(choices.experts)
                experts = experts or choices.experts
            rows = choices.rows
            if parts:
                rows[:, 0] += 1 + parts[-1][:, 0].max() - rows[:, 0].min()
            parts.append(rows)
    with naming(files[0].path):
        experts = hints.experts_needed() if experts is None else experts
        return _trace(np.concatenate(parts), experts, hints)


def _read(path: Path) -> _Choices:
    """Read a file."""
    size_of(path)
    with path.open(encoding="utf-8-sig") as file:
        experts, line, header = None, file.readline(LONGEST_HEADER), 1
        wanted = ROUTE if line.startswith(PREAMBLE) else RANKED
        while line.startswith("#"):
            if match := EXPERTS.search(line):
                experts = int(match[1])
            line, header = file.readline(LONGEST_HEADER), header + 1
        names = line.strip().split(",")
        if wanted is RANKED and "layer" not in names:
            file.seek(0)
            return _Choices(_check(_list_choices(_numbers(file, 0, None))))
        if not all(names.count(name) == 1 for name in wanted):
            raise ValueError(f"must have columns {', '.join(wanted)}, got {line.strip()!r:.80}")
        rows = _numbers(file, header, [names.index(name) for name in wanted])
        # A file of ranks has one sequence.
        return _Choices(_check(rows if wanted is ROUTE else np.insert(rows, 0, 0, axis=1)), experts)


def _numbers(file: TextIO, header: int, columns: Sequence[int] | None) -> NDArray[np.int64]:
    """Read rows of integers behind a header of so many lines; all columns, or some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there are no rows
        warnings.simplefilter("error", DeprecationWarning)  # 1.5 as an integer
        try:
            rows = np.loadtxt(
                file, np.int64, delimiter=",", comments=None, usecols=columns, ndmin=2
            )
        except (ValueError, OverflowError) as error:
            file.seek(0)
            _name_line(enumerate(file, 1), header, columns)
            raise ValueError(f"must have rows of integers: {str(error).split(';')[0]}") from None
    if not rows.size:
        raise ValueError("must have at least one row, got none")
    return rows


def _name_line(
    lines: Iterable[tuple[int, str]], header: int, columns: Sequence[int] | None
) -> None:
    """Raise for the first of some numbered lines that is no row of integers."""
    width = None if columns is None else max(columns) + 1
    for number, line in lines:
        cells = line.split(",")
        if number <= header or not line.strip():
            continue
        width = width or len(cells)
        if len(cells) < width or (columns is None and len(cells) > width):
            raise ValueError(
                f"line {number}: must have rows of integers, {width} in each, got {len(cells)}"
            )
        for at in columns or range(width):
            if not INTEGER.fullmatch(cells[at].strip()):
                raise ValueError(
                    f"line {number}, column {at + 1}: must have rows of integers, got "
                    f"{shown(cells[at].strip())}"
                )


def _list_choices(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a row per choice of rows pos, layer, ids; every prompt begins a sequence."""
    if table.shape[1] < 3:
        raise ValueError(f"must have rows pos,layer,id0,..., got {table.shape[1]} numbers in one")
    is_prompt = table[:, 0] < 0
    begins = is_prompt & ~np.concatenate([[True], is_prompt[:-1]])
    top_k = table.shape[1] - 2
    tokens = np.column_stack([np.cumsum(begins), table[:, :2]]).repeat(top_k, axis=0)
    slot = np.tile(np.arange(top_k), len(table))
    return np.column_stack([tokens, slot, table[:, 2:].ravel()])


def _check(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rows; raise if layers, slots, experts or positions are out of range."""
    for at, name in enumerate(("layer", "slot", "expert"), 2):
        wrong = (rows[:, at] < 0) | (rows[:, at] >= LIMITS[name])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{name} must be from 0 to {LIMITS[name] - 1}, got {rows[row, at]}")
    if (np.abs(rows[:, :2]) >= 1 << 40).any():
        raise ValueError("positions must be below 2**40")
    return rows


def _trace(rows: NDArray[Any], experts: int, hints: Hints) -> RoutingTrace:
    """Make a trace of the tokens that have their experts in all layers."""
    layers, rows[:, 2] = np.unique(rows[:, 2], return_inverse=True)
    hints.check_have_experts(layers.tolist())
    rows = rows[np.lexsort(rows[:, 3::-1].T)]
    same = (rows[1:, :4] == rows[:-1, :4]).all(axis=1)
    if same.any():
        _, token, layer, slot, _ = rows[int(np.argmax(same))].tolist()
        raise ValueError(
            f"token {token} must have choice {slot} in layer {layers[layer]} once, got it twice: "
            "traces are joined one after the other, each with its prompt"
        )
    top_k = int(rows[:, 3].max()) + 1
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    sizes = np.diff(np.flatnonzero(np.append(begins, True)))
    is_full = np.repeat(sizes == len(layers) * top_k, sizes)
    if not is_full.any():
        raise ValueError(
            f"must have a token with {top_k} experts in each of {len(layers)} layers, got none: "
            "record tokens that are generated, too"
        )
    full = rows[is_full]
    first = full[:: len(layers) * top_k]
    return RoutingTrace.from_arrays(
        full[:, 4].reshape(len(first), len(layers), top_k),
        num_experts=experts,
        sequence=np.unique(first[:, 0], return_inverse=True)[1],
    )
