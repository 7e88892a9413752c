"""SGLang: what its recorder dumps, routed experts of responses, and maps of experts to load.

Dumps (``--expert-distribution-recorder-mode``) are files of ``torch.save`` with a row for every
hidden layer, dense ones too. Mode ``stat`` (and ``stat_approx``) has counts of experts,
``per_pass`` counts of slots by pass and rank, ``per_token`` the slots of every token, -1 beyond
top-k. Slots are translated by the last map that a dump holds. Responses
(``--enable-return-routed-experts``) have logical ids as raw int32 in base64, [tokens, hidden
layers, top-k].

A map for ``--init-expert-location`` has one key only, a row for every hidden layer, and never two
copies of an expert on one rank: the owner would load the first alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.files import naming, read_whole, replacing
from moetuner.files.text import parse_json
from moetuner.formats import pickled
from moetuner.formats.hints import Hints, Traffic, files_in
from moetuner.formats.layout import Layout
from moetuner.formats.pieces import Base64Piece, Piece, decoded, ids_of, trace_of
from moetuner.formats.records import Record, head, looks_like_json, records
from moetuner.formats.slots import added, by_expert, counts_in
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

MAP = "physical_to_logical_map"
LAST_MAP = f"last_{MAP}"
ON = "start SGLang with --enable-return-routed-experts and ask for return_routed_experts"
INT32 = np.dtype("<i4")


def recognises(path: Path) -> bool:
    """Whether a file or folder holds dumps of the recorder."""
    if path.is_dir():
        files = sorted(path.iterdir())[:1]
        return bool(files) and files[0].is_file() and recognises(files[0])
    start = head(path, 1 << 16)
    if not start.startswith(b"PK") or not pickled.is_pickled(path):
        return False
    return b"logical_count" in start or (b"records" in start and b"gatherer_key" in start)


def recognises_responses(path: Path) -> bool:
    """Whether a file holds responses with routed experts."""
    start = head(path)
    ours = b'"meta_info"' in start or b'"sglext"' in start
    return looks_like_json(start) and ours and b'"routed_experts"' in start


@dataclass(frozen=True, eq=False)
class _Pass:
    """A forward pass that a rank recorded."""

    path: Path
    number: int
    rank: int
    slots: NDArray[np.int64]
    fields: dict[str, Any]


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read dumps of one recording, of all ranks: a trace of mode per_token, else counts.

    Raises
    ------
    ValueError
        Naming the file, if one is damaged, of another mode or of another model.
    """
    counts: list[NDArray[Any]] = []
    passes: list[_Pass] = []
    files = files_in(paths)
    for path in files:
        found = pickled.load(path)
        with naming(path):
            if isinstance(found, dict) and "logical_count" in found:
                counts.append(_counts(found["logical_count"]))
            elif isinstance(found, dict) and "records" in found:
                passes += _passes(path, found)
            else:
                raise ValueError(
                    "must be a dump of SGLang's recorder, with logical_count or records"
                )
    where = str(files[0]) if files else str(paths[0])
    with naming(where):
        if counts and passes:
            raise ValueError("dumps must be of one mode, got stat and per_pass or per_token")
        if counts:
            return _windows(counts, hints)
        tokens = ["topk_ids_of_layer" in each.fields for each in passes]
        if not passes:
            raise ValueError("must have at least one pass, got none")
        if any(tokens) and not all(tokens):
            raise ValueError("dumps must be of one mode, got per_pass and per_token")
        passes.sort(key=lambda each: (each.number, each.rank))
        return _trace(passes, hints) if all(tokens) else _windows(_by_pass(passes, hints), hints)


def _tensor(value: object, name: str, dimensions: int) -> NDArray[Any]:
    if not isinstance(value, pickled.Tensor) or len(value.shape) != dimensions:
        raise ValueError(f"{name} must be a tensor of {dimensions} dimensions, got {_kind(value)}")
    array = value.array()
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array


def _kind(value: object) -> str:
    if isinstance(value, pickled.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _counts(value: object) -> NDArray[Any]:
    count = counts_in("logical_count", _tensor(value, "logical_count", 3))
    # Of the buffer's steps, those that were used.
    return np.asarray(count[count.any(axis=(1, 2))])


def _windows(counts: Sequence[NDArray[Any]], hints: Hints) -> RoutingStatistics:
    """Make statistics of steps [steps,hidden,E], without the rows of dense layers."""
    sizes = {count.shape[1:] for count in counts}
    if len(sizes) > 1:
        raise ValueError(f"dumps must have the same layers and experts, got {sorted(sizes)[:2]}")
    load = np.concatenate(counts)
    if not len(load):
        raise ValueError("must have at least one step with tokens, got none")
    if hints.num_experts not in (None, load.shape[2]):
        raise ValueError(f"num_experts must be {load.shape[2]}, got {hints.num_experts}")
    moe = hints.moe_layers(load.shape[1])
    if moe is None:
        moe = np.flatnonzero(load.any(axis=(0, 2))).tolist()
    return RoutingStatistics.from_load(load[:, moe])


def _passes(path: Path, found: dict[str, Any]) -> Iterator[_Pass]:
    slots = _tensor(found.get(LAST_MAP), LAST_MAP, 2).astype(np.int64)
    if slots.min(initial=0) < 0:
        raise ValueError(f"{LAST_MAP} must hold experts from 0, got {slots.min()}")
    listed = found["records"]
    if not isinstance(listed, list):
        raise ValueError(f"records must be a list, got {_kind(listed)}")
    for number, fields in enumerate(listed):
        if not isinstance(fields, dict):
            raise ValueError(f"record {number} must be a dict, got {_kind(fields)}")
        ids = [fields.get(key) for key in ("forward_pass_id", "rank")]
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in ids):
            raise ValueError(f"record {number} must have a forward_pass_id and a rank")
        if fields.get("gatherer_key", "primary") == "primary":
            yield _Pass(path, ids[0], ids[1], slots, fields)  # type: ignore[arg-type]


def _experts(passes: Sequence[_Pass], hints: Hints) -> int:
    """Count the experts of the map, in which every one has a slot."""
    counts = {int(each.slots.max(initial=0)) + 1 for each in passes}
    if len(counts) > 1:
        raise ValueError(f"dumps must be of one model, got {min(counts)} and {max(counts)} experts")
    experts = counts.pop()
    if hints.num_experts not in (None, experts):
        raise ValueError(f"num_experts must be {experts}, got {hints.num_experts}")
    return experts


def _by_pass(passes: Sequence[_Pass], hints: Hints) -> list[NDArray[Any]]:
    """Add up the ranks of every pass: [passes,hidden,E]."""
    experts = _experts(passes, hints)
    sums: dict[tuple[int, int], NDArray[Any]] = {}
    seen: Counter[tuple[int, int]] = Counter()
    for each in passes:
        with naming(each.path):
            name = "global_physical_count"
            count = counts_in(name, _tensor(each.fields.get(name), name, 2))
            load = by_expert(count[None], each.slots, experts)[0]
        # A rank has a pass once; again, it is another run of the engine.
        key = (each.number, seen[each.number, each.rank])
        seen[each.number, each.rank] += 1
        if key in sums and sums[key].shape != load.shape:
            raise ValueError(
                f"ranks must have the same layers, got {len(sums[key])} and {len(load)}"
            )
        sums[key] = added(sums.get(key), load)
    found = [load for load in sums.values() if load.any()]
    if len({load.shape for load in found}) > 1:
        raise ValueError("dumps must have the same layers and experts")
    return [np.stack(found)] if found else []


class _TokenPiece:
    """The tokens of a pass: slots in the file, experts when they are read."""

    def __init__(
        self, of: _Pass, tensor: pickled.Tensor, tokens: int, top_k: int, experts: int
    ) -> None:
        self.path, self.tensor, self.number = of.path, tensor, of.number
        self.shape = (tokens, tensor.shape[0], top_k)
        self.dtype = np.dtype(np.uint8 if experts < 255 else np.uint16)
        # Expert of every slot; -1, the last entry, is no expert that there is.
        self.expert_of = np.full((len(of.slots), of.slots.shape[1] + 1), experts, self.dtype)
        self.expert_of[:, :-1] = of.slots

    def read(self, first: int, count: int) -> NDArray[Any]:
        """Translate slots to experts; rows without any become zero, as those of dense layers."""
        slots = self.tensor.array()[:, first : first + count, : self.shape[2]]
        most = self.expert_of.shape[1] - 1
        if slots.max(initial=-1) >= most or slots.min(initial=-1) < -1:
            wrong = slots.max() if slots.max() >= most else slots.min()
            raise ValueError(f"pass {self.number}: slots must be below {most}, got {wrong}")
        experts = np.empty((count, *self.shape[1:]), self.dtype)
        for layer, held in enumerate(slots):
            dense = bool(held[0, 0] < 0 and (held < 0).all())
            experts[:, layer] = 0 if dense else self.expert_of[layer].take(held)
        return experts


def _trace(passes: Sequence[_Pass], hints: Hints) -> RoutingTrace:
    """Make a trace of the tokens of all passes, without those that several ranks have."""
    pieces: list[Piece] = []
    labels: list[int] = []
    sequences = _Sequences()
    before: list[tuple[int, Any, Any]] = []
    top_k = hints.top_k
    most = (1 << 16) - 1
    experts = _experts(passes, hints)
    for each in passes:
        with naming(each.path):
            tensor = each.fields["topk_ids_of_layer"]
            if not isinstance(tensor, pickled.Tensor) or len(tensor.shape) != 3:
                raise ValueError(
                    "topk_ids_of_layer must be a tensor [layers, tokens, top_k], "
                    f"got {_kind(tensor)}"
                )
            if tensor.dtype not in ("int32", "int64", "int16"):
                raise ValueError(f"topk_ids_of_layer must be integers, got {tensor.dtype}")
            if tensor.shape[0] != len(each.slots):
                raise ValueError(
                    f"topk_ids_of_layer must have {len(each.slots)} layers like the map of slots, "
                    f"got {tensor.shape[0]}"
                )
            ids, positions, lengths = _tokens_of(each, tensor.shape[1])
            # With tensor parallelism as the expert group, all ranks record the same tokens.
            before = [known for known in before if known[0] == each.number]
            if (each.number, ids, positions) in before:
                continue
            before.append((each.number, ids, positions))
            if not ids:
                continue
            if top_k is None:
                used = (tensor.array() >= 0).any(axis=(0, 1))
                top_k = int(used.sum())
            if not 1 <= top_k <= tensor.shape[2]:
                raise ValueError(f"top_k must be from 1 to {tensor.shape[2]}, got {top_k}")
            if hints.top_k is not None:
                left_out = tensor.array()[:, : len(ids), top_k:]
                if ((left_out >= 0) & (left_out < each.slots.shape[1])).any():
                    raise ValueError(f"top_k must be above {top_k}: tokens have more experts")
            if experts > most:
                raise ValueError(f"{LAST_MAP} must hold experts below {most}, got {experts - 1}")
            pieces.append(_TokenPiece(each, tensor, len(ids), top_k, experts))
            labels += sequences.of(positions, lengths)
    moe = hints.moe_layers(pieces[0].shape[1]) if pieces else None
    ids_of_all = ids_of(pieces, experts, moe, "passes")
    return RoutingTrace(ids_of_all, experts, sequence=np.asarray(labels, dtype=np.int32))


def _tokens_of(each: _Pass, most: int) -> tuple[list[Any], list[Any], list[int]]:
    """Return input ids, positions and the lengths of the prompts of a pass."""
    ids, positions = (each.fields.get(key) for key in ("input_ids", "positions"))
    lengths = each.fields.get("extend_seq_lens") or []
    for name, values in (
        ("input_ids", ids),
        ("positions", positions),
        ("extend_seq_lens", lengths),
    ):
        if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
            raise ValueError(f"{name} must be a list of numbers, got {_kind(values)}")
    assert isinstance(ids, list)
    assert isinstance(positions, list)
    if len(ids) > most or len(positions) != len(ids):
        raise ValueError(
            f"pass {each.number}: must have positions and ids of {len(ids)} tokens, "
            f"got {len(positions)} and {most}"
        )
    if lengths and (sum(lengths) != len(ids) or min(lengths) < 0):
        raise ValueError(f"pass {each.number}: extend_seq_lens must add up to {len(ids)} tokens")
    return ids, positions, lengths


class _Sequences:
    """Which tokens belong together, by their positions: dumps carry no names of requests.

    A token goes on with the oldest sequence that ends just before it. Sequences of one length can
    be taken for each other; all else is certain.
    """

    def __init__(self) -> None:
        self.ends: dict[int, list[int]] = {}
        self.count = 0

    def of(self, positions: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return the sequence of every token of a pass, in runs of these lengths or one by one."""
        labels: list[int] = []
        ended: list[tuple[int, int]] = []
        at = 0
        for length in lengths or [1] * len(positions):
            if not length:
                continue
            first = positions[at]
            open_ = self.ends.get(first) if first else None
            if open_:
                label = open_.pop(0)
            else:
                label, self.count = self.count, self.count + 1
            labels += [label] * length
            ended.append((positions[at + length - 1] + 1, label))
            at += length
        # Only now: no two tokens of a pass are of one sequence, but for those of its run.
        for end, label in ended:
            self.ends.setdefault(end, []).append(label)
        return labels


def read_responses(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read routed experts of responses: each is a sequence.

    Raises
    ------
    ValueError
        Naming file and response of what is wrong.
    """
    pieces: list[Piece] = []
    for path in files_in(paths):
        with naming(path):
            before = len(pieces)
            for record in records(path):
                pieces += _of_response(path, record, hints)
            if len(pieces) == before:
                raise ValueError(f"holds no routed experts: {ON}")
    return trace_of(pieces, hints, paths)


def _of_response(path: Path, record: Record, hints: Hints) -> Iterator[Piece]:
    """Find the arrays of a response, of SGLang's own route or of OpenAI's."""
    fields = record.fields
    choices = fields.get("choices")
    of_choices = choices if isinstance(choices, list) else []
    found = [(fields.get("meta_info"), "meta_info"), (fields.get("sglext"), "sglext")]
    found += [
        (choice.get("sglext"), f"choice {number}")
        for number, choice in enumerate(of_choices)
        if isinstance(choice, dict)
    ]
    for part, name in found:
        text = part.get("routed_experts") if isinstance(part, dict) else None
        if text is None:
            continue
        where = f"{record.where}, {name}"
        if not isinstance(text, str) or len(text) % 4 or not text.isascii():
            raise ValueError(f"{where}: routed_experts must be base64, got {shown(text)}")
        count = (len(text) // 4 * 3 - text[-2:].count("=")) / INT32.itemsize
        usage = fields.get("usage") if name != "meta_info" else part
        shape = _shape(count, usage if isinstance(usage, dict) else {}, hints, where)
        place = record.find(text)
        if place is None:
            raise ValueError(f"{where}: routed_experts must be plain letters, not escaped")
        decoded(text[-8:].encode(), where)
        yield Base64Piece(path, place, shape, INT32, 0, where)


def _shape(count: float, usage: dict[str, Any], hints: Hints, where: str) -> tuple[int, int, int]:
    """Return tokens, hidden layers and top-k of so many ids."""
    if count != int(count):
        got = f"{count * INT32.itemsize:.0f} bytes"
        raise ValueError(f"{where}: routed_experts must be 32-bit integers, got {got}")
    if hints.top_k is None:
        raise ValueError(f"top_k is needed ({where}): responses hold bytes without a shape")
    rows, rest = divmod(int(count), hints.top_k)
    layers = hints.hidden_layers
    if layers is None:
        numbers = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(
                f"hidden_layers is needed ({where}): the response does not say its tokens"
            )
        tokens = sum(numbers) - 1  # type: ignore[arg-type]
        layers = rows // tokens if tokens > 0 else 0
    if rest or not rows or not layers or rows % layers:
        raise ValueError(
            f"{where}: routed_experts must fill tokens x layers x top-k, got {int(count)} numbers "
            f"for top-k {hints.top_k} and {layers} layers; with a start in the request, "
            "hidden_layers must be given"
        )
    return rows // layers, layers, hints.top_k


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write a map for ``--init-expert-location``.

    Raises
    ------
    ValueError
        If it is not known which hidden layers have experts, or they are not as many as the
        placement has.
    """
    dense = hints.dense_layers
    hidden = hints.hidden_layers
    if hidden is None and dense is not None:
        hidden = placement.layers + len(dense)
    if hidden is None:
        raise ValueError(
            "hidden_layers is needed: SGLang's map has a row for every hidden layer, dense ones "
            f"too; where all have experts, hidden_layers {placement.layers}"
        )
    if dense is None and hidden != placement.layers:
        raise ValueError(
            f"dense_layers is needed: which {hidden - placement.layers} of {hidden} hidden layers "
            f"have no experts, as the placement has {placement.layers} layers"
        )
    moe = [layer for layer in range(hidden) if layer not in (dense or ())]
    if len(moe) != placement.layers:
        raise ValueError(
            f"hidden_layers and dense_layers must leave {placement.layers} layers, as the "
            f"placement has, got {len(moe)}"
        )
    rows = placement.slots.reshape(placement.layers, -1).tolist()
    # Rows of dense layers are checked, but never used: that of the next layer with experts.
    at = np.minimum(np.searchsorted(moe, np.arange(hidden)), placement.layers - 1)
    with replacing(path) as temporary:
        content = {MAP: [rows[row] for row in at]}
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def recognises_map(path: Path) -> bool:
    """Whether a file is a map of SGLang, as JSON or of ``torch.save``."""
    start = head(path, 1 << 16)
    if looks_like_json(start):
        return f'"{MAP}"'.encode() in start
    ours = MAP.encode() in start and LAST_MAP.encode() not in start
    return ours and pickled.is_pickled(path)


def read_map(path: Path, _: Hints) -> Layout:
    """Read a map: one row for every hidden layer.

    Raises
    ------
    ValueError
        If there is another key: SGLang takes every key for an argument.
    """
    with naming(path):
        found = pickled.load(path) if pickled.is_pickled(path) else parse_json(read_whole(path))
        if not isinstance(found, dict) or set(found) != {MAP}:
            keys = sorted(map(str, found))[:4] if isinstance(found, dict) else _kind(found)
            raise ValueError(f"must have the single key {MAP}, got {keys}")
        rows = found[MAP]
        rows = rows.array() if isinstance(rows, pickled.Tensor) else rows
        return Layout.of(rows, counts_dense=True)
