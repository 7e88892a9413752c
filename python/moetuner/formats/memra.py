"""Read traces of memra's router; read and write its map of experts to two cards.

``MEMRA_MOE_TRACE`` appends a line ``<layer> <t> <id,id,...>`` for every layer of a forward pass of
t tokens, token by token; ``MEMRA_MOE_WEIGHT_TRACE`` the same with ``id:weight``; layer 65535 is a
draft head. ``MEMRA_MOE_SEL_DUMP`` is binary without a header: u8 layer, u8 n, n times u16 expert
and f32 weight, for every token and layer (``moe_sel_dump.rs``). A pass that the end of the file
cuts off is left out.

The map, ``memra-ep-map-v1`` (``ep_map.rs``), has the rank of every expert of a layer: none on both
cards. Its loaders take two ranks with as many experts each, every layer with experts, and rank 0
as the one where tokens arrive.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import DEVICE_LIMIT, LAYER_LIMIT, experts_in, shown, whole_number
from moetuner.files import naming, replacing, size_of
from moetuner.files.contents import TraceInParts
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats.hints import Hints
from moetuner.formats.layout import Layout
from moetuner.formats.records import looks_like_json
from moetuner.formats.sources import first_file, list_files
from moetuner.placement import EMPTY, Placement
from moetuner.trace import RoutingTrace

FORMAT = "memra-ep-map-v1"
LINE = r"\d{1,5} \d{1,9} \d{1,5}(?::[^,\s]{1,30})?(?:,\d{1,5}(?::[^,\s]{1,30})?)*\r?\n"
GOOD = re.compile(LINE, re.ASCII)
# A line without weights, as all lines of a block should be once weights are removed.
PLAIN = re.compile(r"\d{1,5} \d{1,9} [0-9,]+\r?\n", re.ASCII)
BEGIN = re.compile(r"\d{1,5} \d{1,9} \d{1,5}(?::[^,\s]{1,30})?,\d", re.ASCII)
CHARACTERS = re.compile(r"[0-9 ,:.eE+\-\r\n]*")
WEIGHT = re.compile(r":[^,\s]*", re.ASCII)
BLOCK = 1 << 20
DRAFT_HEAD = (1 << 16) - 1
# A dump has no magic number: so many of its first records are read to recognise it.
FIRST = 64
# Largest number of experts in a record.
MOST_CHOSEN = 64
# Largest weight of an expert in a record.
LARGEST_WEIGHT = 1e4
CAUTION = (
    "memra's trace names no requests, so tokens of all of them follow one another: differences "
    "between requests cannot be told from chance."
)
# Layer of every token's row, and its experts [N,K].
Rows = tuple[NDArray[np.int64], NDArray[np.int64]]


def recognises(file: Opened) -> bool:
    """Return whether a file, or the first one of a folder, is a trace or a dump."""
    start = first_file(file).head[: 1 << 16]
    text = start.decode("latin-1")
    if BEGIN.match(text):
        return CHARACTERS.fullmatch(text) is not None
    width = _width(start)
    if width is None:
        return False
    rows = np.frombuffer(start[: len(start) // width * width][: FIRST * width], _record(width))
    ids, weights = rows["chosen"]["id"], rows["chosen"]["weight"]
    ordered = np.sort(ids, axis=1)
    with np.errstate(invalid="ignore"):
        are_weights = bool((np.abs(weights) <= LARGEST_WEIGHT).all() and weights.any())
    is_set = bool((ordered[:, 1:] != ordered[:, :-1]).all())
    return len(rows) > 1 and bool((rows["n"] == rows["n"][0]).all()) and is_set and are_weights


def read(sources: Sequence[Opened], hints: Hints) -> RoutingTrace:
    """Read traces and dumps one after the other."""
    files = list_files(sources)
    if not files:
        raise ValueError(f"{sources[0].path}: folder must hold traces, got none")
    with naming(files[0].path):
        trace = TraceInParts(hints.experts_needed())
    layers: list[int] = []
    for file in files:
        path = file.path
        with naming(path):
            size_of(path)
            start = file.head[: 1 << 12]
            is_text = BEGIN.match(start.decode("latin-1"))
            blocks = [*(_lines(path) if is_text else _records(path, _width(start)))]
            layer, ids = (np.concatenate([block[at] for block in blocks]) for at in range(2))
            if int(ids.max(initial=0)) >= 1 << 16:
                raise ValueError(f"expert must be below 65536, got {ids.max()}")
            if int(layer.max(initial=0)) >= LAYER_LIMIT:
                raise ValueError(f"layer must be below {LAYER_LIMIT}, got {layer.max()}")
            numbers, table = _passes(layer, ids)
            hints.check_have_experts(numbers)
            if numbers != (layers or numbers):
                raise ValueError(f"must have layers {layers[:4]}... like the others")
            layers = numbers
            trace.add(table)
    with naming(files[0].path):
        return RoutingTrace(**vars(trace.contents()))


def _lines(path: Path) -> Iterator[Rows]:
    """Read the lines of a trace, block by block."""
    number, top_k = 1, 0
    with path.open("rb") as file:
        while lines := [line.decode("latin-1") for line in file.readlines(BLOCK)]:
            if not lines[-1].endswith("\n"):  # it was cut off while it was written
                lines.pop()
            text = WEIGHT.sub("", "".join(lines))
            sizes = np.array([line.count(",") + 1 for line in lines], dtype=np.int64)
            numbers = np.empty(0, dtype=np.int64)
            # Lines are checked one by one: a number missing in one may be too many in another.
            if all(map(PLAIN.fullmatch, text.splitlines(keepends=True))):
                numbers = np.fromstring(text.replace(",", " "), dtype=np.int64, sep=" ")
            if len(numbers) != sizes.sum() + 2 * len(lines):
                at, line = next(
                    (at, line) for at, line in enumerate(lines, number) if not GOOD.fullmatch(line)
                )
                rule = "must be <layer> <t> <id,id,...>"
                raise ValueError(f"line {at}: {rule}, got {line.strip()!r:.60}")
            begins = np.cumsum(2 + sizes) - sizes - 2
            layer, tokens = numbers[begins], numbers[begins + 1]
            top_k = top_k or (int(sizes[0] // max(tokens[0], 1)) if len(sizes) else 0)
            wrong = (sizes != tokens * top_k) | (tokens < 1)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise ValueError(
                    f"line {number + at}: must have {top_k} ids for each of its {tokens[at]} "
                    f"tokens, got {sizes[at]}"
                )
            is_id = np.ones(len(numbers), dtype=bool)
            is_id[begins] = is_id[begins + 1] = False
            number += len(lines)
            if top_k:
                layer = np.repeat(layer, tokens)
                ids = numbers[is_id].reshape(-1, top_k)
                yield layer[layer != DRAFT_HEAD], ids[layer != DRAFT_HEAD]


def _record(width: int) -> np.dtype[Any]:
    """Return the NumPy type of a record of so many bytes."""
    chosen = np.dtype([("id", "<u2"), ("weight", "<f4")])
    return np.dtype([("layer", "u1"), ("n", "u1"), ("chosen", chosen, ((width - 2) // 6,))])


def _width(start: bytes) -> int | None:
    """Return the bytes of a record, by the first one; None if that cannot be a record."""
    top_k = start[1] if len(start) > 1 else 0
    width = 2 + 6 * top_k
    return width if 0 < top_k <= MOST_CHOSEN and len(start) >= width else None


def _records(path: Path, width: int | None) -> Iterator[Rows]:
    """Read the records of a dump, of so many bytes; one that is cut off at the end is left out."""
    if width is None:
        raise ValueError("must be lines <layer> <t> <id,id,...>, or a dump of MEMRA_MOE_SEL_DUMP")
    number = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK // width * width):
            rows = np.frombuffer(block[: len(block) // width * width], _record(width))
            wrong = rows["n"] != (width - 2) // 6
            if wrong.any():
                at = int(np.argmax(wrong))
                raise ValueError(
                    f"record {number + at}: must choose {(width - 2) // 6} experts like the first, "
                    f"got {rows['n'][at]}"
                )
            number += len(rows)
            yield rows["layer"].astype(np.int64), rows["chosen"]["id"].astype(np.int64)


def _passes(layer: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[list[int], NDArray[Any]]:
    """Return the layers, and the tokens of all complete forward passes [T,L,K]."""
    if not len(layer):
        raise ValueError("must have at least one token, got none")
    numbers, place = np.unique(layer, return_inverse=True)
    passes = np.cumsum(np.concatenate([[False], layer[1:] < layer[:-1]]))
    count = int(passes[-1]) + 1
    if count * len(numbers) > max(1 << 22, 8 * len(layer)):
        raise ValueError("layers must come in rising order in every forward pass")
    sizes = np.bincount(passes * len(numbers) + place, minlength=count * len(numbers))
    sizes = sizes.reshape(count, len(numbers))
    uneven = (sizes != sizes[:, :1]).any(axis=1)
    if uneven[:-1].any() or uneven.all():
        at = int(np.argmax(uneven))
        other = int(np.argmax(sizes[at] != sizes[at, 0]))
        raise ValueError(
            f"forward pass {at} must have as many tokens in layer {numbers[other]} as in layer "
            f"{numbers[0]}, got {sizes[at, other]} and {sizes[at, 0]}"
        )
    keeps = ~uneven[passes]
    order = np.argsort(place[keeps], kind="stable")
    table = ids[keeps][order].reshape(len(numbers), -1, ids.shape[1])
    return numbers.tolist(), table.swapaxes(0, 1)


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write the map; layers are numbered with the dense ones that ``hints`` names."""
    numbers = hints.moe_numbers(placement.layers)
    rows = zip(numbers, placement.device_of.tolist(), strict=True)
    content = {
        "format": FORMAT,
        "strategy": "moetuner",
        "ranks": placement.devices,
        "entry_rank": 0,
        "expert_count": placement.num_experts,
        "traces": [],
        "params": {},
        "layers": [{"layer": number, "assignment": row, "stats": {}} for number, row in rows],
    }
    with replacing(path) as temporary:
        # As memra's own tool writes it.
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def recognises_map(file: Opened) -> bool:
    """Return whether a file is such a map."""
    start = file.head[:4096]
    return looks_like_json(start) and f'"{FORMAT}"'.encode() in start


def read_map(file: Opened, _: Hints) -> Layout:
    """Read the map: experts of a rank in rising order, -1 where a rank has fewer than others."""
    with naming(file.path):
        fields = parse_json(file.read_whole())
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        experts = experts_in(fields.get("expert_count"))
        ranks = whole_number("ranks", fields.get("ranks"), highest=min(experts, DEVICE_LIMIT))
        entry, layers = fields.get("entry_rank"), fields.get("layers")
        remarks = []
        if entry != 0:
            remarks.append(f"entry_rank must be 0 for its loaders, got {shown(entry)}")
        if not isinstance(layers, list) or not layers:
            raise ValueError(f"layers must be a list of layers, got {shown(layers)}")
        rows = dict(_row(layer, ranks, experts) for layer in layers)
        if len(rows) < len(layers):
            raise ValueError("layers must be there once each")
        numbers = tuple(sorted(rows))
        sizes = [np.bincount(rows[number], minlength=ranks) for number in numbers]
        width = max(int(size.max()) for size in sizes)
        if ranks * width > 64 * experts:
            raise ValueError(
                f"ranks must share {experts} experts about evenly, got one with {width}"
            )
        slots = np.full((len(rows), ranks, width), EMPTY)
        for at, rank in np.ndindex(len(rows), ranks):
            on_rank = np.flatnonzero(np.equal(rows[numbers[at]], rank))
            slots[at, rank, : len(on_rank)] = on_rank
        return Layout.from_rows(
            slots.reshape(len(rows), -1),
            devices=ranks,
            num_experts=experts,
            layers=numbers,
            remarks=tuple(remarks),
        )


def _row(layer: Any, ranks: int, experts: int) -> tuple[int, list[int]]:
    """Return the number of a layer, and the rank of each of its experts."""
    fields = layer if isinstance(layer, dict) else {}
    number = whole_number("layer", fields.get("layer"), lowest=0, highest=LAYER_LIMIT - 1)
    row = fields.get("assignment")
    if not isinstance(row, list) or len(row) != experts:
        got = len(row) if isinstance(row, list) else shown(row)
        raise ValueError(f"layer {number}: assignment must have {experts} ranks, got {got}")
    for rank in row:
        if type(rank) is not int or not 0 <= rank < ranks:
            raise ValueError(f"layer {number}: ranks must be below {ranks}, got {shown(rank)}")
    return number, row
