"""Putting the experts of a checkpoint into the order of a placement, without building the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetuner._checks import flag, instance
from moetuner.files import naming, read_whole, replacing, safetensors
from moetuner.placement import Placement
from moetuner.torch.reorder.keys import TensorChange, plan
from moetuner.torch.reorder.order import (
    Order,
    check_groups,
    check_ties,
    groups_chosen,
    inverse_of,
    order_of,
)
from moetuner.torch.reorder.state import Held, held_as, renumbered

INDEX = "model.safetensors.index.json"
PIECE = 16 << 20

# Whole numbers of 16 bits or more, as safetensors calls them.
WHOLE = {"I16", "I32", "I64", "U16", "U32", "U64"}

# The same weights in another format would stay in their old order, and be taken for the new ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


@overload
def permute_state_dict(
    source: Mapping[str, Tensor],
    placement: Placement,
    out: None = None,
    *,
    config: Mapping[str, Any] | None = None,
    inverse: bool = False,
) -> dict[str, Tensor]: ...


@overload
def permute_state_dict(
    source: str | Path,
    placement: Placement,
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    inverse: bool = False,
) -> Path: ...


def permute_state_dict(
    source: Mapping[str, Tensor] | str | Path,
    placement: Placement,
    out: str | Path | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    inverse: bool = False,
) -> dict[str, Tensor] | Path:
    """Renumber the experts of a checkpoint, so that contiguous experts are the placement.

    Does to weights on disk what ``apply_placement`` does to a model. Tensors of single experts only
    change their names; of stacked experts and routers the rows are written in another order. No
    tensor is held in memory, and any type of number, quantised ones included, is moved bit by bit.

    Parameters
    ----------
    source
        A folder with ``.safetensors`` files as transformers writes it, or tensors by name.
    placement
        One copy of each expert, equally many on every device.
    out
        Folder to write, which must be new or empty: weights file by file, and other files as they
        are, except for weights in other formats. None for tensors by name.
    config
        The model's configuration; by default the ``config.json`` of the folder. Says whether the
        router is limited to groups (``n_group``) and how many layers the model has.
    inverse
        Undo an earlier call with the same placement.

    Returns
    -------
    dict or Path
        Tensors by their new names (those that did not move are shared), or the folder.

    Raises
    ------
    ValueError
        If the result could not be exact, with the reason; nothing is then written.
    OSError
        If a file cannot be read or written.
    """
    instance("placement", placement, Placement)
    flag("inverse", inverse)
    order = order_of(placement)
    if isinstance(source, Mapping):
        if out is not None:
            raise ValueError(f"out must be left out where source is not a folder, got {out}")
        return _permute_tensors(source, order, _settings(config), inverse)
    if out is None:
        raise ValueError("out must be a folder to write where source is a folder, got None")
    source, out = Path(source), Path(out)
    if config is None and (source / "config.json").is_file():
        with naming(source / "config.json"):
            config = json.loads(read_whole(source / "config.json"))
    return _permute_folder(source, out, order, _settings(config), inverse)


def _settings(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the settings of the language model, which those of a larger model hold."""
    return None if config is None else config.get("text_config") or config


def _moves(
    held: Mapping[str, Held],
    order: Order,
    settings: Mapping[str, Any] | None,
    inverse: bool,
) -> dict[str, TensorChange]:
    """Return what becomes of every tensor, if that is exact."""
    if settings is None and any(name.endswith("e_score_correction_bias") for name in held):
        raise ValueError(
            "config is needed: a router with e_score_correction_bias may be limited to groups "
            "(config={'n_group': 1} if it is not)"
        )
    about = settings or {}
    groups = groups_chosen(about.get("n_group"), about.get("topk_group"), about.get("topk_method"))
    for layer, positions in enumerate(order):
        check_groups(positions, groups, f"layer {layer}")
    return plan(held, inverse_of(order) if inverse else order, about.get("num_hidden_layers"))


def _permute_tensors(
    tensors: Mapping[str, Tensor],
    order: Order,
    settings: Mapping[str, Any] | None,
    inverse: bool,
) -> dict[str, Tensor]:
    moves = _moves({n: held_as(t) for n, t in tensors.items()}, order, settings, inverse)
    routers: dict[str, list[NDArray[np.uint8]]] = {}
    for name, move in moves.items():
        if move.is_router and move.block is not None and move.order is not None:
            rows = tensors[name].detach().reshape(len(move.order), -1).cpu().contiguous()
            routers.setdefault(move.block, []).append(rows.view(torch.uint8).numpy())
    _check_all_ties(routers, moves)
    moved = {}
    for name, move in moves.items():
        tensor = tensors[name]
        if move.order is not None:
            rows = tensor.detach().reshape(len(move.order), -1)
            # Rows are bytes: not every type of number can be indexed.
            bits = rows.contiguous().view(torch.uint8)[torch.from_numpy(move.order).to(rows.device)]
            tensor = bits.view(tensor.dtype).reshape(tensor.shape)
        elif move.ids is not None:
            tensor = renumbered(name, tensor, move.ids)
        moved[move.name] = tensor
    return moved


def _check_all_ties(
    routers: Mapping[str, list[NDArray[np.uint8]]], moves: dict[str, TensorChange]
) -> None:
    still = {
        move.block: np.array_equal(move.order, np.arange(len(move.order)))
        for move in moves.values()
        if move.order is not None
    }
    for block, parts in routers.items():
        if not still[block]:
            check_ties([row.tobytes() for row in np.concatenate(parts, axis=1)], block)


def _permute_folder(
    source: Path, out: Path, order: Order, settings: Mapping[str, Any] | None, inverse: bool
) -> Path:
    index = _index_of(source)
    files = sorted(source.glob("*.safetensors"))
    if index is not None:
        files = sorted({source / str(name) for name in index["weight_map"].values()})
    if not files:
        raise ValueError(f"{source}: must hold .safetensors files, got none")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: must be a new or an empty folder")
    headers = {file: safetensors.read_header(file) for file in files}
    held: dict[str, Held] = {}
    for file, header in headers.items():
        with naming(file):
            for name, entry in header.entries.items():
                if name in held:
                    raise ValueError(f"tensor {name} is in another file as well")
                held[name] = Held(tuple(entry["shape"]), entry["dtype"] in WHOLE)
    with naming(source):
        moves = _moves(held, order, settings, inverse)
        _check_all_ties(_router_rows(headers, moves), moves)
        tables = _tables(headers, moves)
    out.mkdir(parents=True, exist_ok=True)
    for file, header in headers.items():
        with replacing(out / file.name) as temporary:
            _write_shard(file, header, moves, tables, temporary)
    for other in sorted(source.iterdir()):
        if other.is_file() and other.suffix not in WEIGHTS and other.name != INDEX:
            shutil.copyfile(other, out / other.name)
    # Last: a folder without its index is not taken for a whole checkpoint.
    if index is not None:
        index["weight_map"] = {
            moves[name].name: file for name, file in index["weight_map"].items() if name in moves
        }
        with replacing(out / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n")
    return out


def _index_of(source: Path) -> dict[str, Any] | None:
    """Read which file holds which tensor, if the checkpoint has several files."""
    path = source / INDEX
    if not path.is_file():
        return None
    with naming(path):
        index = json.loads(read_whole(path))
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError("must be an object with 'weight_map'")
        return index


def _router_rows(
    headers: Mapping[Path, safetensors.Header], moves: Mapping[str, TensorChange]
) -> dict[str, list[NDArray[np.uint8]]]:
    """Return bytes of the router state of every block, row by row."""
    rows: dict[str, list[NDArray[np.uint8]]] = {}
    for file, header in headers.items():
        with file.open("rb") as data:
            for name, entry in header.entries.items():
                move = moves[name]
                if move.is_router and move.block is not None and move.order is not None:
                    begin, end = entry["data_offsets"]
                    data.seek(header.data + begin)
                    bits = np.frombuffer(data.read(end - begin), dtype=np.uint8)
                    rows.setdefault(move.block, []).append(bits.reshape(len(move.order), -1))
    return rows


def _tables(
    headers: Mapping[Path, safetensors.Header], moves: Mapping[str, TensorChange]
) -> dict[str, bytes]:
    """Compute what the tables of experts' ids become, before anything is written."""
    found = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            ids = moves[name].ids
            if ids is not None:
                begin, end = entry["data_offsets"]
                with file.open("rb") as data:
                    data.seek(header.data + begin)
                    kind = f"<{entry['dtype'].lower()[0]}{int(entry['dtype'][1:]) // 8}"
                    old = torch.from_numpy(np.frombuffer(data.read(end - begin), kind).astype("i8"))
                found[name] = renumbered(name, old, ids).numpy().astype(kind).tobytes()
    return found


def _write_shard(
    file: Path,
    header: safetensors.Header,
    moves: Mapping[str, TensorChange],
    tables: Mapping[str, bytes],
    path: Path,
) -> None:
    """Write a file with new names, row orders and ids; every tensor stays where it was in it."""
    entries: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
    entries.update({moves[name].name: entry for name, entry in header.entries.items()})
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("rb") as old, path.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        start = new.tell()
        for name, entry in header.entries.items():
            begin, end = entry["data_offsets"]
            if name in tables:
                new.seek(start + begin)
                new.write(tables[name])
                continue
            order = moves[name].order
            rows = 1 if order is None else len(order)
            size, rest = divmod(end - begin, rows)
            if rest:
                raise ValueError(
                    f"{name}: {end - begin} bytes must be whole rows of {rows} experts"
                )
            for position, row in enumerate([0] if order is None else order.tolist()):
                old.seek(header.data + begin + row * size)
                new.seek(start + begin + position * size)
                _copy(old, new, size)


def _copy(old: BinaryIO, new: BinaryIO, size: int) -> None:
    while size:
        piece = old.read(min(size, PIECE))
        if not piece:
            raise ValueError(f"{old.name}: file shrank while it was read")
        new.write(piece)
        size -= len(piece)
