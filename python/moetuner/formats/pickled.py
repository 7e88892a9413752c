"""Files of ``torch.save``, opened without torch and without running anything that is in them.

Such a file is a zip archive: ``data.pkl`` describes containers and tensors, and every storage has
an entry of raw bytes. The description is a programme for pickle's stack machine. Python's own
carries it out here without the instructions that could call or change anything: what is left makes
plain containers, numbers, texts and tensors, and a file that names anything else is refused by that
name. Tensors stay in the file until their ``array`` is read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, npz, size_of
from moetuner.files.safetensors import is_size

# Of an archive's description; per-token dumps list their tokens there.
LONGEST_PICKLE = 1 << 27
# Bytes of memory that what is made may take for each byte of the description, beyond some that are
# free: an integer of three bytes takes 40, a container of five or more takes 72.
FREE_BYTES, BYTES_PER_BYTE = 1 << 22, 14
POINTER, OBJECT, CONTAINER = 8, 40, 80
# Values for each byte, where the description names the same part again and again.
EXPANSION = 16
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
ZIP = b"PK\x03\x04"
LOCAL_HEADER = 30
DESCRIPTION = "data.pkl"

BFLOAT = "bfloat16"
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": BFLOAT,
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
DTYPES = {*STORAGES.values(), "uint16", "uint32", "uint64"}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: what it looks like, and where its numbers are.

    Parameters
    ----------
    path
        The file.
    dtype
        Element type as torch calls it, such as ``int32`` or ``bfloat16``.
    shape, strides
        Sizes, and steps between neighbours in elements.
    start
        First byte of its first element.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def array(self) -> NDArray[Any]:
        """Read it, C-contiguous, in native byte order; bfloat16 becomes float32."""
        stored = np.dtype("uint16" if self.dtype == BFLOAT else self.dtype).newbyteorder("<")
        size = _span(self.shape, self.strides) * stored.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"{self.path}: file shrank while it was read")
        flat = np.frombuffer(data, dtype=stored)
        steps = tuple(step * stored.itemsize for step in self.strides)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        array = np.ascontiguousarray(view, dtype=stored.newbyteorder("="))
        if self.dtype == BFLOAT:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(self.shape)


def is_pickled(path: Path) -> bool:
    """Whether a file is one of ``torch.save``, of today or of before 1.6."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(512)
    return start.startswith(LEGACY) or (start.startswith(ZIP) and DESCRIPTION.encode() in start)


def peek(path: Path) -> Any:
    """Read what was saved, to tell what it is; ``load`` will not read it again."""
    stat = path.stat()
    return _load(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def load(path: Path) -> Any:
    """Read what was saved: containers, numbers, texts, and a ``Tensor`` for each tensor."""
    content = peek(path)
    _load.cache_clear()  # a description may take much memory
    return content


@lru_cache(maxsize=1)
def _load(path: Path, *_: int) -> Any:
    size = size_of(path)
    with naming(path):
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
        if start == LEGACY:
            raise ValueError(
                "is in torch's format of before 1.6, which is a programme and not opened: load it "
                "where you trust it and torch.save it anew"
            )
        if not start.startswith(ZIP):
            raise ValueError("must be a zip archive as torch.save writes it")
        with npz.opened(path, "archive of torch.save") as archive:
            return _Archive(path, size, archive).content()


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return elements of a storage from a tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


class _Archive:
    """The entries of an archive, all of them plain bytes of the file."""

    def __init__(self, path: Path, size: int, archive: zipfile.ZipFile) -> None:
        self.path, self.size = path, size
        self.entries = {info.filename: info for info in archive.infolist()}
        descriptions = [n for n in self.entries if n.endswith(DESCRIPTION)]
        if len(descriptions) != 1:
            raise ValueError(
                f"must have one {DESCRIPTION} as torch.save writes it, got {len(descriptions)}"
            )
        self.root = descriptions[0].removesuffix(DESCRIPTION)
        order = self.root + "byteorder"
        if order in self.entries and self.read("byteorder", 16).strip() != b"little":
            raise ValueError("byteorder must be little: write it anew on such a machine")
        self.storages: dict[str, tuple[int, int]] = {}

    def content(self) -> Any:
        """Carry out the description."""
        return _Machine(self.read(DESCRIPTION, LONGEST_PICKLE), self).content()

    def place(self, name: str) -> tuple[int, int]:
        """Return first byte and number of bytes of an entry."""
        name = self.root + name
        info = self.entries.get(name)
        if info is None:
            raise ValueError(f"must have an entry {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name}: must not be compressed, as torch.save writes it")
        if info.flag_bits & 1:
            raise ValueError(f"{name}: must not be encrypted")
        if info.header_offset < 0:
            # Bytes that are missing put the start of an entry before that of the file.
            raise ValueError(f"{name}: must begin within the file")
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER)
        if len(header) < LOCAL_HEADER or not header.startswith(ZIP):
            raise ValueError(f"{name}: has no header where the archive says")
        lengths = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + LOCAL_HEADER + sum(lengths)
        if begin + info.file_size > self.size:
            raise ValueError(
                f"{name}: must end within the file's {self.size} bytes, "
                f"got {begin + info.file_size}"
            )
        return begin, info.file_size

    def read(self, name: str, most: int) -> bytes:
        """Read an entry."""
        begin, size = self.place(name)
        if size > most:
            raise ValueError(f"{self.root}{name}: must have at most {most} bytes, got {size}")
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(size)

    def tensor(
        self, storage: _Storage, dtype: str, offset: Any, shape: Any, strides: Any
    ) -> Tensor:
        """Check a tensor against the entry of its storage."""
        for name, sizes in (("size", shape), ("stride", strides)):
            if not isinstance(sizes, tuple) or not all(map(is_size, sizes)):
                raise ValueError(f"{name} of a tensor must be sizes, got a {type(sizes).__name__}")
        if not is_size(offset) or len(shape) != len(strides) or len(shape) > 16:
            raise ValueError("offset, size and stride of a tensor must fit together")
        if storage.key not in self.storages:
            self.storages[storage.key] = self.place(f"data/{storage.key}")
        begin, size = self.storages[storage.key]
        width = np.dtype("uint16" if dtype == BFLOAT else dtype).itemsize
        needed = max(offset + _span(shape, strides), prod(shape))
        if prod(shape) and needed > size // width:
            raise ValueError(
                f"storage {storage.key} must have {needed} {dtype} for a tensor {list(shape)}, "
                f"got {size // width}"
            )
        start = begin + offset * width
        return Tensor(self.path, dtype, shape, strides, start)


@dataclass(frozen=True)
class _Storage:
    """Raw bytes of tensors; untyped where the tensor says its type."""

    key: str
    dtype: str | None


TENSOR_V2, TENSOR_V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED, SIZE = "collections.OrderedDict", "torch.Size"
NAMES = {TENSOR_V2, TENSOR_V3, PARAMETER, ORDERED, SIZE, "torch.device"}
NAMES |= {f"torch.{name}" for name in (*STORAGES, *DTYPES)}
NAMES |= {"torch.storage.UntypedStorage", "torch.UntypedStorage"}

# Instructions that are carried out, and bytes of memory of what each makes, beside its text.
COSTS = dict.fromkeys(map(ord, "NK\x88\x89)hjqr\x94"), POINTER)
COSTS |= dict.fromkeys(map(ord, "MJG\x8aX\x8cBC"), OBJECT)
COSTS |= dict.fromkeys(map(ord, "(}]tl\x85\x86\x87RQc\x93"), CONTAINER)
COSTS |= dict.fromkeys(map(ord, "\x80\x95baesu."), 0)


@dataclass(frozen=True)
class _Name:
    """What a description may name: it stands for no more than its name, and for what that makes."""

    text: str
    archive: _Archive

    def __call__(self, *arguments: Any) -> Any:
        """Make the container or tensor that a name and its arguments stand for."""
        name = self.text
        if name == ORDERED and not arguments:
            return {}
        if name == SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if name == "torch.device":
            return ":".join(str(part) for part in arguments if isinstance(part, str | int))
        if name == PARAMETER and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name in (TENSOR_V2, TENSOR_V3) and len(arguments) >= 4:
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, _Storage):
                raise ValueError("a tensor must have a storage")
            dtype = storage.dtype
            if name == TENSOR_V3 and len(arguments) >= 7 and isinstance(arguments[6], _Name):
                dtype = arguments[6].text.removeprefix("torch.")
            if dtype not in DTYPES:
                raise ValueError(f"a tensor must have a known element type, got {dtype}")
            return self.archive.tensor(storage, str(dtype), offset, shape, strides)
        raise ValueError(f"asks for a call of {name} that torch.save does not write")


class _Memo(list[Any]):
    """Parts by number, as picklers number them: from 0 on, so that no number is large."""

    def __setitem__(self, index: Any, value: Any) -> None:
        if index > len(self):
            raise ValueError(f"must number its parts one after the other, got {index}")
        super().__setitem__(slice(index, index + 1), [value])


class _Machine(pickle._Unpickler):
    """Pickle's stack machine, as far as plain content needs it."""

    # Pickle's own: what is above the last mark, and what is below it.
    stack: list[Any]
    metastack: list[list[Any]]

    def __init__(self, text: bytes, archive: _Archive) -> None:
        super().__init__(io.BytesIO(text))
        self.archive = archive
        self.memo = _Memo()
        self.memory = max(FREE_BYTES, BYTES_PER_BYTE * len(text))
        self.most = max(1 << 16, EXPANSION * len(text))

    def content(self) -> Any:
        """Carry out instruction after instruction, up to the last."""
        try:
            content = self.load()
        except (IndexError, EOFError, struct.error):
            raise ValueError("damaged description: it is cut off") from None
        except (TypeError, AttributeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"damaged description: {error}") from None
        except pickle.UnpicklingError as error:
            raise ValueError(f"damaged description: {error}") from None
        if self.stack or self.metastack:
            raise ValueError("damaged description: it must leave one value")
        _check_unfolded(content, self.most)
        return content

    def spend(self, size: int) -> None:
        """Count memory of what is made."""
        self.memory -= size
        if self.memory < 0:
            raise ValueError("description makes far more than it has bytes")

    def pop_mark(self) -> list[Any]:
        """Pop everything down to the last mark, which was a container."""
        values: list[Any] = super().pop_mark()  # type: ignore[misc]
        self.spend(POINTER * len(values) - CONTAINER)
        return values

    def set(self, pairs: list[Any]) -> None:
        """Set keys of the dict on top."""
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise TypeError("only dicts take keys")
        self.spend(CONTAINER * (len(pairs) // 2))
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # The hash of a tuple of tuples could take for ever.
            if not all(map(_is_plain, key if isinstance(key, tuple) else [key])):
                raise TypeError(f"keys must be texts or numbers, got a {type(key).__name__}")
            target[key] = value

    def find_class(self, module: str, name: str) -> _Name:
        """Return what stands for a name, if it is harmless."""
        text = f"{module}.{name}"
        if text not in NAMES:
            raise ValueError(
                f"asks for {text:.80}, which is no plain content: pickles that call code are not "
                "opened"
            )
        return _Name(text, self.archive)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a persistent id names."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("persistent ids must be storages")
        _, kind, key, _, count = pid
        name = kind.text.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if not isinstance(key, str) or not key.isalnum() or len(key) > 40 or not is_size(count):
            raise ValueError("a storage must have a key and a size")
        if name not in (*STORAGES, "UntypedStorage"):
            raise ValueError(f"a storage must be of a known type, got {name or 'none'}")
        return _Storage(key, STORAGES.get(name))

    def build(self) -> None:
        """Drop attributes of a dict, such as the versions of a state dict; nothing else has any."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError("asks to change an object that is no dict")


def _is_plain(key: object) -> bool:
    return isinstance(key, str | int | float | None)


Action = Callable[[_Machine], object]
# Instructions that are carried out otherwise than by pickle.
OURS: dict[str, Action] = {
    "s": lambda machine: machine.set([machine.stack.pop(), machine.stack.pop()][::-1]),
    "u": lambda machine: machine.set(machine.pop_mark()),
    "b": _Machine.build,
}


def _instruction(code: int) -> Action:
    """Return how an instruction is carried out: its memory is counted before it is taken."""
    act = OURS.get(chr(code)) or cast(Action, pickle._Unpickler.dispatch.get(code))
    cost = COSTS.get(code)

    def counted(machine: _Machine) -> None:
        if cost is None:
            raise ValueError(f"must be plain content, got pickle instruction {code:#04x}")
        machine.spend(cost)
        act(machine)

    return counted


_Machine.dispatch = {code: cast(Any, _instruction(code)) for code in range(256)}


def _check_unfolded(content: Any, most: int) -> None:
    """Check how many values there are if each is counted as often as containers hold it."""
    counts: dict[int, int] = {}  # by identity; 0 until the members are counted
    stack: list[Any] = [[content]]
    while stack:
        node = stack[-1]
        values = node.values() if isinstance(node, dict) else node
        members = [value for value in values if isinstance(value, list | tuple | dict)]
        if id(node) not in counts:
            counts[id(node)] = 0
            if any(counts.get(id(member)) == 0 for member in members):
                raise ValueError("damaged description: a container must not hold itself")
            stack.extend(member for member in members if id(member) not in counts)
            continue
        counts[id(node)] = 1 + len(node) + sum(counts[id(member)] for member in members)
        if counts[id(node)] > most:
            raise ValueError("description names the same parts too often")
        stack.pop()
