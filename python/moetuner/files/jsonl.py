"""JSON lines: a trace as text, for recorders that write one line per token or per sequence.

Each line is one JSON object in UTF-8; blank lines are skipped. The first line may be a header::

    {"num_experts": 32, "model": "gpt-oss-20b", "group_names": ["math", "code"]}

Only ``num_experts`` is needed there, and not if the reader is told. All other lines have one of two
forms, the same form throughout the file. One token per line, ids by layer, [L,K]::

    {"experts": [[3, 17, 4, 30], [8, 1, 22, 5]], "sequence": 0, "group": "math"}

or one sequence per line, [T,L,K]::

    {"tokens": [[[3, 17, 4, 30], [8, 1, 22, 5]], [[9, 2, 0, 6], [7, 3, 21, 4]]], "group": "math"}

``sequence`` (an integer) and ``group`` (a text) are optional, but on all lines or on none. A
sequence without a number gets the number of its line, counted from 0. Other keys are ignored.
Groups that the header does not name are numbered in the order in which they appear.

Reading goes in batches of lines; memory holds one of them and the compact trace.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import (
    IdArray,
    IdType,
    check_sizes,
    expert_size,
    experts_in,
    id_type,
    instance,
    names,
    one_of,
    path_in,
    shown,
    valid,
)
from moetuner.files import naming, replacing, size_of
from moetuner.files.contents import TraceContents
from moetuner.files.ids import IdsInMemory
from moetuner.files.lines import NO_INTEGER, NO_TEXT, Keys, Lines, batches

GROUP_LIMIT = 1 << 15
KEYS = Keys(
    [("experts", ("layers", "top_k")), ("tokens", ("tokens", "layers", "top_k"))],
    ["sequence"],
    ["group"],
)


def read(path: str | Path, *, num_experts: int | None = None) -> TraceContents:
    """Read a trace in either form.

    Parameters
    ----------
    path
        File to read.
    num_experts
        Experts per layer; overrides the header's.

    Raises
    ------
    ValueError
        Naming file and line of what is wrong.
    """
    path = path_in(path)
    size_of(path)
    with naming(path):
        reader = _Reader(None if num_experts is None else experts_in(num_experts))
        for lines in batches(path, KEYS, reader.is_header):
            lines.hand_to(reader.add)
        return reader.contents()


def write(
    trace: TraceContents, path: str | Path, *, per: Literal["token", "sequence"] = "token"
) -> None:
    """Write a trace; the file appears whole or not at all.

    Parameters
    ----------
    trace
        Routing to write, with at least one token.
    path
        File to write or replace.
    per
        What a line is. A sequence per line needs labels, with each sequence's tokens in one run and
        one group.

    Raises
    ------
    ValueError
        If the trace has no token, or its sequences do not fit on lines.
    """
    instance("trace", trace, TraceContents)
    one_of("per", per, ("token", "sequence"))
    path = path_in(path)
    if trace.ids.shape[0] == 0:
        raise ValueError(
            "trace must have at least one token: else JSON lines cannot say its layers"
        )
    lines = _per_token(trace) if per == "token" else _per_sequence(trace)
    header: dict[str, object] = {"num_experts": trace.num_experts}
    if trace.model is not None:
        header["model"] = trace.model
    if trace.expert_size is not None:
        header["expert_size"] = trace.expert_size
    if trace.group is not None:
        header["group_names"] = trace.group_names
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in chain([header], lines):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


class _Reader:
    """What the lines so far have said."""

    def __init__(self, num_experts: int | None) -> None:
        self.given = num_experts
        self.experts = num_experts
        self.model: str | None = None
        self.expert_size: tuple[int, int] | None = None
        self.shape: tuple[int, int] | None = None
        self.keys: set[str] = set()
        self.ids = bytearray()
        self.tokens = 0
        self.lines = 0
        self.sequence = array("i")
        self.group = array("h")
        self.groups: dict[str, int] = {}

    def is_header(self, line: dict[str, Any]) -> bool:
        """Take in the first line, if it is a header."""
        if {"experts", "tokens"} & line.keys():
            return False
        if "schema" in line:
            raise ValueError(f"must be a trace, got a file of schema {shown(line['schema'])}")
        if "num_experts" not in line:
            raise ValueError(
                f"must have 'experts', 'tokens' or 'num_experts', got keys {list(line)[:8]}"
            )
        experts = experts_in(line["num_experts"])
        self.experts = experts if self.given is None else self.given
        self.model = line.get("model")
        if self.model is not None and not isinstance(self.model, str):
            raise ValueError(f"model must be a text, got {shown(self.model)}")
        self.expert_size = expert_size(line.get("expert_size"))
        for name in names(line.get("group_names")):
            self.groups.setdefault(name, len(self.groups))
        return True

    def add(self, lines: Lines) -> None:
        """Take in lines, or none of them.

        Raises
        ------
        ValueError
            If one breaks a rule, or they differ in what they have.
        """
        if self.experts is None:
            raise ValueError(
                'num_experts is needed: in a first line {"num_experts": N}, or from you'
            )
        form = KEYS.arrays[lines.array[0]][0]
        sequence, group, tokens = (
            lines.columns["sequence"],
            lines.columns["group"],
            lines.sizes[:, 0],
        )
        numbered, named = sequence != NO_INTEGER, group != NO_TEXT
        keys = {form}
        keys |= {"sequence"} if numbered[0] else set()
        keys |= {"group"} if named[0] else set()
        shape = (int(lines.sizes[0, 1]), int(lines.sizes[0, 2]))
        if self.shape is not None and keys != self.keys:
            raise ValueError(
                f"must have keys {sorted(self.keys)} like the lines before, got {sorted(keys)}"
            )
        if self.shape not in (None, shape):
            raise ValueError(
                f"{form} must have {self.shape[0]} layers of {self.shape[1]} ids "
                f"like the lines before, got {shape[0]} of {shape[1]}"
            )
        uniform = (lines.array == lines.array[0]).all() and (lines.sizes[:, 1:] == shape).all()
        if not uniform or (numbered != numbered[0]).any() or (named != named[0]).any():
            raise ValueError("lines must be alike")  # which is said better of one of them
        if numbered[0] and (sequence.astype(np.int32) != sequence).any():
            raise ValueError(f"sequence must be an integer of 32 bits, got {sequence[0]}")
        ids = self._valid(lines.ids.reshape(-1, *shape))
        groups = [lines.names[at] for at in np.unique(group[named])]
        if len(self.groups.keys() | set(groups)) > GROUP_LIMIT:
            raise ValueError(f"there must be at most {GROUP_LIMIT} groups, got {shown(groups[0])}")
        if not numbered[0]:
            sequence = np.arange(self.lines, self.lines + len(lines))
        if form == "tokens" or numbered[0]:
            self.sequence.frombytes(np.repeat(sequence.astype(np.int32), tokens).tobytes())
        if named[0]:
            numbers = np.zeros(len(lines.names), dtype=np.int16)
            for at in np.unique(group):
                numbers[at] = self.groups.setdefault(lines.names[at], len(self.groups))
            self.group.frombytes(np.repeat(numbers[group], tokens).tobytes())
        self.ids += ids.astype(self._type, copy=False).tobytes()
        self.shape, self.keys = shape, keys
        self.tokens += len(ids)
        self.lines += len(lines)

    def _valid(self, ids: NDArray[Any]) -> IdArray:
        assert self.experts is not None
        if self.shape is None:
            check_sizes(ids.shape, ids.dtype, self.experts)
        small = ids.dtype == np.uint16 and ids.max() < 256
        return valid(ids.astype(np.uint8) if small else ids, self.experts, self.tokens)

    @property
    def _type(self) -> IdType:
        assert self.experts is not None
        return id_type(np.dtype(np.int64), self.experts)

    def contents(self) -> TraceContents:
        """Return what the lines say."""
        if self.shape is None or self.experts is None:
            raise ValueError("must have at least one line with 'experts' or 'tokens', got none")
        ids = np.frombuffer(self.ids, dtype=self._type)
        grouped = "group" in self.keys
        return TraceContents(
            IdsInMemory.of(ids.reshape(self.tokens, *self.shape), self.experts),
            self.experts,
            sequence=np.frombuffer(self.sequence, dtype=np.int32) if self.sequence else None,
            group=np.frombuffer(self.group, dtype=np.int16) if grouped else None,
            group_names=tuple(self.groups),
            model=self.model,
            expert_size=self.expert_size,
        )


def _per_token(trace: TraceContents) -> Iterator[dict[str, object]]:
    token = 0
    for shard in trace.ids.shards(1 << 20):
        for ids in shard.tolist():
            yield {"experts": ids, **_labels_of(trace, token)}
            token += 1


def _per_sequence(trace: TraceContents) -> Iterator[dict[str, object]]:
    sequence = trace.sequence
    if sequence is None:
        raise ValueError("trace must have sequences to write one per line")
    starts = np.flatnonzero(np.diff(sequence, prepend=sequence[0] ^ 1))
    if np.unique(sequence[starts]).size < starts.size:
        raise ValueError("each sequence's tokens must be one run to write one per line")
    ids = trace.ids.array()
    for first, end in pairwise([*starts.tolist(), trace.ids.shape[0]]):
        if trace.group is not None and (trace.group[first:end] != trace.group[first]).any():
            raise ValueError(
                f"each sequence must have one group to write one per line, not {sequence[first]}"
            )
        yield {"tokens": ids[first:end].tolist(), **_labels_of(trace, first)}


def _labels_of(trace: TraceContents, token: int) -> dict[str, object]:
    labels: dict[str, object] = {}
    if trace.sequence is not None:
        labels["sequence"] = int(trace.sequence[token])
    if trace.group is not None and trace.group_names is not None:
        labels["group"] = trace.group_names[int(trace.group[token])]
    return labels
