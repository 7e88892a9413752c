"""Read SGLang's dumps; read and write its maps of experts.

Dumps (``--expert-distribution-recorder-mode``) are files of ``torch.save`` with a row for every
hidden layer, dense ones too. Mode ``stat`` (and ``stat_approx``) has counts of experts,
``per_pass`` counts of slots by pass and rank, ``per_token`` the slots of every token, -1 beyond
top-k. Slots are translated by the last map that a dump holds.

A map for ``--init-expert-location`` has one key only, a row for every hidden layer, and never two
copies of an expert on one rank: the owner would load the first alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import ArgumentError, MissingArgumentError, array_in, shown
from moetuner.files import naming, npz
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats import pickled
from moetuner.formats.counts import add_up, add_window, counts_in, stack_windows, sum_by_expert
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout
from moetuner.formats.records import looks_like_json
from moetuner.formats.responses import Routed, join_arrays
from moetuner.formats.sources import first_file, list_files
from moetuner.placement import Placement

MAP = "physical_to_logical_map"
LAST_MAP = f"last_{MAP}"
IDS = "topk_ids_of_layer"
COUNTS, COUNT = "logical_count", "global_physical_count"
# Key beside counts that only say which experts are chosen, see ``formats/ktransformers.py``.
CHOSEN = "chosen_experts"


def recognises(file: Opened) -> bool:
    """Return whether a file or folder holds dumps of the recorder."""
    file = first_file(file)
    start = file.head[: 1 << 16]
    if not start.startswith(b"PK"):
        return looks_like_json(start) and f'"{COUNTS}"'.encode() in start
    if COUNTS.encode() in start:
        return True
    return b"records" in start and b"gatherer_key" in start and pickled.is_pickled(file)


@dataclass(frozen=True, eq=False)
class _Pass:
    """A forward pass that a rank recorded, with the expert in every slot [hidden,P]."""

    path: Path
    number: int
    rank: int
    slots: NDArray[np.int64]
    fields: dict[str, Any]


def read(sources: Sequence[Opened], hints: Hints) -> Traffic:
    """Read dumps of one recording, of all ranks: a trace of mode per_token, else counts."""
    counts: list[NDArray[Any]] = []
    passes: list[_Pass] = []
    files = list_files(sources)
    for file in files:
        with naming(file.path):
            content = _content(file)
            if not isinstance(content, dict) or not {COUNTS, "records"} & content.keys():
                raise ValueError(f"must be a dump of SGLang's recorder, with {COUNTS} or records")
            if CHOSEN in content:
                raise ValueError("must be recorded counts, got which experts a GPU holds")
            if COUNTS in content:
                for step in _distribution(content[COUNTS]):
                    add_window(counts, step)
            else:
                passes += _passes(file.path, content)
    with naming(files[0].path):
        modes = {"per_token" if IDS in step.fields else "per_pass" for step in passes}
        modes |= {"stat"} if counts else set()
        if len(modes) != 1:
            got = " and ".join(sorted(modes)) or "no pass"
            raise ValueError(f"dumps must be of one mode, got {got}")
        if counts:
            return stack_windows(counts, hints)
        passes.sort(key=lambda step: (step.number, step.rank))
        sizes = {(len(step.slots), int(step.slots.max(initial=0)) + 1) for step in passes}
        if len(sizes) > 1:
            both = " and ".join(f"{layers} x {experts}" for layers, experts in sorted(sizes)[:2])
            raise ValueError(f"dumps must be of one model, got {both} layers x experts")
        experts = sizes.pop()[1]
        hints.check_experts(experts)
        if "per_pass" in modes:
            return stack_windows(_by_pass(passes, experts), hints)
        hints = replace(hints, num_experts=experts)
        # Filled while the arrays are read.
        labels: list[int] = []
        arrays = _tokens(passes, hints, labels)
        return join_arrays(sources, arrays, hints, source="passes", sequence=labels)


def _content(file: Opened) -> Any:
    """Read a dump, or JSON or ``.npz`` that somebody made of it."""
    if pickled.is_pickled(file):
        return pickled.load(file.path)
    if file.head.startswith(b"PK"):
        return npz.read_npz(file.path, [COUNTS])
    return parse_json(file.read_whole())


def _distribution(value: Any) -> NDArray[np.int64]:
    """Return counts [steps,hidden,E] of the buffer's steps that were used."""
    table = value.array() if isinstance(value, pickled.Tensor) else array_in(COUNTS, value)
    count = counts_in(COUNTS, table[None] if table.ndim == 2 else table)
    if count.ndim != 3:
        got = list(count.shape)
        raise ValueError(f"{COUNTS} must be [layers, experts], or of every step, got {got}")
    used = count.reshape(len(count), -1).any(axis=1)
    return count[used] if used.any() else count[:1]


def _tensor(fields: dict[str, Any], name: str, dimensions: int) -> pickled.Tensor:
    """Return a field; raise unless it is a tensor of integers."""
    value = fields.get(name)
    if not isinstance(value, pickled.Tensor):
        got = f"a {type(value).__name__}"
    elif len(value.shape) != dimensions or "int" not in value.dtype:
        got = f"{value.dtype} {list(value.shape)}"
    else:
        return value
    raise ValueError(f"{name} must be a tensor of integers in {dimensions} dimensions, got {got}")


def _passes(path: Path, content: dict[str, Any]) -> Iterator[_Pass]:
    """Read the passes of a dump, without those that were gathered for another purpose."""
    slots = _tensor(content, LAST_MAP, 2).array().astype(np.int64)
    if slots.min(initial=0) < 0:
        raise ValueError(f"{LAST_MAP} must hold experts from 0, got {slots.min()}")
    if not isinstance(content["records"], list):
        raise ValueError(f"records must be a list, got {shown(content['records'])}")
    for number, fields in enumerate(content["records"]):
        if not isinstance(fields, dict):
            raise ValueError(f"record {number} must be a dict, got {shown(fields)}")
        at, rank = fields.get("forward_pass_id"), fields.get("rank")
        if type(at) is not int or type(rank) is not int:
            raise ValueError(f"record {number} must have a forward_pass_id and a rank")
        if fields.get("gatherer_key", "primary") == "primary":
            yield _Pass(path, at, rank, slots, fields)


def _by_pass(passes: Sequence[_Pass], experts: int) -> list[NDArray[Any]]:
    """Return the sum over ranks of every pass [hidden,E]."""
    sums: dict[tuple[int, int], NDArray[Any]] = {}
    repeats: Counter[tuple[int, int]] = Counter()
    for step in passes:
        with naming(step.path):
            count = counts_in(COUNT, _tensor(step.fields, COUNT, 2).array())
            load = sum_by_expert(count, step.slots, experts)
            # A rank has a pass once per run of the engine.
            key = (step.number, repeats[step.number, step.rank])
            repeats[step.number, step.rank] += 1
            sums[key] = add_up(sums.get(key), load)
    return [load for load in sums.values() if load.any()]


def _tokens(passes: Sequence[_Pass], hints: Hints, labels: list[int]) -> Iterator[Routed]:
    """Read the experts [t,hidden,K] of passes; add the sequence of every token to ``labels``."""
    sequences = _Sequences()
    before: list[tuple[int, Any, Any]] = []
    top_k = hints.top_k
    for step in passes:
        with naming(step.path):
            tensor = _tensor(step.fields, IDS, 3)
            ids, positions, lengths = _read_tokens(step, tensor.shape)
            # With tensor parallelism as the expert group, all ranks record the same tokens.
            before = [tokens for tokens in before if tokens[0] == step.number]
            if not ids or (step.number, ids, positions) in before:
                continue
            before.append((step.number, ids, positions))
            slots = tensor.array()
            top_k = top_k or int((slots >= 0).any(axis=(0, 1)).sum())
            if not 1 <= top_k <= tensor.shape[2]:
                raise ArgumentError(
                    f"top_k must be from 1 to {tensor.shape[2]}, got {top_k}", "top_k"
                )
            slots, left_out = np.split(slots[:, : len(ids)], [top_k], axis=2)
            if ((left_out >= 0) & (left_out < step.slots.shape[1])).any():
                raise ArgumentError(
                    f"top_k must be above {top_k}: tokens have more experts", "top_k"
                )
            experts = _translate(step, slots, hints.experts_needed())
            labels += sequences.assign(positions, lengths)
        yield Routed(step.path, experts)


def _translate(step: _Pass, slots: NDArray[Any], num_experts: int) -> NDArray[Any]:
    """Translate slots [hidden,t,K] to experts [t,hidden,K]; rows without any slot become zero."""
    count = step.slots.shape[1]
    if slots.max(initial=-1) >= count or slots.min(initial=-1) < -1:
        wrong = slots.max() if slots.max() >= count else slots.min()
        raise ValueError(f"pass {step.number}: slots must be below {count}, got {wrong}")
    # Expert of every slot; -1, the last entry, is no expert that there is.
    expert_of = np.pad(step.slots, ((0, 0), (0, 1)), constant_values=num_experts)
    expert_of = expert_of.astype(np.min_scalar_type(num_experts))
    experts = expert_of[np.arange(len(slots))[:, None, None], slots]
    experts[~(slots >= 0).any(axis=(1, 2))] = 0
    return np.ascontiguousarray(experts.transpose(1, 0, 2))


def _read_tokens(step: _Pass, shape: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Return input ids, positions and the lengths of the prompts of a pass."""
    names = ("input_ids", "positions", "extend_seq_lens")
    lists: list[Any] = [step.fields.get(name) for name in names]
    lists[2] = [] if lists[2] is None else lists[2]
    ids, positions, lengths = lists
    for name, numbers in zip(names, lists, strict=True):
        if not isinstance(numbers, list) or not all(isinstance(value, int) for value in numbers):
            raise ValueError(f"{name} must be a list of numbers, got {shown(numbers)}")
    layers, padded, _ = shape
    if layers != len(step.slots):
        raise ValueError(f"{IDS} must have {len(step.slots)} layers like the map, got {layers}")
    if len(ids) > padded or len(positions) != len(ids):
        raise ValueError(
            f"pass {step.number}: must have positions and ids of {len(ids)} tokens, "
            f"got {len(positions)} and {padded}"
        )
    if lengths and (sum(lengths) != len(ids) or min(lengths) < 0):
        raise ValueError(f"pass {step.number}: extend_seq_lens must add up to {len(ids)} tokens")
    return ids, positions, lengths


class _Sequences:
    """Sequences of tokens by their positions, as dumps have no names of requests.

    A token continues the oldest sequence that ends just before it. Only sequences of the same
    length can be confused.
    """

    def __init__(self) -> None:
        self.ends: dict[int, list[int]] = {}
        self.count = 0

    def assign(self, positions: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return the sequence of every token of a pass, in runs of these lengths or one by one."""
        labels: list[int] = []
        ended: list[tuple[int, int]] = []
        for length in filter(None, lengths or [1] * len(positions)):
            first, last = positions[len(labels)], positions[len(labels) + length - 1]
            before = self.ends.get(first) if first else None
            if before:
                label = before.pop(0)
            else:
                label, self.count = self.count, self.count + 1
            labels += [label] * length
            ended.append((last + 1, label))
        # Added at the end: two tokens of a pass are of one sequence only if they are of one run.
        for end, label in ended:
            self.ends.setdefault(end, []).append(label)
        return labels


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write a map for ``--init-expert-location``."""
    dense, hidden, layers = hints.dense_layers, hints.hidden_layers, placement.layers
    if dense is None and hidden is None:
        raise MissingArgumentError(
            "hidden_layers is needed: SGLang's map has a row for every hidden layer, dense ones "
            f"too; where all have experts, hidden_layers {layers}",
            "hidden_layers",
            "hidden_layers",
        )
    if dense is None and hidden is not None and hidden > layers:
        raise MissingArgumentError(
            f"dense_layers is needed: which {hidden - layers} of {hidden} hidden layers "
            f"have no experts, as the placement has {layers} layers",
            "dense_layers",
        )
    moe = hints.moe_numbers(layers)
    hidden = hidden or layers + len(dense or ())
    rows = placement.slots.reshape(layers, -1).tolist()
    # SGLang checks rows of dense layers, but never uses them: they repeat the next MoE layer's.
    at = np.minimum(np.searchsorted(moe, np.arange(hidden)), layers - 1)
    content = {MAP: [rows[row] for row in at]}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def recognises_map(file: Opened) -> bool:
    """Return whether a file is a map of SGLang, of JSON or ``torch.save``."""
    start = file.head[: 1 << 16]
    if looks_like_json(start):
        return f'"{MAP}"'.encode() in start
    is_ours = MAP.encode() in start and LAST_MAP.encode() not in start
    return is_ours and pickled.is_pickled(file)


def read_map(file: Opened, _: Hints) -> Layout:
    """Read a map: one row for every hidden layer."""
    is_pickled = pickled.is_pickled(file)
    content = pickled.load(file.path) if is_pickled else parse_json(file.read_whole())
    if not isinstance(content, dict) or set(content) != {MAP}:
        keys = sorted(map(str, content))[:4] if isinstance(content, dict) else shown(content)
        raise ValueError(f"must have the single key {MAP}, got {keys}")
    rows = content[MAP]
    rows = rows.array() if isinstance(rows, pickled.Tensor) else rows
    return Layout.from_rows(rows, counts_dense=True)
