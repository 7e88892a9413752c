"""Files of ``torch.save``, opened without torch and without running anything that is in them.

Such a file is a zip archive: ``data.pkl`` describes containers and tensors, and every storage has
an entry of raw bytes. The description is a programme for pickle's stack machine. Here its harmless
instructions are carried out by a machine of our own, which can make plain containers, numbers,
texts and tensors and knows no way to call anything else: a file that asks for more is refused by
the name of what it asks for. Tensors stay in the file until their ``array`` is asked for.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, size_of

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
    big_endian
        Whether the file was written on such a machine.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    big_endian: bool = False

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last."""
        return _span(self.shape, self.strides)

    def array(self) -> NDArray[Any]:
        """Read it, C-contiguous, in native byte order; bfloat16 becomes float32.

        Raises
        ------
        ValueError
            If the file has shrunk.
        """
        stored = np.dtype("uint16" if self.dtype == BFLOAT else self.dtype)
        stored = stored.newbyteorder(">" if self.big_endian else "<")
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.span * stored.itemsize)
        if len(data) < self.span * stored.itemsize:
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
        start = file.read(len(LEGACY))
    if start == LEGACY:
        return True
    if not start.startswith(ZIP):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_is_description(name) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        # Cut off: the name of its first entry is still there.
        with path.open("rb") as file:
            head = file.read(512)
        return b"/data.pkl" in head


def peek(path: Path) -> Any:
    """Read what was saved, to tell what it is; ``load`` will not read it again."""
    found = path.stat()
    return _load(path, found.st_ino, found.st_size, found.st_mtime_ns)


def load(path: Path) -> Any:
    """Read what was saved: dicts, lists, tuples, numbers, texts, and a ``Tensor`` for each tensor.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged or asks for anything that could run code.
    OSError
        If it cannot be read.
    """
    found = peek(path)
    _load.cache_clear()  # a description may take much memory
    return found


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
        try:
            with zipfile.ZipFile(path) as archive:
                return _Archive(path, size, archive).content()
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise ValueError(f"damaged archive of torch.save: {error}") from None


def _is_description(name: str) -> bool:
    return name == "data.pkl" or name.endswith("/data.pkl")


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


class _Archive:
    """The entries of an archive, all of them plain bytes of the file."""

    def __init__(self, path: Path, size: int, archive: zipfile.ZipFile) -> None:
        self.path, self.size = path, size
        self.entries = {info.filename: info for info in archive.infolist()}
        found = [name for name in self.entries if _is_description(name)]
        if len(found) != 1:
            raise ValueError(f"must have one data.pkl as torch.save writes it, got {len(found)}")
        self.description = found[0]
        self.root = found[0].removesuffix("data.pkl")
        order = self.root + "byteorder"
        told = self.read(order, 16).strip() if order in self.entries else b"little"
        if told not in (b"little", b"big"):
            raise ValueError(f"byteorder must be little or big, got {told!r}")
        self.big_endian = told == b"big"
        self.storages: dict[str, tuple[int, int]] = {}

    def content(self) -> Any:
        """Carry out the description."""
        text = self.read(self.description, LONGEST_PICKLE)
        return _Machine(text, self).run()

    def place(self, name: str) -> tuple[int, int]:
        """First byte and number of bytes of an entry."""
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
        begin = info.header_offset + LOCAL_HEADER
        begin += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
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
            raise ValueError(f"{name}: must have at most {most} bytes, got {size}")
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(size)

    def tensor(
        self, storage: _Storage, dtype: str, offset: Any, shape: Any, strides: Any
    ) -> Tensor:
        """Check a tensor against the entry of its storage."""
        for name, sizes in (("size", shape), ("stride", strides)):
            if not isinstance(sizes, tuple) or not all(map(_is_size, sizes)):
                raise ValueError(f"{name} of a tensor must be sizes, got a {type(sizes).__name__}")
        if not _is_size(offset) or len(shape) != len(strides) or len(shape) > 16:
            raise ValueError("offset, size and stride of a tensor must fit together")
        if storage.key not in self.storages:
            self.storages[storage.key] = self.place(f"{self.root}data/{storage.key}")
        begin, stored = self.storages[storage.key]
        width = np.dtype("uint16" if dtype == BFLOAT else dtype).itemsize
        held = stored // width
        count = 1
        for size in shape:
            count *= size
        if count and (offset + _span(shape, strides) > held or count > held):
            raise ValueError(
                f"storage {storage.key} must have {max(offset + _span(shape, strides), count)} "
                f"{dtype} for a tensor {list(shape)}, got {held}"
            )
        start = begin + offset * width
        return Tensor(self.path, dtype, shape, strides, start, self.big_endian)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


@dataclass(frozen=True)
class _Storage:
    """Raw bytes of tensors; untyped where the tensor says its type."""

    key: str
    dtype: str | None


@dataclass(frozen=True)
class _Name:
    """Something that a description may name, and which stands for no more than its name."""

    text: str


MARK = object()
TENSOR_V2, TENSOR_V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
PARAMETER = "torch._utils._rebuild_parameter"
ORDERED, SIZE = "collections.OrderedDict", "torch.Size"
KNOWN = {TENSOR_V2, TENSOR_V3, PARAMETER, ORDERED, SIZE, "torch.device"}
KNOWN |= {f"torch.{name}" for name in (*STORAGES, *DTYPES)}
KNOWN |= {"torch.storage.UntypedStorage", "torch.UntypedStorage"}


class _Machine:
    """Pickle's stack machine, as far as plain content needs it."""

    def __init__(self, text: bytes, archive: _Archive) -> None:
        self.text, self.at, self.archive = text, 0, archive
        self.stack: list[Any] = []
        # Picklers number what they name again from 0 on.
        self.memo: list[Any] = []
        # Containers that were named again, which then change no more.
        self.complete: set[int] = set()
        self.memory = max(FREE_BYTES, BYTES_PER_BYTE * len(text))
        self.values = max(1 << 16, EXPANSION * len(text))

    def spend(self, size: int) -> None:
        """Count memory of what is made."""
        self.memory -= size
        if self.memory < 0:
            raise ValueError("description makes far more than it has bytes")

    def push(self, value: Any) -> None:
        """Push what was made."""
        if isinstance(value, list | dict | tuple):
            self.spend(CONTAINER + POINTER * len(value))
        elif isinstance(value, str | bytes):
            self.spend(OBJECT + len(value))
        elif value is None or isinstance(value, bool):
            self.spend(POINTER)
        else:
            self.spend(OBJECT)
        self.stack.append(value)

    def put(self, index: int) -> None:
        """Give a number to what is on top, by which it is named again."""
        self.spend(POINTER)
        if index < len(self.memo):
            self.memo[index] = self.stack[-1]
        elif index == len(self.memo):
            self.memo.append(self.stack[-1])
        else:
            raise ValueError(f"must number its parts one after the other, got {index}")

    def get(self, index: int) -> None:
        """Push what was numbered."""
        value = self.memo[index]
        self.spend(POINTER)
        if isinstance(value, list | dict | tuple):
            self.spend(CONTAINER)
            self.complete.add(id(value))
            self.values -= _unfolded(value, self.values)
        self.stack.append(value)

    def run(self) -> Any:
        """Carry out instruction after instruction, up to the one that says stop."""
        text, act = self.text, ACTIONS
        try:
            while True:
                code = text[self.at]
                self.at += 1
                if code == STOP:
                    if len(self.stack) != 1:
                        raise ValueError("damaged description: it must leave one value")
                    return self.stack[0]
                if code in INTEGERS:
                    self.integers(code)
                    continue
                action = act.get(code)
                if action is None:
                    raise ValueError(f"must be plain content, got pickle instruction {code:#04x}")
                action(self)
        except (IndexError, struct.error):
            raise ValueError("damaged description: it is cut off") from None
        except (TypeError, AttributeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"damaged description: {error}") from None

    def integers(self, code: int) -> None:
        """Push a run of integers: token ids come by the million."""
        text, at, push = self.text, self.at, self.stack.append
        memory = 0
        while (width := INTEGERS.get(code)) is not None:
            piece = text[at : at + width]
            if len(piece) < width:
                raise IndexError
            push(int.from_bytes(piece, "little", signed=width == 4))
            memory += OBJECT if width > 1 else POINTER  # Python has small ones once
            at += width
            code = text[at]
            at += 1
        self.at = at - 1
        self.spend(memory)

    def take(self, count: int) -> bytes:
        """Take so many bytes of the text."""
        found = self.text[self.at : self.at + count]
        if len(found) < count:
            raise IndexError
        self.at += count
        return found

    def number(self, count: int, *, signed: bool = False) -> int:
        """Take an integer of so many bytes."""
        return int.from_bytes(self.take(count), "little", signed=signed)

    def line(self) -> str:
        """Take a line."""
        end = self.text.index(b"\n", self.at) if b"\n" in self.text[self.at : self.at + 512] else -1
        if end < 0:
            raise IndexError
        found = self.text[self.at : end].decode()
        self.at = end + 1
        return found

    def marked(self) -> list[Any]:
        """Pop everything down to the last mark."""
        for depth in range(len(self.stack) - 1, -1, -1):
            if self.stack[depth] is MARK:
                found = self.stack[depth + 1 :]
                del self.stack[depth:]
                return found
        raise IndexError

    def pop(self) -> Any:
        """Pop a value."""
        value = self.stack.pop()
        if value is MARK:
            raise IndexError
        return value

    def append(self, values: list[Any]) -> None:
        """Append to the list on top."""
        target = self.stack[-1]
        if type(target) is not list or id(target) in self.complete:
            raise TypeError("only lists take members, and a container must not hold itself")
        target.extend(values)

    def set(self, pairs: list[Any]) -> None:
        """Set keys of the dict on top."""
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2 or id(target) in self.complete:
            raise TypeError("only dicts take keys, and a container must not hold itself")
        self.spend(CONTAINER * (len(pairs) // 2))
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int | float | bool | None) and not _is_plain(key):
                raise TypeError(f"keys must be texts or numbers, got a {type(key).__name__}")
            target[key] = value

    def name(self, module: str, name: str) -> None:
        """Push what stands for a name, if it is harmless."""
        full = f"{module}.{name}"
        if full not in KNOWN:
            raise ValueError(
                f"asks for {full:.80}, which is no plain content: pickles that call code are not "
                "opened"
            )
        self.push(_Name(full))

    def reduce(self) -> None:
        """Make what a name and its arguments stand for."""
        arguments, callee = self.pop(), self.pop()
        if not isinstance(callee, _Name) or not isinstance(arguments, tuple):
            raise ValueError("asks for a call of what is no name")
        self.push(self.made(callee.text, arguments))

    def made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Make a container or a tensor."""
        if name == ORDERED and not arguments:
            return {}
        if name == SIZE and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            return tuple(arguments[0])
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

    def persistent(self) -> None:
        """Push the storage that a persistent id names."""
        found = self.pop()
        if not isinstance(found, tuple) or len(found) != 5 or found[0] != "storage":
            raise ValueError("persistent ids must be storages")
        _, kind, key, _, count = found
        name = kind.text.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if not isinstance(key, str) or not key.isalnum() or len(key) > 40 or not _is_size(count):
            raise ValueError("a storage must have a key and a size")
        if name not in (*STORAGES, "UntypedStorage"):
            raise ValueError(f"a storage must be of a known type, got {name or 'none'}")
        self.push(_Storage(key, STORAGES.get(name)))

    def build(self) -> None:
        """Drop attributes of a dict, such as the versions of a state dict; nothing else has any."""
        self.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError("asks to change an object that is no dict")


def _is_plain(key: object) -> bool:
    """Whether a tuple has plain members, so that it can be a key."""
    return isinstance(key, tuple) and all(isinstance(k, str | int | float | None) for k in key)


Action = Callable[[_Machine], object]


def _push(make: Callable[[_Machine], Any]) -> Action:
    return lambda machine: machine.push(make(machine))


def _tuple_of(count: int) -> Action:
    def make(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return make


def _put(index: Callable[[_Machine], int]) -> Action:
    return lambda machine: machine.put(index(machine))


def _get(width: int) -> Action:
    return lambda machine: machine.get(machine.number(width))


def _text(width: int) -> Action:
    return _push(lambda machine: machine.take(machine.number(width)).decode("utf-8", "replace"))


def _whole(machine: _Machine) -> int:
    width = machine.number(1)
    return machine.number(width, signed=True) if width else 0


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(str(module), str(name))


STOP = ord(".")
# Bytes of their values; those of four have a sign.
INTEGERS = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
ACTIONS: dict[int, Action] = {
    0x80: lambda m: m.take(1),  # protocol
    0x95: lambda m: m.take(8),  # frame
    ord("("): lambda m: m.push(MARK),
    ord("}"): _push(lambda m: {}),
    ord("]"): _push(lambda m: []),
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.marked())),
    ord("l"): _push(lambda m: m.marked()),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    0x8A: _push(_whole),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("X"): _text(4),
    0x8C: _text(1),
    ord("B"): _push(lambda m: m.take(m.number(4))),
    ord("C"): _push(lambda m: m.take(m.number(1))),
    ord("q"): _put(lambda m: m.number(1)),
    ord("r"): _put(lambda m: m.number(4)),
    0x94: _put(lambda m: len(m.memo)),
    ord("h"): _get(1),
    ord("j"): _get(4),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _stack_global,
    ord("R"): _Machine.reduce,
    ord("Q"): _Machine.persistent,
    ord("b"): _Machine.build,
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.marked()),
    ord("s"): lambda m: m.set([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set(m.marked()),
}


def _unfolded(value: Any, most: int) -> int:
    """Count the values that a container holds, also those that its members hold.

    Raises
    ------
    ValueError
        If they are more than ``most``.
    """
    count, stack = 0, [value]
    while stack:
        node = stack.pop()
        members = node.values() if isinstance(node, dict) else node
        count += 1 + len(node)
        if count > most:
            raise ValueError("description names the same parts too often")
        stack.extend(each for each in members if isinstance(each, dict | list | tuple))
    return count
