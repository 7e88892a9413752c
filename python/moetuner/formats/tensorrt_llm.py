"""TensorRT-LLM: the counts that it dumps, and the YAML that its load balancer reads.

With ``EXPERT_STATISTIC_ITER_RANGE`` set, every rank writes ``rank{r}.safetensors``: counts [E] of
its own tokens, named ``{iteration}_{layer}``, and rank 0 ``meta_info.json``
(``tensorrt_llm/_torch/expert_statistic.py``). Where its balancer is on these are counts of slots,
and ``num_experts`` in ``meta_info.json`` is the number of slots: then the placement that ran has to
be known. ``rank{r}_raw.safetensors`` has the choices themselves [T,K]
(``examples/wide_ep/ep_load_balancer``). Layers count dense ones too, which have no entries.

``moe_config.load_balancer`` is a YAML file of exactly three keys: ``num_slots``,
``initial_global_assignments`` (layer: experts slot by slot, rank by rank) and
``layer_updates_per_iter``, 0 for a placement that stays.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import LAYER_LIMIT, experts_in, shown
from moetuner.files import kind_of, naming, read_whole, replacing, safetensors
from moetuner.files.text import parse_json
from moetuner.formats.counts import added, by_expert, counts_in
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout, check_full
from moetuner.formats.microbatches import Microbatches, trace_of_microbatches
from moetuner.formats.records import head
from moetuner.formats.sources import by_rank, rank_of
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

META = "meta_info.json"
COUNTS, RAW = "rank*[0-9].safetensors", "rank*_raw.safetensors"
ENTRY = re.compile(r"(\d{1,12})_(\d{1,5})", re.ASCII)


def recognises(path: Path) -> bool:
    """Whether a folder or file is a dump of expert statistics."""
    if path.is_dir():
        return any(recognises(file) for pattern in (COUNTS, RAW) for file in path.glob(pattern))
    if head(path, 9)[8:] != b"{" or kind_of(path) != "safetensors":
        return False
    names = safetensors.read_header(path).entries
    return bool(names) and all(ENTRY.fullmatch(name) for name in names)


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read the dumps of all ranks: a trace from raw choices, else counts in windows of iterations.

    Raises
    ------
    ValueError
        If a rank's file is missing or damaged, or they count slots of a placement not known.
    """
    raw = any(_is_raw(path) or (path.is_dir() and any(path.glob(RAW))) for path in paths)
    files = by_rank(paths, RAW if raw else COUNTS)
    if not files:
        raise ValueError("must have a file, got none")
    if any(_is_raw(file) != raw for file in files):
        raise ValueError(f"{files[0].parent}: must be raw dumps or counts, got both")
    experts, top_k = _about(files)
    dumps = [_Dump.of(file) for file in files]
    first = dumps[0]
    running = _running(first, experts, hints)
    if raw:
        return _trace(dumps, experts, top_k, running)
    with naming(first.path):
        load = _load(dumps, experts)
        if running is not None:
            load = by_expert(load, running, hints.num_experts)
        return RoutingStatistics.from_load(load)


def _is_raw(path: Path) -> bool:
    return path.name.endswith("_raw.safetensors")


def _about(files: Sequence[Path]) -> tuple[int, int]:
    """Return experts (or slots) and top-k, as ``meta_info.json`` beside the dumps says."""
    path = files[0].parent / META
    if not path.exists():
        raise ValueError(f"{path}: must be beside {files[0].name}: it says how many experts count")
    with naming(path):
        about = parse_json(read_whole(path, 1 << 16))
        if not isinstance(about, dict):
            raise ValueError(f"must be a JSON object, got {type(about).__name__}")
        return (
            experts_in(about.get("num_experts")),
            experts_in(about.get("num_experts_per_token"), "num_experts_per_token"),
        )


@dataclass(frozen=True)
class _Dump:
    """A file of a rank: its tensors by iteration and layer."""

    path: Path
    header: safetensors.Header
    entries: dict[tuple[int, int], str]

    @classmethod
    def of(cls, path: Path) -> _Dump:
        header = safetensors.read_header(path)
        entries = {}
        for name in header.entries:
            match = ENTRY.fullmatch(name)
            if match is None:
                raise ValueError(
                    f"{path}: tensors must be named iteration_layer, got {shown(name)}"
                )
            entries[int(match[1]), int(match[2])] = name
        if not entries:
            raise ValueError(f"{path}: must hold counts of at least one iteration, got none")
        return cls(path, header, entries)

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers, in rising order."""
        return sorted({layer for _, layer in self.entries})

    def check_like(self, first: _Dump) -> None:
        """Check that it has the iterations and layers of the first rank's."""
        other = set(self.entries) ^ set(first.entries)
        if other:
            iteration, layer = min(other)
            raise ValueError(
                f"{self.path}: must have the iterations and layers of {first.path.name}, differs "
                f"in iteration {iteration}, layer {layer}"
            )

    def read(self, name: str, of: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """Read integers [shape], where None is any size; ``of`` says of what."""
        with naming(self.path):
            array = safetensors.read(self.path, self.header.tensor(name))
            fits = array.ndim == len(shape) and shape[-1] == array.shape[-1]
            if not fits or array.dtype.kind not in "iu":
                rule = ", ".join("tokens" if size is None else str(size) for size in shape)
                raise ValueError(
                    f"{name} must be {of} [{rule}] as {META} says, "
                    f"got {array.dtype} {list(array.shape)}"
                )
        return array


def _running(dump: _Dump, counted: int, hints: Hints) -> NDArray[np.int64] | None:
    """Return the expert in every slot [L,P] that ran; None where experts were counted."""
    with naming(dump.path):
        hints.check_have_experts(dump.layers)
    meta = dump.path.parent / META
    if hints.running is None:
        if hints.num_experts not in (None, counted):
            raise ValueError(
                f"{meta}: num_experts is {counted}, not {hints.num_experts}: the load "
                "balancer was on, so slots are counted, and the placement that ran is needed"
            )
        return None
    layers, slots = hints.running.shape
    if slots != counted:
        raise ValueError(f"{meta}: counts {counted} slots, but the placement that ran has {slots}")
    if layers != len(dump.layers):
        raise ValueError(
            f"{dump.path}: has {len(dump.layers)} layers, but the placement that ran has {layers}"
        )
    if (hints.running < 0).any():
        raise ValueError("the placement that ran must have no empty slots")
    return hints.running


def _load(dumps: Sequence[_Dump], experts: int) -> NDArray[np.int64]:
    """Add the counts of all ranks: [iterations, L, E]."""
    entries, layers = sorted(dumps[0].entries), dumps[0].layers
    iterations = sorted({iteration for iteration, _ in entries})
    for key in product(iterations, layers):
        if key not in dumps[0].entries:
            raise ValueError(f"iteration {key[0]} must have layer {key[1]} like the others")
    total = np.zeros((len(entries), experts), dtype=np.int64)
    for dump in dumps:
        dump.check_like(dumps[0])
        for row, key in enumerate(entries):
            name = dump.entries[key]
            counts = dump.read(name, "counts", (experts,))
            with naming(dump.path):
                total[row] = added(total[row], counts_in(name, counts))
    return total.reshape(len(iterations), len(layers), experts)


def _trace(
    dumps: Sequence[_Dump], experts: int, top_k: int, running: NDArray[np.int64] | None
) -> RoutingTrace:
    """Join the raw choices of all ranks; an iteration of a rank is a sequence."""
    batches: Microbatches = {}
    for number, dump in enumerate(dumps):
        dump.check_like(dumps[0])
        rank = rank_of(dump.path)
        for (iteration, layer), name in dump.entries.items():
            ids = dump.read(name, "ids", (None, top_k))
            with naming(dump.path):
                if ids.size and (ids.min() < 0 or ids.max() >= experts):
                    raise ValueError(
                        f"{name} must be ids from 0 to {experts - 1}, "
                        f"got {ids.min()} to {ids.max()}"
                    )
            ids = ids if running is None else running[dump.layers.index(layer)][ids]
            key = (iteration, 0, number if rank is None else rank)
            batches.setdefault(key, {})[layer] = ids.astype(np.uint16)
    experts = experts if running is None else int(running.max()) + 1
    return trace_of_microbatches(dumps[0].path.parent, batches, experts)


KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write the YAML; layers are numbered with the dense ones that ``hints`` names."""
    check_full(placement, "tensorrt-llm")
    rows = placement.slots.reshape(placement.layers, -1)
    numbers = layer_numbers(placement.layers, hints)
    lines = [f"num_slots: {rows.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {number}: {row.tolist()}" for number, row in zip(numbers, rows, strict=True)]
    lines.append("layer_updates_per_iter: 0")
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def layer_numbers(layers: int, hints: Hints) -> list[int]:
    """Return the numbers of MoE layers among all hidden ones.

    Raises
    ------
    ValueError
        If the model has another number of layers with experts.
    """
    dense, hidden = hints.dense_layers or (), hints.hidden_layers
    if hidden is None:
        return list(islice((layer for layer in count() if layer not in dense), layers))
    numbers = [layer for layer in range(hidden) if layer not in dense]
    if len(numbers) != layers:
        raise ValueError(
            f"placement must have {len(numbers)} layers, those with experts of {hidden} hidden "
            f"ones, got {layers}: dense_layers must name the others"
        )
    return numbers


def recognises_map(path: Path) -> bool:
    """Whether a file is such a YAML."""
    start = head(path, 4096)
    return any(key.encode() in start for key in KEYS[:2])


def read_map(path: Path, hints: Hints) -> Layout:
    """Read the YAML, as this library or PyYAML writes it, or as JSON.

    Raises
    ------
    ValueError
        If keys are missing or unknown, as the engine refuses them, or a list is no list of experts.
    """
    with naming(path):
        text = read_whole(path).decode("utf-8")
        fields = parse_json(text) if text.lstrip()[:1] == "{" else _yaml(text)
        if not isinstance(fields, dict):
            raise ValueError("must be a mapping")
        unknown = sorted(map(str, fields.keys() - set(KEYS)))
        if unknown:
            raise ValueError(f"keys must be {', '.join(KEYS)}, got {shown(unknown[0])}")
        for key in KEYS[:2]:
            if key not in fields:
                raise ValueError(f"must have {key!r}")
        slots, rows = fields["num_slots"], fields["initial_global_assignments"]
        if type(slots) is not int or not 1 <= slots <= 1 << 16:
            raise ValueError(f"num_slots must be an integer from 1 to 65536, got {shown(slots)}")
        if not isinstance(rows, dict) or not rows:
            raise ValueError("initial_global_assignments must be lists of experts by layer")
        numbers = dict(sorted((_layer(key), row) for key, row in rows.items()))
        for number, row in numbers.items():
            if not isinstance(row, list) or len(row) != slots:
                size = len(row) if isinstance(row, list) else "none"
                raise ValueError(f"layer {number} must have num_slots {slots} experts, got {size}")
        return Layout.of(list(numbers.values()), layers=tuple(numbers))


def _layer(key: object) -> int:
    if isinstance(key, str) and re.fullmatch(r"\d{1,5}", key, re.ASCII):
        key = int(key)
    if type(key) is not int or not 0 <= key < LAYER_LIMIT:
        raise ValueError(f"layers must be numbers, got {shown(key)}")
    return key


# The little YAML of such a file: keys with a number or with layers, which have lists of experts.
COMMENT, BEGIN = re.compile(r"(^|\s)#.*"), re.compile(r"^---$", re.MULTILINE)
BLOCK = re.compile(r"(?:\n[ ]*(?:-[ ]+\d{1,6}[ ]*|(?=\n)))+", re.ASCII)
LINE = re.compile(
    r"""(?P<key>[A-Za-z_]\w*):(?:[ ]*(?P<number>\d{1,6}|\{\}))?[ ]*(?:\n|$)"""
    r"""|[ ]+['"]?(?P<layer>\d{1,5})['"]?:\s*(?P<list>\[[\d,\s]*\])[ ]*(?:\n|$)|\s*(?:\n|$)""",
    re.ASCII,
)


def _yaml(text: str) -> dict[str, Any]:
    """Read numbers, and lists of numbers by number, of keys; lists may be of either style.

    Raises
    ------
    ValueError
        Naming the line that is anything else.
    """
    text = BEGIN.sub("", COMMENT.sub("", text.replace("\r\n", "\n")))
    text = BLOCK.sub(_in_brackets, text)
    fields: dict[str, Any] = {}
    rows: dict[int, list[int]] | None = None
    at = 0
    while at < len(text):
        line = LINE.match(text, at)
        try:
            if line is None or line["key"] in fields or (line["layer"] and rows is None):
                raise ValueError(f"must be {KEYS[0]}: N, {KEYS[1]}: or a layer's list of experts")
            if line["key"]:
                rows = {} if line["number"] in (None, "{}") else None
                fields[line["key"]] = int(line["number"]) if rows is None else rows
            elif line["layer"] and rows is not None:
                if int(line["layer"]) in rows:
                    raise ValueError(f"layer {line['layer']} must be there once")
                rows[int(line["layer"])] = parse_json(line["list"])
        except ValueError as error:
            number, got = text.count("\n", 0, at) + 1, text[at:].partition("\n")[0].strip()
            raise ValueError(f"line {number}: {error}, got {shown(got)}") from None
        at = line.end()
    return fields


def _in_brackets(lines: re.Match[str]) -> str:
    """Turn a list of lines into one in brackets, over as many lines."""
    numbers = lines[0].replace("-", ",").replace(",", "", 1)
    return f"[{numbers}]" if "-" in lines[0] else lines[0]
