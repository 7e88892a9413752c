"""Read the counts that TensorRT-LLM dumps; read and write the YAML of its load balancer.

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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import LAYER_LIMIT, experts_in, shown, whole_number
from moetuner.files import naming, read_whole
from moetuner.files.opened import Opened
from moetuner.files.text import parse_json
from moetuner.formats.arrays import Dump, list_names, read_by_step, read_ranks
from moetuner.formats.counts import sum_by_expert, sum_ranks
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout
from moetuner.formats.microbatches import Microbatches
from moetuner.formats.sources import find_rank, list_by_rank
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics
from moetuner.trace import RoutingTrace

META = "meta_info.json"
COUNTS, RAW = "rank*[0-9].safetensors", "rank*_raw.safetensors"
ENTRY = re.compile(r"(?P<step>\d{1,12})_(?P<layer>\d{1,5})", re.ASCII)


def recognises(file: Opened) -> bool:
    """Return whether a folder or file is a dump of expert statistics."""
    path = file.path
    if path.is_dir():
        dumps = (dump for pattern in (COUNTS, RAW) for dump in path.glob(pattern))
        return any(recognises(file.members.setdefault(dump, Opened(dump))) for dump in dumps)
    if file.head[8:9] != b"{":
        return False
    names = list_names(file)
    return bool(names) and all(map(ENTRY.fullmatch, names))


def read(sources: Sequence[Opened], hints: Hints) -> Traffic:
    """Read the dumps of all ranks: a trace from raw choices, else counts by iteration."""
    raw = any(_is_raw(source.path) or any(source.path.glob(RAW)) for source in sources)
    files = list_by_rank(sources, RAW if raw else COUNTS)
    first = files[0].path
    if any(_is_raw(file.path) != raw for file in files):
        raise ValueError(f"{first.parent}: must be raw dumps or counts, got both")
    counted, top_k = _read_meta(first)
    dumps = read_ranks(files, lambda file: _read_dump(file, raw, top_k if raw else counted))
    keys = dumps[first].keys()
    layers = sorted({layer for _, layer in keys})
    with naming(first):
        hints.check_have_experts(layers)
    running = _check_running(first, len(layers), counted, hints)
    if raw:
        return _trace(dumps, layers, counted, running)
    shape = (len(keys) // len(layers), len(layers), counted)
    load = sum_ranks(dumps, Hints(), lambda dump: np.stack([*dump.values()]).reshape(shape))
    with naming(first):
        if running is not None:
            load = sum_by_expert(load, running, hints.num_experts)
        return RoutingStatistics.from_load(load, top_k=top_k)


def _is_raw(path: Path) -> bool:
    return path.name.endswith("_raw.safetensors")


def _read_meta(file: Path) -> tuple[int, int]:
    """Read the number of experts (or slots) and top-k from ``meta_info.json`` beside a dump."""
    path = file.parent / META
    if not path.exists():
        raise ValueError(f"{path}: must be beside {file.name}: it says how many experts count")
    with naming(path):
        config = parse_json(read_whole(path, 1 << 16))
        names = ("num_experts", "num_experts_per_token")
        experts, top_k = (experts_in(config.get(name), name) for name in names)
        return experts, whole_number(names[1], top_k, highest=experts)


def _read_dump(file: Opened, raw: bool, width: int) -> Dump:
    """Read counts [E], or ids [tokens, top-k], by iteration and layer."""
    dump = read_by_step(file, ENTRY, "iteration_layer")
    for (iteration, layer), array in dump.items():
        is_right = array.ndim == 1 + raw and array.shape[-1] == width
        if not is_right or array.dtype.kind not in "iu":
            what = f"ids [tokens, {width}]" if raw else f"counts [{width}]"
            rule = f"{iteration}_{layer} must be {what} as {META} says"
            raise ValueError(f"{rule}, got {shown(array)}")
    return dump


def _check_running(file: Path, layers: int, counted: int, hints: Hints) -> NDArray[np.int64] | None:
    """Return the running expert in every slot [L,P]; None if the dump counts experts."""
    running = hints.running
    if running is None:
        if hints.num_experts not in (None, counted):
            raise ValueError(
                f"{file.parent / META}: num_experts is {counted}, not {hints.num_experts}: the "
                "load balancer was on, so slots are counted, and the placement that ran is needed"
            )
    elif running.shape != (layers, counted):
        sizes = "x".join(map(str, running.shape))
        raise ValueError(
            f"{file}: counts {layers}x{counted} layers and slots, but the placement that ran "
            f"has {sizes}"
        )
    elif (running < 0).any():
        raise ValueError("the placement that ran must have no empty slots")
    return running


def _trace(
    dumps: dict[Path, Dump],
    layers: list[int],
    counted: int,
    running: NDArray[np.int64] | None,
) -> RoutingTrace:
    """Join the raw choices of all ranks; an iteration of a rank is a sequence."""
    batches = Microbatches(counted)
    for number, (file, dump) in enumerate(dumps.items()):
        rank = find_rank(file)
        with naming(file):
            for (iteration, layer), ids in dump.items():
                batches.add((iteration, 0, number if rank is None else rank), layer, ids)
    if running is not None:
        batches.experts = int(running.max()) + 1
        for slots in batches.layers.values():
            slots |= {layer: running[layers.index(layer)][ids] for layer, ids in slots.items()}
    return batches.trace(next(iter(dumps)).parent)


# Line of vLLM's proposed initial_mapping_path, with the same keys (PR 41141).
VLLM_RECORD = re.compile(r'^.*"eplb_initial_mapping".*$', re.MULTILINE)
KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write the YAML; layers are numbered with the dense ones that ``hints`` names."""
    rows = placement.slots.reshape(placement.layers, -1)
    numbers = hints.moe_numbers(placement.layers)
    lines = [f"num_slots: {rows.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {number}: {row.tolist()}" for number, row in zip(numbers, rows, strict=True)]
    lines.append("layer_updates_per_iter: 0")
    path.write_text("\n".join(lines) + "\n")


def recognises_map(file: Opened) -> bool:
    """Return whether a file is such a YAML."""
    start = file.head[:4096]
    return any(key.encode() in start for key in KEYS[:2])


def read_map(file: Opened, hints: Hints) -> Layout:
    """Read the map of YAML, as moetuner or PyYAML writes it, or of JSON."""
    text = file.read_whole().decode("utf-8")
    proposed = VLLM_RECORD.search(text)
    if proposed is not None:
        fields = {key: value for key, value in parse_json(proposed[0]).items() if key in KEYS}
    else:
        fields = parse_json(text) if text.lstrip()[:1] == "{" else _yaml(text)
    unknown = sorted(fields.keys() - set(KEYS))
    if unknown:
        raise ValueError(f"keys must be {', '.join(KEYS)}, got {shown(unknown[0])}")
    for key in KEYS[:2]:
        if key not in fields:
            raise ValueError(f"must have {key!r}")
    slots, rows = (fields[key] for key in KEYS[:2])
    whole_number("num_slots", slots, highest=1 << 16)
    if not isinstance(rows, dict) or not rows:
        raise ValueError("initial_global_assignments must be lists of experts by layer")
    numbers = dict(sorted((_layer(key), row) for key, row in rows.items()))
    for number, row in numbers.items():
        if not isinstance(row, list) or len(row) != slots:
            size = len(row) if isinstance(row, list) else "none"
            raise ValueError(f"layer {number} must have num_slots {slots} experts, got {size}")
    return Layout.from_rows(list(numbers.values()), layers=tuple(numbers))


def _layer(key: object) -> int:
    if isinstance(key, str) and re.fullmatch(r"\d{1,5}", key, re.ASCII):
        key = int(key)
    if type(key) is not int or not 0 <= key < LAYER_LIMIT:
        raise ValueError(f"layers must be numbers, got {shown(key)}")
    return key


# Parts of such a YAML file besides keys: comments, lists with one item per line, and the starts of
# layers.
COMMENT = re.compile(r"(?:^|[ \t]+)#.*|^---$|[ \t\r]+$", re.MULTILINE)
ITEMS = re.compile(r"(?:^[ ]*-[ ]+\d+(?:\n+|\Z))+", re.ASCII | re.MULTILINE)
LAYER = re.compile(r"\n[ ]+['\"]?(\d{1,5})['\"]?:", re.ASCII)


def _yaml(text: str) -> dict[str, Any]:
    """Read a YAML of numbers, and of lists of numbers by layer, by turning it into JSON."""
    text = COMMENT.sub("", text)
    text = ITEMS.sub(lambda match: f" [{', '.join(re.findall(r'[0-9]+', match[0]))}]\n", text)
    members = []
    for member in re.split(r"^(?=\S)", text.rstrip(), flags=re.MULTILINE):
        key, colon, value = member.rstrip().partition(":")
        value, *layers = LAYER.split(value)
        if layers and not value.strip():
            rows = zip(layers[::2], layers[1::2], strict=True)
            value = "{" + ", ".join(f'"{layer}": {row}' for layer, row in rows) + "}"
        members += [f'"{key}"{colon}{value}'] if member.strip() else []
    try:
        return parse_json("{" + ", ".join(members) + "}")
    except ValueError as error:
        rule = f"must be {KEYS[0]}: N and {KEYS[1]}: a list of experts for every layer"
        raise ValueError(f"{rule}: {error}") from None
