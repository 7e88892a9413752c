"""Put the experts of a checkpoint into the order of a placement, without building the model."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetuner._checks import flag, instance, shown
from moetuner.files import naming, read_whole, replacing, safetensors
from moetuner.files.safetensors import DTYPES, TensorInFile
from moetuner.placement import Placement
from moetuner.torch.reorder import plan
from moetuner.torch.reorder.mentions import Mentions
from moetuner.torch.reorder.names import find_blocks
from moetuner.torch.reorder.plan import Changes, Order, TensorChange, TensorPlan, Tensors
from moetuner.torch.reorder.settings import Config, read_settings

Tables = Mapping[str, bytes]

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
PIECE = 16 << 20

# The same weights in another format would stay in their old order, and be taken for the new ones.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
# Lists of files of weights. The list of files that are not copied is not copied.
INDEXES = ".index.json"


def permute_state_dict(
    source: Mapping[str, Tensor] | str | Path,
    placement: Placement,
    out: str | Path | None = None,
    *,
    config: Config = None,
    inverse: bool = False,
) -> Any:
    """Renumber the experts of a checkpoint, so that contiguous experts are the placement.

    It does to weights on disk what ``apply_placement`` does to a model. Tensors of single experts
    only change their names; the rows of stacked experts and of routers are written in another
    order. No tensor is held in memory, and numbers of any type, quantised ones included, move
    unchanged.

    Parameters
    ----------
    source
        A folder with ``.safetensors`` files as transformers writes it, or tensors by name.
    placement
        One copy of each expert, equally many on every device.
    out
        Folder to write, which must be new or empty. It gets the weights file by file, and other
        files and folders as they are. Settings that name single experts, as those of quantised
        weights do, get the new numbers. A warning names what is not copied, such as weights in
        other formats. None for tensors by name.
    config
        The model's configuration; by default the ``config.json`` of the folder. It says whether the
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
    order = plan.order_experts(placement)
    if isinstance(source, Mapping):
        if out is not None:
            raise ValueError(f"out must be left out where source is not a folder, got {out}")
        _, changes = _plan_changes(source, order, config, inverse=inverse)
        for name, change in changes.items():
            if change.order is not None or change.ids is not None:
                plan.check_memory(name, source[name])
        plan.check_ties(changes, lambda name, experts: plan.view_bytes(source[name], experts))
        moved = (
            (change.name, plan.reorder(name, source[name], change))
            for name, change in changes.items()
        )
        return dict(moved)
    if out is None:
        raise ValueError("out must be a folder to write where source is a folder, got None")
    folder, out = _Folder(Path(source)), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: must be a new or an empty folder")
    config = _json_in(folder.path / CONFIG) if config is None else config
    with naming(source):
        tensor_plan, changes = _plan_changes(folder.tensors, order, config, inverse=inverse)
        plan.check_ties(changes, folder.read_bytes)
        # Before anything is written.
        numbered = [name for name, change in changes.items() if change.ids is not None]
        tables = {name: folder.renumber_table(name, changes[name]) for name in numbered}
        settings = folder.rename_experts(Mentions(tensor_plan, changes))
    others, left_out = folder.list_others()
    folder.copy(out, changes, tables, others, settings)
    if left_out:
        warnings.warn(
            f"not copied: {', '.join(left_out)} (hidden folders, links to folders, and other "
            "weights than the checkpoint's own, whose experts are in the old order)",
            UserWarning,
            stacklevel=2,
        )
    return out


def _plan_changes(
    tensors: Tensors, order: Order, config: Config, *, inverse: bool
) -> tuple[TensorPlan, Changes]:
    """Return the plan and the changes of all tensors; raise if they cannot be exact."""
    settings = read_settings(config, tensors)
    settings.check_order(order)
    blocks = find_blocks(tensors, len(order), settings.hidden_layers)
    order = np.argsort(order, axis=1) if inverse else order
    tensor_plan = TensorPlan.for_names(tensors, order, dict.fromkeys(blocks))
    return tensor_plan, plan.plan_changes(tensors, tensor_plan)


class _Folder:
    """The weights of a folder: the file of every tensor, and its bytes there."""

    def __init__(self, path: Path) -> None:
        self.path, self.index = path, _json_in(path / INDEX)
        files = set(path.glob("*.safetensors"))
        if self.index is not None:
            if not isinstance(self.index.get("weight_map"), dict):
                raise ValueError(f"{path / INDEX}: must be an object with 'weight_map'")
            names = {str(name) for name in self.index["weight_map"].values()}
            for name in names:
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    rule = "files of weight_map must be in the folder"
                    raise ValueError(f"{path / INDEX}: {rule}, got {shown(name)}")
            files = {path / name for name in names}
        if not files:
            raise ValueError(f"{path}: must hold .safetensors files, got none")
        self.headers = {file: safetensors.read_header(file) for file in sorted(files)}
        self.file_of: dict[str, Path] = {}
        # Tensors without memory, with the shapes and kinds of numbers of those in the files.
        self.tensors: dict[str, Tensor] = {}
        integer_codes = {
            code for code, dtype in DTYPES.items() if dtype.kind in "iu" and dtype.itemsize > 1
        }
        for file, header in self.headers.items():
            for name, entry in header.entries.items():
                shape = entry.get("shape")
                if name in self.file_of:
                    raise ValueError(f"{file}: tensor {name} is in another file as well")
                if not isinstance(shape, list) or not all(map(safetensors.is_size, shape)):
                    raise ValueError(f"{file}: {name}: shape must be sizes, got {shown(shape)}")
                dtype = torch.int64 if str(entry.get("dtype")) in integer_codes else torch.float32
                self.tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
                self.file_of[name] = file

    def read_bytes(self, name: str, experts: int) -> Tensor:
        """Return the bytes of a small tensor by expert [E,..]."""
        header = self.headers[self.file_of[name]]
        begin, end = header.entries[name]["data_offsets"]
        place = TensorInFile(np.dtype(np.uint8), (end - begin,), header.data + begin)
        numbers = safetensors.read(self.file_of[name], place)
        return torch.from_numpy(numbers.copy()).reshape(experts, -1)

    def renumber_table(self, name: str, change: TensorChange) -> bytes:
        """Return the bytes of a table of experts' ids with their new numbers."""
        file = self.file_of[name]
        old = safetensors.read(file, self.headers[file].tensor(name))
        new = plan.reorder(name, torch.from_numpy(old.astype(np.int64)), change).numpy()
        return new.astype(old.dtype.newbyteorder("<")).tobytes()

    def rename_experts(self, mentions: Mentions) -> dict[Path, str]:
        """Return the new text of each file of settings that names single experts."""
        texts = {}
        for file in sorted(self.path.glob("*.json")):
            is_about_storage = file.name == CONFIG or "quant" in file.name
            old = _json_in(file) if is_about_storage and file.name != INDEX else None
            with naming(file):
                new = mentions.rename(old)
            if new != old:
                texts[file] = json.dumps(new, indent=2) + "\n"
        return texts

    def list_others(self) -> tuple[list[Path], list[str]]:
        """Return the files beside the weights, and the names of those that are not copied."""
        files, left_out = [], []
        for root, folders, names in os.walk(self.path):
            folder = Path(root)
            relative = folder.relative_to(self.path)
            for name in sorted(folders):
                if name.startswith(".") or (folder / name).is_symlink():
                    left_out.append(f"{relative / name}/")
                    folders.remove(name)
            folders.sort()
            paths = [folder / name for name in sorted(names)]
            others = [path for path in paths if path not in self.headers]
            weights = [file for file in others if file.suffix in WEIGHTS or not file.is_file()]
            if weights and folder != self.path and len(others) == len(names):
                # The folder has none of the checkpoint's weights: it is the model in another form.
                left_out.append(f"{relative}/")
                folders.clear()
                continue
            left_out += [str(file.relative_to(self.path)) for file in weights]
            lists = (INDEXES,) if weights else (INDEX,)
            files += [
                file for file in others if file not in weights and not file.name.endswith(lists)
            ]
        return files, sorted(left_out)

    def copy(
        self,
        out: Path,
        changes: Changes,
        tables: Tables,
        others: Iterable[Path],
        settings: Mapping[Path, str],
    ) -> None:
        """Write the new folder: weights, the files beside them, and settings with new texts."""
        for file in (*self.headers, *others):
            target = out / file.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                if file in self.headers:
                    self._copy_file(file, temporary, changes, tables)
                elif file in settings:
                    temporary.write_text(settings[file])
                else:
                    shutil.copyfile(file, temporary)
        # Last: a folder without its index is not taken for a whole checkpoint.
        if self.index is not None:
            files = self.index["weight_map"].items()
            names = {changes[name].name: file for name, file in files if name in changes}
            with replacing(out / INDEX) as temporary:
                index = self.index | {"weight_map": names}
                temporary.write_text(json.dumps(index, indent=2) + "\n")

    def _copy_file(self, file: Path, out: Path, changes: Changes, tables: Tables) -> None:
        """Write a file with new names, row orders and ids; every tensor keeps its place."""
        header = self.headers[file]
        entries: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
        entries |= {changes[name].name: entry for name, entry in header.entries.items()}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("rb") as old, out.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            start = new.tell()
            for name, entry in header.entries.items():
                begin, end = entry["data_offsets"]
                new.seek(start + begin)
                if name in tables:
                    new.write(tables[name])
                    continue
                order = changes[name].order
                rows = [0] if order is None else order.tolist()
                size, rest = divmod(end - begin, len(rows))
                if rest:
                    what = f"whole rows of {len(rows)} experts"
                    raise ValueError(f"{name}: {end - begin} bytes must be {what}")
                for row in rows:
                    old.seek(header.data + begin + row * size)
                    for remaining in range(size, 0, -PIECE):
                        length = min(PIECE, remaining)
                        if new.write(old.read(length)) < length:
                            raise ValueError(f"{file}: file shrank while it was read")


def _json_in(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file."""
    if not path.is_file():
        return None
    with naming(path):
        content = json.loads(read_whole(path))
        if not isinstance(content, dict):
            raise ValueError("must be a JSON object")
        return content
