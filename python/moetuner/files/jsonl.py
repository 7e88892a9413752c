"""JSON lines: a trace as text, for recorders that write one line per token or per sequence.

Each line is one JSON object in UTF-8; blank lines are skipped. The first line may be a header::

    {"num_experts": 32, "model": "gpt-oss-20b", "group_names": ["math", "code"]}

Only ``num_experts`` is needed there, and not if the caller passes it. All other lines have one of
two forms, the same form throughout the file. One token per line, ids by layer, [L,K]::

    {"experts": [[3, 17, 4, 30], [8, 1, 22, 5]], "sequence": 0, "group": "math"}

or one sequence per line, [T,L,K]::

    {"tokens": [[[3, 17, 4, 30], [8, 1, 22, 5]], [[9, 2, 0, 6], [7, 3, 21, 4]]], "group": "math"}

``sequence`` (an integer) and ``group`` (a text) are optional, but on all lines or on none. A
sequence without a number gets the number of its line, counted from 0. Other keys are ignored.
Groups that the header does not name are numbered in the order in which they appear.

Lines are read in batches; memory holds one batch and the compact trace.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import MissingArgumentError, expert_size, experts_in, names, path_in, shown
from moetuner.files import naming, size_of
from moetuner.files.contents import TraceContents, TraceInParts
from moetuner.files.lines import NO_INTEGER, NO_TEXT, Keys, Lines, batches

GROUP_LIMIT = 1 << 15
KEYS = Keys([("experts", 2), ("tokens", 3)], ["sequence"], ["group"])


def read(path: str | Path, *, num_experts: int | None = None) -> TraceContents:
    """Read a trace in either form; ``num_experts`` overrides the header's."""
    path = path_in(path)
    size_of(path)
    with naming(path):
        reader = _Reader(None if num_experts is None else experts_in(num_experts))
        for lines in batches(path, KEYS, reader.is_header):
            lines.hand_to(reader.add)
        return reader.contents()


class _Reader:
    """The header and the trace of the lines that were read so far."""

    def __init__(self, num_experts: int | None) -> None:
        self.given = self.experts = num_experts
        self.model: str | None = None
        self.expert_size: tuple[int, int] | None = None
        self.groups: dict[str, int] = {}
        # The form of all lines: index of their array, whether they have a sequence and a group,
        # layers, and top-k.
        self.form: NDArray[np.int64] | None = None
        self.trace: TraceInParts | None = None
        self.lines = 0

    def is_header(self, line: dict[str, Any]) -> bool:
        """Read the first line if it is a header; return whether it is one."""
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
        """Add lines to the trace; add none of them if one is wrong."""
        if self.experts is None:
            raise MissingArgumentError(
                'num_experts is needed: in a first line {"num_experts": N}, or from you',
                "num_experts",
            )
        sequence, group = lines.columns["sequence"], lines.columns["group"]
        has = [lines.array, sequence != NO_INTEGER, group != NO_TEXT]
        forms = np.column_stack([*has, lines.sizes[:, 1:]])
        form = forms[0] if self.form is None else self.form
        if (forms != form).any():
            expected, actual = _describe_form(form), _describe_form(forms[0])
            raise ValueError(f"must have {expected} like the lines before, got {actual}")
        if (lines.sizes == 0).any():
            raise ValueError(
                f"must have at least one token, layer and expert, got {_describe_form(form)}"
            )
        per_token, has_sequence, has_group = form[0] == 0, form[1], form[2]
        if not has_sequence:
            sequence = np.arange(self.lines, self.lines + len(lines))
        if (sequence.astype(np.int32) != sequence).any():
            raise ValueError(f"sequence must be an integer of 32 bits, got {sequence[0]}")
        groups = [lines.names[at] for at in np.unique(group)] if has_group else []
        if len(self.groups.keys() | set(groups)) > GROUP_LIMIT:
            raise ValueError(f"there must be at most {GROUP_LIMIT} groups, got {shown(groups[0])}")
        labels: dict[str, NDArray[Any]] = {}
        if has_sequence or not per_token:
            labels["sequence"] = sequence.astype(np.int32)
        if has_group:
            numbers = np.zeros(len(lines.names), dtype=np.int16)
            for at in np.unique(group):
                numbers[at] = self.groups.setdefault(lines.names[at], len(self.groups))
            labels["group"] = numbers[group]
        trace = self.trace or TraceInParts(self.experts)
        tokens = lines.sizes[:, 0]
        ids = lines.ids.reshape(-1, *form[3:])
        trace.add(ids, **{name: np.repeat(label, tokens) for name, label in labels.items()})
        self.form, self.trace = form, trace
        self.lines += len(lines)

    def contents(self) -> TraceContents:
        """Return the trace of all lines, with the header's facts."""
        if self.trace is None:
            raise ValueError("must have at least one line with 'experts' or 'tokens', got none")
        return self.trace.contents(
            group_names=tuple(self.groups), model=self.model, expert_size=self.expert_size
        )


def _describe_form(form: NDArray[np.int64]) -> str:
    """Write the keys, layers and ids of lines of a form."""
    labels = [name for name, has in zip(("sequence", "group"), form[1:], strict=False) if has]
    keys = ", ".join([KEYS.arrays[form[0]][0], *labels])
    return f"{keys} with {form[3]} layers of {form[4]} ids"
