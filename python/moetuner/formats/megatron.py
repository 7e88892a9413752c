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

from moetuner._checks import experts_in, id_type, shown
from moetuner.files import naming, npz, size_of
from moetuner.files.lines import NO_INTEGER, NO_TEXT, Batch, Keys, batches
from moetuner.formats import pickled
from moetuner.formats.hints import Hints
from moetuner.formats.ranks import by_rank, rank_of
from moetuner.formats.records import head
from moetuner.trace import RoutingTrace

PATTERN = "router_trace_rank*.jsonl"
KEYS = Keys(
    [("top_indices", 2)], ["step", "layer", "rank", "num_tokens", "topk"], ["block", "stage"]
)
REPLAY = re.compile(
    r"arr_(?P<number>\d{1,6})|(?:step[_.]?(?P<step>\d{1,9})[._])?layer[_.]?(?P<layer>\d{1,6})",
    re.ASCII,
)
NUMBERS = ("step", "layer", "rank")
# A microbatch: its step, which of the rank's it is in that step, and the rank.
Microbatch = tuple[int, int, int]


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
    if head(path, 2) != b"PK":
        return False
    with naming(path):
        names = npz.names_in_npz(path)
    return bool(names) and all(REPLAY.fullmatch(name) for name in names)


def read(paths: Sequence[Path], hints: Hints) -> RoutingTrace:
    """Read the files of all ranks, or arrays of RouterReplay.

    Raises
    ------
    ValueError
        If a line is damaged, a rank's file is missing, or a microbatch lacks a layer.
    """
    files = by_rank(paths, PATTERN)
    replays = [is_replay(file) for file in files]
    if all(replays):
        parts = [read_replay(file, hints) for file in files]
        ranks = [rank_of(file) for file in files]
        if None in ranks or len(set(ranks)) < len(ranks):
            return RoutingTrace.concat(parts)
        return RoutingTrace.concat(
            [
                replace(part, group=np.zeros(part.tokens, np.int16), group_names=(f"rank {rank}",))
                for part, rank in zip(parts, ranks, strict=True)
            ]
        )
    if any(replays):
        raise ValueError(
            f"{files[replays.index(True)]}: must be a router trace like the other files, "
            "got arrays of RouterReplay"
        )
    experts = _experts(hints, files[0])
    found: dict[Microbatch, dict[int, NDArray[Any]]] = {}
    for file in files:
        _gather(file, experts, found)
    return _joined(files, experts, _whole(found))


def read_replay(path: Path, hints: Hints) -> RoutingTrace:
    """Read the arrays [T,K] of all MoE layers.

    Raises
    ------
    ValueError
        If they differ in shape, or are no ids.
    """
    experts = _experts(hints, path)
    with naming(path):
        if pickled.is_pickled(path):
            tensors = pickled.load(path)
            if not isinstance(tensors, list | tuple):
                raise ValueError(f"must be a list of tensors, got a {type(tensors).__name__}")
            return replayed(
                [t.array() if isinstance(t, pickled.Tensor) else t for t in tensors], experts
            )
        steps: dict[int, dict[int, str]] = {}
        for name in npz.names_in_npz(path):
            found = REPLAY.fullmatch(name)
            if found is None:
                raise ValueError(f"arrays must be named as step0.layer3, got {name:.40}")
            step, layer = int(found["step"] or 0), int(found["layer"] or found["number"])
            steps.setdefault(step, {})[layer] = name
        arrays = npz.read_npz(path, tuple(name for of in steps.values() for name in of.values()))
        parts = []
        for step, of in sorted(steps.items()):
            if set(of) != set(steps[min(steps)]):
                raise ValueError(f"step {step} must have layers {_few(sorted(steps[min(steps)]))}")
            parts.append(replayed([arrays[of[layer]] for layer in sorted(of)], experts))
        if len(parts) == 1:
            return parts[0]
        sequence = np.repeat(np.arange(len(parts)), [part.tokens for part in parts])
        return replace(RoutingTrace.concat(parts), sequence=sequence.astype(np.int32))


def replayed(arrays: Sequence[Any], num_experts: int) -> RoutingTrace:
    """Join the ids [T,K] of all MoE layers to a trace.

    Raises
    ------
    ValueError
        If they differ in shape, or are no ids.
    """
    for layer, array in enumerate(arrays):
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu":
            raise ValueError(f"layer {layer} must be ids [tokens, top_k], got {_kind(array)}")
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"layer {layer} must be {list(arrays[0].shape)} like layer 0, "
                f"got {list(array.shape)}"
            )
    if not len(arrays):
        raise ValueError("must hold ids of at least one layer, got none")
    return RoutingTrace.from_arrays(np.stack(arrays, axis=1), num_experts=num_experts)


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _experts(hints: Hints, path: Path) -> int:
    if hints.num_experts is None:
        raise ValueError(f"{path}: num_experts is needed: the file does not say it")
    return experts_in(hints.num_experts)


def _gather(path: Path, experts: int, found: dict[Microbatch, dict[int, NDArray[Any]]]) -> None:
    """Add the lines of a file to microbatches; ids are not validated."""
    seen: dict[tuple[int, int, int], int] = {}
    with naming(path):
        size_of(path)
        for step, layer, rank, ids in _lines(path):
            if ids.size and ids.max() >= experts:
                raise ValueError(
                    f"step {step}, layer {layer}: expert id {ids.max()} is not below "
                    f"num_experts {experts}"
                )
            turn = seen.get((step, layer, rank), 0)
            seen[step, layer, rank] = turn + 1
            layers = found.setdefault((step, turn, rank), {})
            if layer in layers:
                raise ValueError(f"step {step}, layer {layer}: rank {rank} is in another file too")
            layers[layer] = ids.astype(id_type(np.dtype(np.int64), experts))
        if not seen:
            raise ValueError("must hold lines of block 'decoder', got none")


def _lines(path: Path) -> Iterator[tuple[int, int, int, NDArray[Any]]]:
    """Step, layer, rank and ids [t,K] of every line of the decoder."""
    for found in batches(path, KEYS):
        if isinstance(found, Batch) and _is_plain(found):
            yield from _decoder(found)
            continue
        for number, line in found.one_by_one() if isinstance(found, Batch) else [found]:
            try:
                of = _line(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if of is not None:
                yield of


def _decoder(lines: Batch) -> Iterator[tuple[int, int, int, NDArray[Any]]]:
    """Step, layer, rank and ids of the lines of a batch that are of the decoder."""
    decoder = [name == "decoder" for name in lines.names]
    blocks, tokens, top_k = (
        column.tolist() for column in (lines.texts["block"], *lines.sizes.T[1:])
    )
    numbers = zip(*(lines.integers[name].tolist() for name in NUMBERS), strict=True)
    end = 0
    for (step, layer, rank), block, count, k in zip(numbers, blocks, tokens, top_k, strict=True):
        begin, end = end, end + count * k
        if decoder[block]:
            yield step, layer, rank, lines.ids[begin:end].reshape(count, k)


def _is_plain(lines: Batch) -> bool:
    """Whether all lines have all keys, of values that agree with the ids."""
    given = lines.integers
    return not (
        any((given[name] == NO_INTEGER).any() or (given[name] < 0).any() for name in NUMBERS)
        or any((lines.texts[name] == NO_TEXT).any() for name in KEYS.texts)
        or (given["num_tokens"] != lines.sizes[:, 1]).any()
        or (given["topk"] != lines.sizes[:, 2]).any()
    )


def _line(line: dict[str, Any]) -> tuple[int, int, int, NDArray[Any]] | None:
    """Step, layer, rank and ids of a line; None if it is not of the decoder.

    Raises
    ------
    ValueError
        Naming the key that is missing or wrong.
    """
    missing = [key for key in (*KEYS.integers, *KEYS.texts, "top_indices") if key not in line]
    if missing:
        raise ValueError(f"must have {missing[0]!r} as a router trace has, got {list(line)[:8]}")
    for key in KEYS.integers:
        if isinstance(line[key], bool) or not isinstance(line[key], int) or line[key] < 0:
            raise ValueError(f"{key} must be an integer of at least 0, got {shown(line[key])}")
    if line["block"] != "decoder":
        return None
    shape = (line["num_tokens"], line["topk"])
    try:
        ids = np.asarray(line["top_indices"])
    except (ValueError, OverflowError):
        raise ValueError("top_indices must be ids [tokens, top_k]") from None
    if shape[0] == 0 and ids.size == 0:
        ids = np.zeros(shape, dtype=np.uint16)
    if ids.shape != shape or ids.dtype.kind not in "iu":
        raise ValueError(
            f"top_indices must be integers {list(shape)}, as num_tokens and topk say, "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 16):
        raise ValueError(f"top_indices must be from 0 to 65535, got {ids.min()} to {ids.max()}")
    return line["step"], line["layer"], line["rank"], ids.astype(np.uint16)


def _whole(
    found: dict[Microbatch, dict[int, NDArray[Any]]],
) -> dict[Microbatch, dict[int, NDArray[Any]]]:
    """Join what ranks of several pipeline stages hold of a microbatch, under that of the first one.

    Stages are the outermost of Megatron's groups, so the ranks of a stage stand together, and the
    first of each hold layers of the same tokens. What does not look like stages is left as it is.
    """
    held: dict[int, set[int]] = {}
    for (_, _, rank), layers in found.items():
        held.setdefault(rank, set()).update(layers)
    stages: dict[frozenset[int], list[int]] = {}
    for rank in sorted(held):
        stages.setdefault(frozenset(held[rank]), []).append(rank)
    overlap = sum(map(len, stages)) > len(set().union(*stages))
    if overlap or len({len(ranks) for ranks in stages.values()}) > 1:
        return found
    first = {rank: peers[0] for peers in zip(*stages.values(), strict=True) for rank in peers}
    joined: dict[Microbatch, dict[int, NDArray[Any]]] = {}
    for (step, turn, rank), layers in found.items():
        joined.setdefault((step, turn, first[rank]), {}).update(layers)
    return joined


def _joined(
    files: Sequence[Path], experts: int, found: dict[Microbatch, dict[int, NDArray[Any]]]
) -> RoutingTrace:
    """Join microbatches in the order of time, and of ranks within it."""
    where = files[0] if len(files) == 1 else files[0].parent
    numbers = sorted({layer for layers in found.values() for layer in layers})
    keys = sorted(found)
    steps = {rank: max(s for s, _, r in keys if r == rank) for rank in {key[2] for key in keys}}
    for step, turn, rank in keys:
        layers = found[step, turn, rank]
        here = f"{where}: step {step}, rank {rank}"
        missing = sorted(set(numbers) - layers.keys())
        if missing:
            raise ValueError(
                f"{here}: must have a line for each of layers {_few(numbers)}, got none of layer "
                f"{missing[0]}: a file is cut off or missing"
            )
        sizes = {layers[layer].shape for layer in numbers}
        if len(sizes) > 1:
            raise ValueError(f"{here}: layers must have the same tokens, got {sorted(sizes)}")
    if len(set(steps.values())) > 1:
        short, long = min(steps, key=lambda r: (steps[r], r)), max(steps, key=lambda r: steps[r])
        raise ValueError(
            f"{where}: rank {short} must have steps to {steps[long]} like rank {long}, "
            f"got {steps[short]} as its last: the file is cut off"
        )
    rows = [np.stack([found[key].pop(layer) for layer in numbers], axis=1) for key in keys]
    if len({row.shape[1:] for row in rows}) > 1:
        raise ValueError(f"{where}: lines must have the same topk, got several")
    tokens = [len(row) for row in rows]
    ranks = sorted(steps)
    group = [ranks.index(key[2]) for key in keys]
    ids = np.concatenate(rows)
    return RoutingTrace.from_arrays(
        ids,
        num_experts=experts,
        sequence=np.repeat(np.arange(len(keys)), tokens),
        group=np.repeat(np.asarray(group, dtype=np.int16), tokens),
        group_names=[f"rank {rank}" for rank in ranks],
    )


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ..." if len(numbers) > 8 else shown
