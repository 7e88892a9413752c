"""Read Megatron-Core's router trace, and the arrays that its RouterReplay records.

``--moe-routing-trace-path DIR`` writes ``router_trace_rank{r}.jsonl``, a line per step, layer and
microbatch (``megatron/core/transformer/moe/router_trace.py`` of 0.19.2)::

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 0, "rank": 0,
     "num_tokens": 2, "topk": 2, "top_indices": [[0, 7], [1, 3]]}

Layers count dense ones too, which have no lines. Rows of the same tokens are those of one step and
rank, in the order in which a layer saw its microbatches; each becomes a sequence of the trace, and
the rank that the tokens came from its group. Layers of multi-token prediction (block ``mtp``) route
other positions and are left out.

``RouterReplay.get_recorded_data()`` is a list of ids [T,K], one for every MoE layer, for
``torch.save`` or ``numpy.savez(file, *arrays)``; or with names such as ``step0.layer3``, where
every step becomes a sequence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, size_of
from moetuner.files.lines import NO_INTEGER, NO_TEXT, Keys, Lines
from moetuner.files.lines import batches as lines_of
from moetuner.files.opened import Opened
from moetuner.formats.arrays import list_names, read_by_step
from moetuner.formats.hints import Hints
from moetuner.formats.microbatches import Microbatches
from moetuner.formats.sources import find_rank, list_by_rank
from moetuner.trace import RoutingTrace

PATTERN = "router_trace_rank*.jsonl"
NUMBERS = ("step", "layer", "rank")
KEYS = Keys([("top_indices", 2)], [*NUMBERS, "num_tokens", "topk"], ["block", "stage"])
REPLAY = re.compile(
    r"(?:arr_|(?:step[_.]?(?P<step>\d{1,9})[._])?layer[_.]?)(?P<layer>\d{1,6})", re.ASCII
)
# Step, layer and rank of a line, and its ids [t,K].
Line = tuple[int, int, int, NDArray[Any]]


def recognises(file: Opened) -> bool:
    """Return whether a file or folder is a router trace, or a file the arrays of RouterReplay."""
    if file.path.is_dir():
        return any(file.path.glob(PATTERN))
    start = file.head[:4096]
    if start.lstrip()[:1] == b"{":
        return all(key in start for key in (b'"top_indices"', b'"layer"', b'"block"'))
    return is_replay(file)


def is_replay(file: Opened) -> bool:
    """Return whether a file holds only arrays by number or layer, or is a ``.pt`` list."""
    names = list_names(file) if file.head.startswith(b"PK") else []
    return bool(names) and all(map(REPLAY.fullmatch, names))


def read(sources: Sequence[Opened], hints: Hints) -> RoutingTrace:
    """Read the files of all ranks: a router trace, or arrays of RouterReplay."""
    files = list_by_rank(sources, PATTERN)
    first = files[0].path
    with naming(first):
        batches = Microbatches(hints.experts_needed())
    for number, file in enumerate(files):
        with naming(file.path):
            if is_replay(file):
                rank = find_rank(file.path)
                for (step, layer), ids in read_by_step(file, REPLAY, "step0.layer3").items():
                    batches.add((step, 0, number if rank is None else rank), layer, ids)
            else:
                _add_lines(file.path, batches)
    batches.join_stages()
    return batches.trace(first if len(files) == 1 else first.parent)


def _add_lines(path: Path, batches: Microbatches) -> None:
    """Add the lines of a trace file to microbatches."""
    size_of(path)
    turns: Counter[tuple[int, int, int]] = Counter()
    for lines in lines_of(path, KEYS):
        for step, layer, rank, ids in chain(*lines.hand_to(_decoder)):
            batches.add((step, turns[step, layer, rank], rank), layer, ids)
            turns[step, layer, rank] += 1
    if not turns:
        raise ValueError("must hold lines of block 'decoder', got none")


def _decoder(lines: Lines) -> list[Line]:
    """Return the lines of the decoder."""
    columns = lines.columns
    for key in (*KEYS.integers, *KEYS.texts):
        missing = NO_INTEGER if key in KEYS.integers else NO_TEXT
        if (columns[key] == missing).any():
            raise ValueError(f"must have {key!r} as a router trace has")
        if (columns[key] < 0).any():
            raise ValueError(f"{key} must be an integer of at least 0, got {columns[key].min()}")
    tokens, top_k = columns["num_tokens"], columns["topk"]
    _, rows, width = lines.sizes.T
    wrong = (tokens != rows) | ((top_k != width) & (rows > 0))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"top_indices must be integers [{tokens[at]}, {top_k[at]}], as num_tokens and topk "
            f"say, got [{rows[at]}, {width[at]}]"
        )
    decoder = []
    end = 0
    values = zip(*(columns[key].tolist() for key in KEYS.integers), columns["block"], strict=True)
    for step, layer, rank, count, k, block in values:
        begin, end = end, end + count * k
        if lines.names[block] == "decoder":
            decoder.append((step, layer, rank, lines.ids[begin:end].reshape(count, k)))
    return decoder
