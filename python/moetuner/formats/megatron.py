"""Megatron-Core's router trace, and the arrays that its RouterReplay records.

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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import id_type
from moetuner.files import naming, size_of
from moetuner.files.lines import NO_INTEGER, NO_TEXT, Keys, Lines, batches
from moetuner.formats import pickled
from moetuner.formats.arrays import names_in, read_arrays
from moetuner.formats.hints import Hints
from moetuner.formats.microbatches import Microbatches, few, trace_of_microbatches
from moetuner.formats.records import head
from moetuner.formats.sources import by_rank, rank_of
from moetuner.trace import RoutingTrace

PATTERN = "router_trace_rank*.jsonl"
NUMBERS = ("step", "layer", "rank")
KEYS = Keys([("top_indices", 2)], [*NUMBERS, "num_tokens", "topk"], ["block", "stage"])
REPLAY = re.compile(
    r"arr_(?P<number>\d{1,6})|(?:step[_.]?(?P<step>\d{1,9})[._])?layer[_.]?(?P<layer>\d{1,6})",
    re.ASCII,
)
# Step, layer and rank of a line, and its ids [t,K].
Line = tuple[int, int, int, NDArray[Any]]


def recognises(path: Path) -> bool:
    """Whether a file or folder is a router trace, or a file the arrays of RouterReplay."""
    if path.is_dir():
        return any(path.glob(PATTERN))
    start = head(path, 4096)
    if start.lstrip()[:1] == b"{":
        return all(key in start for key in (b'"top_indices"', b'"layer"', b'"block"'))
    return is_replay(path)


def is_replay(path: Path) -> bool:
    """Whether a file holds arrays by number or layer and nothing else, or is a ``.pt`` list."""
    if pickled.is_pickled(path):
        return isinstance(pickled.peek(path), list | tuple)
    names = names_in(path) if head(path, 2) == b"PK" else []
    return bool(names) and all(map(REPLAY.fullmatch, names))


def read(paths: Sequence[Path], hints: Hints) -> RoutingTrace:
    """Read the files of all ranks, or arrays of RouterReplay.

    Raises
    ------
    ValueError
        If a line is damaged, a rank's file is missing, or a microbatch lacks a layer.
    """
    files = by_rank(paths, PATTERN)
    with naming(files[0]):
        experts = hints.experts_needed()
    replays = [is_replay(file) for file in files]
    if all(replays):
        parts = [read_replay(file, experts) for file in files]
        ranks = [rank_of(file) for file in files]
        if None not in ranks and len(set(ranks)) == len(ranks):
            parts = [
                replace(part, group=np.zeros(part.tokens, np.int16), group_names=(f"rank {rank}",))
                for part, rank in zip(parts, ranks, strict=True)
            ]
        return RoutingTrace.concat(parts)
    if any(replays):
        raise ValueError(
            f"{files[replays.index(True)]}: must be a router trace like the other files, "
            "got arrays of RouterReplay"
        )
    batches_of: Microbatches = {}
    for file in files:
        _gather(file, experts, batches_of)
    where = files[0] if len(files) == 1 else files[0].parent
    return trace_of_microbatches(where, _stages_joined(batches_of), experts)


def read_replay(path: Path, experts: int) -> RoutingTrace:
    """Read the arrays [T,K] of all MoE layers, of one step or of several.

    Raises
    ------
    ValueError
        If they differ in shape, or are no ids.
    """
    with naming(path):
        if pickled.is_pickled(path):
            tensors = pickled.load(path)
            if not isinstance(tensors, list | tuple):
                raise ValueError(f"must be a list of tensors, got a {type(tensors).__name__}")
            return _replayed(
                [t.array() if isinstance(t, pickled.Tensor) else t for t in tensors], experts
            )
        steps: dict[int, dict[int, str]] = {}
        for name in names_in(path):
            match = REPLAY.fullmatch(name)
            if match is None:
                raise ValueError(f"arrays must be named as step0.layer3, got {name:.40}")
            step, layer = int(match["step"] or 0), int(match["layer"] or match["number"])
            steps.setdefault(step, {})[layer] = name
        arrays = read_arrays(path, names_in(path))
        parts = []
        for step, names in sorted(steps.items()):
            layers = sorted(steps[min(steps)])
            if sorted(names) != layers:
                raise ValueError(f"step {step} must have layers {few(layers)}")
            parts.append(_replayed([arrays[names[layer]] for layer in layers], experts))
        if len(parts) == 1:
            return parts[0]
        sequence = np.repeat(np.arange(len(parts)), [part.tokens for part in parts])
        return replace(RoutingTrace.concat(parts), sequence=sequence.astype(np.int32))


def _replayed(arrays: Sequence[Any], experts: int) -> RoutingTrace:
    """Join the ids [T,K] of all MoE layers to a trace."""
    for layer, array in enumerate(arrays):
        if not isinstance(array, np.ndarray):
            raise ValueError(
                f"layer {layer} must be ids [tokens, top_k], got a {type(array).__name__}"
            )
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise ValueError(
                f"layer {layer} must be ids [tokens, top_k], got {array.dtype} {list(array.shape)}"
            )
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"layer {layer} must be {list(arrays[0].shape)} like layer 0, "
                f"got {list(array.shape)}"
            )
    if not len(arrays):
        raise ValueError("must hold ids of at least one layer, got none")
    return RoutingTrace.from_arrays(np.stack(arrays, axis=1), num_experts=experts)


def _gather(path: Path, experts: int, batches_of: Microbatches) -> None:
    """Add the lines of a file to microbatches; ids are not validated."""
    turns: dict[tuple[int, int, int], int] = {}
    with naming(path):
        size_of(path)
        for step, layer, rank, ids in _lines(path):
            if ids.size and not 0 <= ids.min() <= ids.max() < experts:
                wrong = ids.min() if ids.min() < 0 else ids.max()
                raise ValueError(
                    f"step {step}, layer {layer}: expert id {wrong} is not below "
                    f"num_experts {experts}"
                )
            turn = turns.get((step, layer, rank), 0)
            turns[step, layer, rank] = turn + 1
            layers = batches_of.setdefault((step, turn, rank), {})
            if layer in layers:
                raise ValueError(f"step {step}, layer {layer}: rank {rank} is in another file too")
            layers[layer] = ids.astype(id_type(np.dtype(np.int64), experts))
        if not turns:
            raise ValueError("must hold lines of block 'decoder', got none")


def _lines(path: Path) -> Iterator[Line]:
    """Read every line of the decoder."""
    taken: list[Line] = []
    for lines in batches(path, KEYS):
        lines.hand_to(lambda part: taken.extend(_decoder(part)))
        yield from taken
        taken.clear()


def _decoder(lines: Lines) -> list[Line]:
    """Return those lines that are of the decoder.

    Raises
    ------
    ValueError
        Naming the key that is missing or wrong.
    """
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


def _stages_joined(batches_of: Microbatches) -> Microbatches:
    """Join what ranks of several pipeline stages hold of a microbatch, under that of the first one.

    Stages are the outermost of Megatron's groups, so the ranks of a stage stand together, and the
    first of each hold layers of the same tokens. What does not look like stages is left as it is.
    """
    layers_of: dict[int, set[int]] = {}
    for (_, _, rank), layers in batches_of.items():
        layers_of.setdefault(rank, set()).update(layers)
    stages: dict[frozenset[int], list[int]] = {}
    for rank in sorted(layers_of):
        stages.setdefault(frozenset(layers_of[rank]), []).append(rank)
    overlap = sum(map(len, stages)) > len(set().union(*stages))
    if overlap or len({len(ranks) for ranks in stages.values()}) > 1:
        return batches_of
    first = {rank: peers[0] for peers in zip(*stages.values(), strict=True) for rank in peers}
    joined: Microbatches = {}
    for (step, turn, rank), layers in batches_of.items():
        joined.setdefault((step, turn, first[rank]), {}).update(layers)
    return joined
