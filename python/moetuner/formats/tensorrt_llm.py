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
from collections.abc import Iterable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import LAYER_LIMIT, experts_in, shown
from moetuner.files import kind_of, naming, read_whole, replacing, safetensors
from moetuner.files.text import parse_json
from moetuner.formats.hints import Hints, Traffic
from moetuner.formats.layout import Layout
from moetuner.formats.ranks import by_rank, rank_of
from moetuner.formats.records import head
from moetuner.formats.slots import added, by_expert, counts_in
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
    if any(_is_raw(file) != raw for file in files):
        raise ValueError(f"{files[0].parent}: must be raw dumps or counts, got both")
    experts, top_k = _about(files)
    translate = _translation(files[0], experts, hints)
    read_ranks = _traces if raw else _counts
    return read_ranks(files, experts, top_k, translate, hints)


def _is_raw(path: Path) -> bool:
    return path.name.endswith("_raw.safetensors")


def _about(files: Sequence[Path]) -> tuple[int, int]:
    """Experts (or slots) and top-k, as ``meta_info.json`` beside the dumps says."""
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


def _translation(path: Path, counted: int, hints: Hints) -> NDArray[np.int64] | None:
    """Expert in every slot [L,P] of the placement that ran; None where experts were counted."""
    running = hints.running
    if running is not None:
        if running.shape[1] != counted:
            raise ValueError(
                f"{path.parent / META}: counts {counted} slots, but the placement that ran has "
                f"{running.shape[1]}"
            )
        if (running < 0).any():
            raise ValueError("the placement that ran must have no empty slots")
        return running
    if hints.num_experts is not None and hints.num_experts != counted:
        raise ValueError(
            f"{path.parent / META}: num_experts is {counted}, not {hints.num_experts}: the load "
            "balancer was on, so slots are counted, and the placement that ran is needed"
        )
    return None


def _entries(path: Path) -> tuple[safetensors.Header, dict[tuple[int, int], str]]:
    """Header of a dump, and its tensors by iteration and layer."""
    header = safetensors.read_header(path)
    found = {}
    for name in header.entries:
        match = ENTRY.fullmatch(name)
        if match is None:
            raise ValueError(f"{path}: tensors must be named iteration_layer, got {shown(name)}")
        found[int(match[1]), int(match[2])] = name
    if not found:
        raise ValueError(f"{path}: must hold counts of at least one iteration, got none")
    return header, found


def _grid(path: Path, keys: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """List iterations and layers; each iteration must have each layer."""
    have = set(keys)
    iterations, layers = (sorted({key[at] for key in have}) for at in (0, 1))
    for iteration in iterations:
        for layer in layers:
            if (iteration, layer) not in have:
                raise ValueError(
                    f"{path}: iteration {iteration} must have layer {layer} like the others"
                )
    return iterations, layers


def _layers(
    path: Path, layers: list[int], translate: NDArray[np.int64] | None, hints: Hints
) -> None:
    """Check layers against what the user says of the model, and of the placement that ran."""
    wrong = sorted(set(layers) & set(hints.dense_layers or ()))
    if wrong:
        raise ValueError(
            f"{path}: layer {wrong[0]} must be dense as dense_layers says, got counts of experts"
        )
    if translate is not None and len(translate) != len(layers):
        raise ValueError(
            f"{path}: has {len(layers)} layers, but the placement that ran has {len(translate)}"
        )


def _counts(
    files: Sequence[Path],
    experts: int,
    _: int,
    translate: NDArray[np.int64] | None,
    hints: Hints,
) -> RoutingStatistics:
    total: NDArray[np.int64] | None = None
    first: set[tuple[int, int]] = set()
    for file in files:
        header, entries = _entries(file)
        if total is None:
            first = set(entries)
            iterations, layers = _grid(file, first)
            _layers(file, layers, translate, hints)
            total = np.zeros((len(iterations), len(layers), experts), dtype=np.int64)
            at = {key: n for n, key in enumerate(sorted(first))}
        if set(entries) != first:
            other = min(set(entries) ^ first)
            raise ValueError(
                f"{file}: must have the iterations and layers of {files[0].name}, differs in "
                f"iteration {other[0]}, layer {other[1]}"
            )
        flat = total.reshape(-1, experts)
        for key, name in entries.items():
            with naming(file):
                counts = safetensors.read(file, header.tensor(name))
                if counts.shape != (experts,) or counts.dtype.kind not in "iu":
                    raise ValueError(
                        f"{name} must be counts [{experts}] as {META} says, "
                        f"got {counts.dtype} {list(counts.shape)}"
                    )
                flat[at[key]] = added(flat[at[key]], counts_in(name, counts))
    if total is None:
        raise ValueError("must have a file, got none")
    with naming(files[0]):
        if translate is not None:
            total = by_expert(total, translate, hints.num_experts)
        return RoutingStatistics.from_load(total)


def _traces(
    files: Sequence[Path],
    experts: int,
    top_k: int,
    translate: NDArray[np.int64] | None,
    hints: Hints,
) -> RoutingTrace:
    """Join the raw choices of all ranks; an iteration of a rank is a sequence."""
    parts: list[NDArray[Any]] = []
    sizes: list[tuple[int, int, int]] = []
    dumps = [(file, *_entries(file)) for file in files]
    iterations, layers = _grid(files[0], dumps[0][2])
    _layers(files[0], layers, translate, hints)
    for iteration in iterations:
        for rank, (file, header, entries) in enumerate(dumps):
            rows: list[NDArray[np.uint16]] = []
            for number, layer in enumerate(layers):
                name = entries.get((iteration, layer))
                if name is None:
                    raise ValueError(f"{file}: iteration {iteration} must have layer {layer}")
                with naming(file):
                    ids = safetensors.read(file, header.tensor(name))
                    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] != top_k:
                        raise ValueError(
                            f"{name} must be ids [tokens, {top_k}] as {META} says, "
                            f"got {ids.dtype} {list(ids.shape)}"
                        )
                    if ids.size and (ids.min() < 0 or ids.max() >= experts):
                        raise ValueError(
                            f"{name} must be ids from 0 to {experts - 1}, "
                            f"got {ids.min()} to {ids.max()}"
                        )
                    if rows and len(rows[0]) != len(ids):
                        raise ValueError(
                            f"{name} must be ids of {len(rows[0])} tokens like layer {layers[0]}, "
                            f"got {len(ids)}"
                        )
                rows.append(
                    (ids if translate is None else translate[number][ids]).astype(np.uint16)
                )
            parts.append(np.stack(rows, axis=1))
            known = rank_of(file)
            sizes.append((len(rows[0]), len(sizes), rank if known is None else known))
    tokens, sequence, rank_numbers = (np.asarray(column) for column in zip(*sizes, strict=True))
    ranks = sorted(set(rank_numbers.tolist()))
    with naming(files[0]):
        return RoutingTrace.from_arrays(
            np.concatenate(parts),
            num_experts=experts if translate is None else int(translate.max()) + 1,
            sequence=np.repeat(sequence, tokens),
            group=np.repeat(np.searchsorted(ranks, rank_numbers), tokens),
            group_names=[f"rank {number}" for number in ranks],
        )


KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def write_map(placement: Placement, path: Path, hints: Hints) -> None:
    """Write the YAML; layers are numbered with the dense ones that ``hints`` names."""
    rows = placement.slots.reshape(placement.layers, -1)
    if (rows < 0).any():
        layer, slot = np.argwhere(rows < 0)[0]
        raise ValueError(
            f"layer {layer}: slot {slot} is empty, and TensorRT-LLM fills every slot: "
            '"moetuner solve --fill-slots" does'
        )
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
        found = parse_json(text) if text.lstrip()[:1] == "{" else _yaml(text)
        if not isinstance(found, dict):
            raise ValueError("must be a mapping")
        unknown = sorted(map(str, found.keys() - set(KEYS)))
        if unknown:
            raise ValueError(f"keys must be {', '.join(KEYS)}, got {shown(unknown[0])}")
        for key in KEYS[:2]:
            if key not in found:
                raise ValueError(f"must have {key!r}")
        slots, rows = found["num_slots"], found["initial_global_assignments"]
        if type(slots) is not int or not 1 <= slots <= 1 << 16:
            raise ValueError(f"num_slots must be an integer from 1 to 65536, got {shown(slots)}")
        if not isinstance(rows, dict) or not rows:
            raise ValueError("initial_global_assignments must be lists of experts by layer")
        numbers = {_layer(key): row for key, row in rows.items()}
        for number, row in sorted(numbers.items()):
            if not isinstance(row, list) or len(row) != slots:
                size = len(row) if isinstance(row, list) else "none"
                raise ValueError(f"layer {number} must have num_slots {slots} experts, got {size}")
        order = sorted(numbers)
        return Layout.of([numbers[number] for number in order], layers=tuple(order))


def _layer(key: object) -> int:
    if isinstance(key, str) and re.fullmatch(r"\d{1,5}", key, re.ASCII):
        key = int(key)
    if type(key) is not int or not 0 <= key < LAYER_LIMIT:
        raise ValueError(f"layers must be numbers, got {shown(key)}")
    return key


TOP = re.compile(r"([A-Za-z_]\w*):\s*(.*)", re.ASCII)
ROW = re.compile(r"""\s+['"]?(\d{1,5})['"]?:\s*(.*)""", re.ASCII)
ITEM = re.compile(r"\s*-\s+(\d{1,6})", re.ASCII)


def _yaml(text: str) -> dict[str, Any]:
    """Read the little YAML that such a file needs: numbers, and lists of numbers by number."""
    found: dict[str, Any] = {}
    rows: dict[int, list[int]] | None = None
    row: list[int] | None = None
    open_ = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if open_:
            line = f"{open_} {line.strip()}"
            open_ = ""
        if not line.strip() or line == "---":
            continue
        if row is not None and (item := ITEM.fullmatch(line)):
            row.append(int(item[1]))
            continue
        if "[" in line and "]" not in line:
            open_ = line  # PyYAML folds long lists
            continue
        if rows is not None and (match := ROW.fullmatch(line)):
            if int(match[1]) in rows:
                raise ValueError(f"line {number}: layer {match[1]} must be there once")
            row = rows[int(match[1])] = []
            if match[2]:
                row += _numbers(match[2], number)
            continue
        match = TOP.fullmatch(line)
        if match is None or match[1] in found:
            raise ValueError(
                f"line {number}: must be one of {', '.join(KEYS)}, a layer or an expert, "
                f"got {shown(line.strip())}"
            )
        rows = row = None
        if match[2] and match[2] != "{}":
            if not re.fullmatch(r"\d{1,6}", match[2], re.ASCII):
                raise ValueError(
                    f"line {number}: {match[1]} must be a number, got {shown(match[2])}"
                )
            found[match[1]] = int(match[2])
        else:
            found[match[1]] = rows = {}
    if open_:
        raise ValueError("a list has no end: the file is cut off")
    return found


def _numbers(text: str, line: int) -> list[int]:
    inner = re.fullmatch(r"\[([\d,\s]*)\]", text, re.ASCII)
    parts = inner[1].split(",") if inner else []
    parts = [part.strip() for part in parts]
    if inner is None or not all(re.fullmatch(r"\d{1,6}", part, re.ASCII) for part in parts):
        raise ValueError(f"line {line}: must be a list of experts [0, 1, ...], got {shown(text)}")
    return [int(part) for part in parts]
