"""vLLM: routed experts and windows of load that it records, maps of experts that it is to load.

Routed experts (``--enable-return-routed-experts``) are arrays [tokens, hidden layers, top-k] of
logical ids, with rows of zeros for layers without experts; the order of a token's experts says
nothing. Over HTTP they are ``.npy`` in base64, in every choice of a response. Maps are of MoE
layers only. No release loads one by itself: the files written here are those of proposals (pull
requests 41141, 49572 and 53022 of vllm-project/vllm, open in 2026-09), and moetuner's own, which
its plugin loads.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown, whole_number
from moetuner.files import naming, npz, read_whole, replacing
from moetuner.files.safetensors import TensorInFile
from moetuner.files.text import parse_json
from moetuner.formats.hints import Hints, Traffic, files_in
from moetuner.formats.layout import Layout
from moetuner.formats.pickled import is_pickled
from moetuner.formats.pieces import ArrayPiece, Base64Piece, Piece, decoded, trace_of
from moetuner.formats.records import Record, head, looks_like_json, records
from moetuner.formats.slots import by_expert, counts_in
from moetuner.placement import Placement
from moetuner.statistics import RoutingStatistics

STATS, INITIAL = "eplb_load_stats", "eplb_initial_mapping"
ON = "start vLLM with --enable-return-routed-experts"
# Names of arrays in an archive of sequences: np.savez gives the first ones.
SEQUENCE = re.compile(r"arr_\d+|\d+|.*routed_experts.*")
# Base64 letters that surely hold the header of an array.
HEADER = 4096


def recognises(path: Path) -> bool:
    """Whether a file holds routed experts: responses, or arrays that are no trace of moetuner."""
    if path.is_dir():
        files = sorted(path.iterdir())[:1]
        return bool(files) and files[0].is_file() and recognises(files[0])
    start = head(path)
    if looks_like_json(start):
        # Answers without experts are ours too: reading them says which option is missing.
        answers = b'"routed_experts"' in start or b'"finish_reason"' in start
        ours = answers and b'"choices"' in start
        return ours and b'"sglext"' not in start and b'"meta_info"' not in start
    if start.startswith(npz.MAGIC):
        return _has_dense_rows(path)
    if start.startswith(b"PK\x03\x04"):
        if is_pickled(path):
            return False
        with naming(path):
            names = npz.names_in_npz(path)
        return bool(names) and all(map(SEQUENCE.fullmatch, names)) and _are_sequences(path, names)
    return False


def read(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read routed experts: every response or array is a sequence.

    Raises
    ------
    ValueError
        Naming file and response of what is wrong.
    """
    pieces: list[Piece] = []
    for path in files_in(paths):
        with naming(path):
            pieces += _pieces(path)
    return trace_of(pieces, hints, paths)


def _pieces(path: Path) -> Iterator[Piece]:
    start = head(path, 64)
    if start.startswith(npz.MAGIC):
        yield _npy_piece(path)
    elif start.startswith(b"PK\x03\x04"):
        names = npz.names_in_npz(path)
        arrays = npz.read_npz(path, tuple(names))
        for name in sorted(names, key=lambda name: (len(name), name)):
            yield ArrayPiece(path, _ids(arrays[name], name))
    else:
        found = False
        for record in records(path):
            for piece in _of_response(path, record):
                found = True
                yield piece
        if not found:
            raise ValueError(f"holds no routed experts: {ON}")


def _of_response(path: Path, record: Record) -> Iterator[Piece]:
    """Find the arrays of a response."""
    choices = record.fields.get("choices")
    if not isinstance(choices, list):
        raise ValueError(f"{record.where}: must be a response with 'choices'")
    for number, choice in enumerate(choices):
        text = choice.get("routed_experts") if isinstance(choice, dict) else None
        if text is None:
            continue
        where = f"{record.where}, choice {number}"
        if not isinstance(text, str):
            raise ValueError(f"{where}: routed_experts must be base64, got {shown(text)}")
        stored, fortran = _header(text, where)
        place = record.find(text)
        if place is None or fortran:
            data = decoded(text.encode("latin-1"), where)
            flat = np.frombuffer(data, dtype=stored.dtype, offset=stored.offset)
            yield ArrayPiece(path, flat.reshape(stored.shape, order="F" if fortran else "C"))
        else:
            yield Base64Piece(path, place, stored.shape, stored.dtype, stored.offset, where)


def _header(text: str, where: str) -> tuple[TensorInFile, bool]:
    """Read the header of an array in base64, and check that the text is as long as it says."""
    if len(text) % 4 or not text.isascii():
        raise ValueError(f"{where}: routed_experts must be base64, got {len(text)} letters")
    start = decoded(text[:HEADER].encode(), where)
    try:
        stored, fortran = npz.read_npy_header(io.BytesIO(start))
    except ValueError as error:
        raise ValueError(f"{where}: routed_experts must be an array as .npy: {error}") from None
    if len(stored.shape) != 3 or stored.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: routed_experts must be integers [tokens, layers, top_k], got "
            f"{stored.dtype} {list(stored.shape)}"
        )
    held = len(text) // 4 * 3 - text[-2:].count("=")
    if stored.offset + stored.nbytes != held:
        raise ValueError(
            f"{where}: routed_experts {list(stored.shape)} must have "
            f"{stored.offset + stored.nbytes} bytes, got {held}"
        )
    return stored, fortran


def _ids(array: NDArray[Any], name: str) -> NDArray[Any]:
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integers [tokens, layers, top_k], got {array.dtype} "
            f"{list(array.shape)}"
        )
    return array


class _NpyPiece:
    """An ``.npy`` file in row-major order."""

    def __init__(self, path: Path, stored: TensorInFile) -> None:
        self.path, self.shape, self.dtype = path, stored.shape, stored.dtype
        self.offset = stored.offset

    def read(self, first: int, count: int) -> NDArray[Any]:
        row = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.offset + first * row)
            data = file.read(count * row)
        if len(data) < count * row:
            raise ValueError("file shrank while it was read")
        return np.frombuffer(data, dtype=self.dtype).reshape(count, *self.shape[1:])


def _npy_piece(path: Path) -> Piece:
    with path.open("rb") as file:
        stored, fortran = npz.read_npy_header(file)
    if len(stored.shape) != 3 or stored.dtype.kind not in "iu":
        raise ValueError(
            f"must be integers [tokens, layers, top_k], got {stored.dtype} {list(stored.shape)}"
        )
    size = path.stat().st_size
    if stored.offset + stored.nbytes > size:
        raise ValueError(f"file must have {stored.offset + stored.nbytes} bytes, got {size}")
    piece = _NpyPiece(path, stored)
    if fortran:
        flat = piece.read(0, stored.shape[0]).ravel()
        return ArrayPiece(path, flat.reshape(stored.shape, order="F"))
    return piece


def _has_dense_rows(path: Path) -> bool:
    """Whether a row of zeros shows that an array counts layers without experts."""
    try:
        piece = _npy_piece(path)
        if 0 in piece.shape or piece.shape[2] < 2:
            return False
        return bool((piece.read(0, 1)[0] == 0).all(axis=1).any())
    except ValueError:
        return False  # the reader of moetuner's own says what is wrong


def _are_sequences(path: Path, names: set[str]) -> bool:
    """Whether every array of an archive has the sizes of routed experts."""
    with naming(path):
        shapes = npz.shapes_in_npz(path)
    return (
        all(len(shapes[name][1]) == 3 and shapes[name][0].kind in "iu" for name in names)
        and len({shapes[name][1][1:] for name in names}) == 1
    )


def recognises_loads(path: Path) -> bool:
    """Whether a file has the windows of load that pull request 41141 writes."""
    start = head(path)
    return looks_like_json(start) and b'"record_type"' in start and STATS.encode() in start


def read_loads(paths: Sequence[Path], hints: Hints) -> Traffic:
    """Read windows of load by slot, and add up the slots of every expert.

    Raises
    ------
    ValueError
        Naming file and line of what is wrong.
    """
    windows: list[NDArray[np.int64]] = []
    experts = hints.num_experts
    for path in files_in(paths):
        with naming(path):
            for record in records(path):
                if record.fields.get("record_type") != STATS:
                    raise ValueError(f"{record.where}: record_type must be {STATS!r}")
                with naming(record.where):
                    table = Layout.of(record.fields.get("expert_load")).experts
                    load = counts_in("expert_load", table)
                    slots = Layout.of(record.fields.get("p2l_map")).experts
                    if load.shape != slots.shape:
                        raise ValueError(
                            f"expert_load must be {list(slots.shape)} like p2l_map, "
                            f"got {list(load.shape)}"
                        )
                    windows.append(by_expert(load[None], slots, experts)[0])
                experts = experts or windows[0].shape[1]
                if windows[-1].shape != windows[0].shape:
                    raise ValueError(
                        f"{record.where}: must have {list(windows[0].shape)} layers and experts "
                        f"like the records before, got {list(windows[-1].shape)}"
                    )
    if not windows:
        raise ValueError(f"{paths[0]}: must have at least one record, got none")
    return RoutingStatistics.from_load(np.stack(windows))


def write_map_49572(placement: Placement, path: Path, _: Hints) -> None:
    """Write a list [L][P], which pull request 49572 loads by ``initial_expert_map_path``."""
    _write(path, _rows(placement))


def write_map_53022(placement: Placement, path: Path, _: Hints) -> None:
    """Write an object of MoE layers, which pull request 53022 loads by ``expert_map_path``."""
    _write(path, {str(layer): row for layer, row in enumerate(_rows(placement))})


def write_map_41141(placement: Placement, path: Path, _: Hints) -> None:
    """Write a JSON line, which pull request 41141 loads by ``initial_mapping_path``."""
    slots = placement.devices * placement.slots_per_device
    _write(
        path,
        {
            "record_type": INITIAL,
            "version": 1,
            "num_redundant_experts": slots - placement.num_experts,
            "num_slots": slots,
            "initial_global_assignments": {
                str(layer): row for layer, row in enumerate(_rows(placement))
            },
        },
    )


def _rows(placement: Placement) -> list[list[int]]:
    rows: list[list[int]] = placement.slots.reshape(placement.layers, -1).tolist()
    return rows


def _write(path: Path, content: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def recognises_map_49572(path: Path) -> bool:
    """Whether a file is a list of lists of numbers, or one list of them."""
    start = head(path, 4096).removeprefix(b"\xef\xbb\xbf").split()
    text = b"".join(start)[:80]
    return text.startswith(b"[") and text.lstrip(b"[")[:1].isdigit()


def recognises_map_53022(path: Path) -> bool:
    """Whether a file is an object of layers and their lists."""
    text = b"".join(head(path, 4096).removeprefix(b"\xef\xbb\xbf").split())[:200]
    key, colon, rest = text.removeprefix(b'{"').partition(b'":')
    return text.startswith(b'{"') and key.isdigit() and bool(colon) and rest[:1] == b"["


def recognises_map_41141(path: Path) -> bool:
    """Whether a file is a record of an initial mapping."""
    start = head(path)
    return looks_like_json(start) and INITIAL.encode() in start


def read_map_49572(path: Path, _: Hints) -> Layout:
    """Read a list [L][P]; one list [P] is that of every layer, and is read as one."""
    with naming(path):
        found = _json(path)
        if isinstance(found, list) and found and not isinstance(found[0], list):
            found = [found]
        return Layout.of(found)


def read_map_53022(path: Path, _: Hints) -> Layout:
    """Read an object of layers."""
    with naming(path):
        return by_layer(_json(path))


def read_map_41141(path: Path, _: Hints) -> Layout:
    """Read the last record, which is what would be loaded."""
    with naming(path):
        found = None
        for record in records(path):
            if record.fields.get("record_type") == INITIAL:
                found = record
        if found is None:
            raise ValueError(f"must have a record of type {INITIAL!r}")
        layout = by_layer(found.fields.get("initial_global_assignments"))
        slots = layout.experts.shape[1]
        told = found.fields.get("num_slots", slots)
        if told != slots:
            raise ValueError(
                f"num_slots must be {slots}, the slots of every layer, got {shown(told)}"
            )
        redundant = found.fields.get("num_redundant_experts", 0)
        whole_number("num_redundant_experts", redundant, lowest=0, highest=slots - 1)
        return Layout(layout.experts, num_experts=slots - redundant, layers=layout.layers)


def by_layer(found: Any) -> Layout:
    """Read an object of layer numbers and lists of experts, in the order of the numbers.

    Raises
    ------
    ValueError
        If a key is no number or a value no list.
    """
    if not isinstance(found, dict) or not found:
        raise ValueError(f"must be an object of layers, got {shown(found)}")
    rows: dict[int, Any] = {}
    for key, row in found.items():
        text = str(key)
        if not (text.isascii() and text.isdigit() and len(text) < 6) or int(text) in rows:
            raise ValueError(f"keys must be numbers of layers, each once, got {shown(text)}")
        rows[int(text)] = row
    layers = tuple(sorted(rows))
    return Layout.of([rows[layer] for layer in layers], layers=layers)


def _json(path: Path) -> Any:
    return parse_json(read_whole(path))
