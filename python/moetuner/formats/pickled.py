"""Files of ``torch.save``, opened without torch and without running anything that is in them.

Such a file is a zip archive: ``data.pkl`` describes containers and tensors, and every storage has
an entry of raw bytes. The description is a programme for pickle's stack machine. Its instructions
are looked through first: those that could call or change anything are refused, and so is what would
take far more memory than the file has bytes. Then Python's own unpickler carries it out, which gets
plain containers, numbers, texts and tensors for what torch.save names, and no other name. Tensors
stay in the file until their ``array`` is read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, npz, replacing, safetensors, size_of
from moetuner.files.safetensors import TensorInFile, is_size
from moetuner.formats.records import head

# Of an archive's description; per-token dumps list their tokens there.
LONGEST_PICKLE = 1 << 27
# Bytes of memory that what is made may take for each byte of the description, beyond some that are
# free: an integer of three bytes takes 40, a container of five or more takes 72.
FREE_BYTES, BYTES_PER_BYTE = 1 << 22, 14
POINTER, OBJECT, CONTAINER = 8, 40, 80
# Values for each byte, where the description names the same part again and again.
EXPANSION = 16
ZIP = b"PK\x03\x04"
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
    "storage.UntypedStorage": "uint8",
}
# Tensors of these types say so themselves.
UNSIGNED = ("uint16", "uint32", "uint64")
# What pickle raises of a damaged description, or by itself where it is cut off.
DAMAGE = (LookupError, EOFError, struct.error, TypeError, AttributeError, UnicodeDecodeError)


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
        stored = _stored(self.dtype)
        place = TensorInFile(stored, (_span(self.shape, self.strides),), self.start)
        flat = safetensors.read(self.path, place)
        steps = tuple(step * stored.itemsize for step in self.strides)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        array = np.ascontiguousarray(view).reshape(self.shape)
        return (array.astype("u4") << 16).view("f4") if self.dtype == BFLOAT else array


def is_pickled(path: Path) -> bool:
    """Whether a file is one of ``torch.save``, as it is written since 1.6."""
    start = head(path, 512)
    return start.startswith(ZIP) and DESCRIPTION.encode() in start


def peek(path: Path) -> Any:
    """Read what was saved, to see what it is; ``load`` will not read it again."""
    stat = path.stat()
    return _load(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def load(path: Path) -> Any:
    """Read what was saved: containers, numbers, texts, and a ``Tensor`` for each tensor."""
    content = peek(path)
    _load.cache_clear()  # a description may take much memory
    return content


@lru_cache(maxsize=1)
def _load(path: Path, *_: int) -> Any:
    with naming(path), npz.open_archive(path, "archive of torch.save") as archive:
        return _Content(path, archive).read()


def save(path: Path, name: str, array: NDArray[np.int64], **texts: str) -> None:
    """Write a dict of one tensor of 64-bit integers, and of texts, as ``torch.save`` does."""
    array = np.ascontiguousarray(array, dtype="<i8")
    storage = b"(" + _pickled("storage") + b"ctorch\nLongStorage\n" + _pickled("0", "cpu")
    storage += _pickled(array.size) + b"tQ"
    strides = [step // array.itemsize for step in array.strides]
    # The dict, its key, the tensor's maker with its arguments, and the end.
    text = b"\x80\x02}" + _pickled(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    text += _pickled(0) + b"(" + _pickled(*array.shape) + b"t(" + _pickled(*strides) + b"t\x89"
    text += b"ccollections\nOrderedDict\n)RtRs"
    text += b"".join(_pickled(key, value) + b"s" for key, value in texts.items()) + b"."
    entries = {DESCRIPTION: text, "byteorder": b"little", "data/0": array.tobytes()}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for entry, content in {**entries, "version": b"3\n"}.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{entry}"), content)


def _pickled(*values: str | int) -> bytes:
    """Write texts and integers as instructions of a description."""
    return b"".join(
        b"X" + struct.pack("<I", len(value)) + value.encode("ascii")
        if isinstance(value, str)
        else b"\x8a\x08" + struct.pack("<q", value)
        for value in values
    )


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype("uint16" if dtype == BFLOAT else dtype).newbyteorder("<")


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return elements of a storage from a tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))


class _Storage(NamedTuple):
    """Raw bytes of tensors: the key of their entry, and their type."""

    key: str
    dtype: str


NAMES = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size"}
NAMES |= {"torch._utils._rebuild_tensor_v3", "collections.OrderedDict", "torch.device"}
NAMES |= {f"torch.{name}" for name in (*STORAGES, *UNSIGNED)}

# Instructions that are carried out, and bytes of memory of what each makes, beside its text.
COSTS = dict.fromkeys(("NONE", "BININT1", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE"), POINTER)
COSTS |= dict.fromkeys(("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"), POINTER)
COSTS |= dict.fromkeys(("BININT2", "BININT", "BINFLOAT", "LONG1"), OBJECT)
COSTS |= dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"), OBJECT)
COSTS |= dict.fromkeys(("MARK", "EMPTY_DICT", "EMPTY_LIST", "LIST"), CONTAINER)
COSTS |= dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), CONTAINER)
COSTS |= dict.fromkeys(("REDUCE", "BINPERSID", "GLOBAL", "STACK_GLOBAL"), CONTAINER)
COSTS |= dict.fromkeys(("PROTO", "FRAME", "BUILD", "APPEND", "APPENDS"), 0)
COSTS |= dict.fromkeys(("SETITEM", "SETITEMS", "STOP"), 0)

# Kinds of values, as far as it matters what may be done with them: what a dict takes as a key, flat
# tuples of that, dicts, and what makes a dict. The texts that name that maker are their own kinds.
KEY, FLAT, DICT, MAKER, OTHER = "key", "flat", "dict", "maker", "other"
MAKER_NAME = ("collections", "OrderedDict")
KINDS = {
    **dict.fromkeys(("NONE", "BININT1", "BININT2", "BININT", "LONG1"), KEY),
    **dict.fromkeys(("NEWTRUE", "NEWFALSE", "BINFLOAT"), KEY),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "EMPTY_LIST"), OTHER),
    "EMPTY_DICT": DICT,
    "EMPTY_TUPLE": FLAT,
}
IS_KEY = {KEY, *MAKER_NAME}
SIZES_OF_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _instructions(description: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(description)
    except ValueError as error:
        raise ValueError(f"damaged description: {error}") from None


class _Outline:
    """What the instructions of a description would do, in kinds of values: nothing is made."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.stack: list[str] = []
        self.below: list[list[str]] = []  # stacks below marks
        self.memo: list[str] = []

    def check(self, description: bytes) -> None:
        """Follow instruction after instruction, up to the last."""
        for opcode, argument, _ in _instructions(description):
            if opcode.name not in COSTS:
                code = ord(opcode.code)
                raise ValueError(f"must be plain content, got pickle instruction {code:#04x}")
            self.spend(COSTS[opcode.name])
            self.follow(opcode.name, argument)
        if len(self.stack) != 1 or self.below:
            raise ValueError("damaged description: it must leave one value")

    def follow(self, name: str, argument: Any) -> None:
        """Follow an instruction."""
        if name in KINDS:
            self.stack.append(KINDS[name])
        elif name in ("BINUNICODE", "SHORT_BINUNICODE"):
            self.stack.append(argument if argument in MAKER_NAME else KEY)
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.remember(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("TUPLE", "LIST", "APPENDS", "SETITEMS"):
            self.collect(name, self.pop_mark())
        elif name in SIZES_OF_TUPLES:
            self.collect("TUPLE", [self.stack.pop() for _ in range(SIZES_OF_TUPLES[name])])
        elif name == "SETITEM":
            self.set([self.stack.pop(), self.stack.pop()][::-1])
        elif name == "APPEND":
            self.stack.pop()
        elif name == "BUILD":
            self.stack.pop()
            if self.stack[-1] != DICT:
                raise ValueError("asks to change an object that is no dict")
        elif name not in ("PROTO", "FRAME", "STOP"):
            self.make(name, argument)

    def make(self, name: str, argument: Any) -> None:
        """Follow what names something, or makes what a name stands for."""
        if name == "GLOBAL":
            self.stack.append(MAKER if argument == " ".join(MAKER_NAME) else OTHER)
        elif name == "STACK_GLOBAL":
            pair = self.stack.pop(), self.stack.pop()
            self.stack.append(MAKER if pair[::-1] == MAKER_NAME else OTHER)
        elif name == "REDUCE":
            self.stack.pop()
            self.stack.append(DICT if self.stack.pop() == MAKER else OTHER)
        else:  # BINPERSID
            self.stack.pop()
            self.stack.append(OTHER)

    def spend(self, size: int) -> None:
        """Count memory of what would be made."""
        self.memory -= size
        if self.memory < 0:
            raise ValueError("description makes far more than it has bytes")

    def remember(self, number: int) -> None:
        """Remember the value on top by a number: the next one, as picklers do, or a known one."""
        if number > len(self.memo):
            raise ValueError(f"must number its parts one after the other, got {number}")
        self.memo[number : number + 1] = [self.stack[-1]]

    def pop_mark(self) -> list[str]:
        """Pop everything down to the last mark, which was a container."""
        values, self.stack = self.stack, self.below.pop()
        self.spend(POINTER * len(values) - CONTAINER)
        return values

    def collect(self, name: str, values: list[str]) -> None:
        """Follow what makes or fills a container."""
        if name == "SETITEMS":
            self.set(values)
        elif name == "TUPLE":
            self.stack.append(FLAT if IS_KEY.issuperset(values) else OTHER)
        elif name == "LIST":
            self.stack.append(OTHER)

    def set(self, pairs: list[str]) -> None:
        """Follow what sets keys of the dict on top."""
        if self.stack[-1] != DICT or len(pairs) % 2:
            raise TypeError("only dicts take keys")
        self.spend(CONTAINER * (len(pairs) // 2))
        # The hash of a tuple of tuples could take forever.
        if not {FLAT, *IS_KEY}.issuperset(pairs[::2]):
            raise TypeError("keys must be texts or numbers, or tuples of them")


@dataclass(frozen=True)
class _Name:
    """What a description may name: it stands for no more than its name, and for what that makes."""

    text: str
    content: _Content

    def __call__(self, *arguments: Any) -> Any:
        """Make the container or tensor that a name and its arguments stand for."""
        match (self.text, *arguments):
            case ("collections.OrderedDict",):
                return _Dict()
            case ("torch.Size", tuple(sizes)):
                return sizes
            case ("torch.device", *parts):
                return ":".join(str(part) for part in parts if isinstance(part, str | int))
            case ("torch._utils._rebuild_parameter", Tensor() as tensor, *_):
                return tensor
            case (
                "torch._utils._rebuild_tensor_v2",
                _Storage() as storage,
                start,
                shape,
                strides,
                *_,
            ):
                return self.content.tensor(storage, start, shape, strides)
            case ("torch._utils._rebuild_tensor_v3", _Storage(key=key), *rest):
                start, shape, strides, _, _, dtype, *_ = rest
                if dtype.text.removeprefix("torch.") in UNSIGNED:
                    storage = _Storage(key, dtype.text.removeprefix("torch."))
                    return self.content.tensor(storage, start, shape, strides)
        raise ValueError(f"asks for a call of {self.text} that torch.save does not write")


class _Dict(dict[Any, Any]):
    """An ordered dict of torch.save, without attributes, such as the versions of a state dict."""

    def __setstate__(self, state: object) -> None:
        """Drop attributes."""


class _Content(pickle.Unpickler):
    """The content of an archive: its description, which the outline has let through, unpickled."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.size, self.archive = path, size_of(path), archive
        descriptions = [name for name in archive.namelist() if name.endswith(DESCRIPTION)]
        if len(descriptions) != 1:
            raise ValueError(
                f"must have one {DESCRIPTION} as torch.save writes it, got {len(descriptions)}"
            )
        self.root = descriptions[0].removesuffix(DESCRIPTION)
        order = self.root + "byteorder"
        if order in archive.namelist() and self.entry("byteorder", 16)[:6] != b"little":
            raise ValueError("byteorder must be little: write it anew on such a machine")
        text = self.entry(DESCRIPTION, LONGEST_PICKLE)
        super().__init__(io.BytesIO(text))
        self.text = text

    def read(self) -> Any:
        """Look through the description, and then carry it out."""
        try:
            _Outline(max(FREE_BYTES, BYTES_PER_BYTE * len(self.text))).check(self.text)
            content = self.load()
        except (*DAMAGE, pickle.UnpicklingError) as error:
            raise ValueError(f"damaged description: {error or 'it is cut off'}") from None
        _check_unfolded(content, max(1 << 16, EXPANSION * len(self.text)))
        return content

    def place(self, name: str) -> tuple[int, int]:
        """Return first byte and number of bytes of an entry: plain bytes of the file."""
        try:
            info = self.archive.getinfo(self.root + name)
        except KeyError:
            raise ValueError(f"must have an entry {self.root}{name}") from None
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{info.filename}: must not be compressed, as torch.save writes it")
        with self.archive.open(info):
            begin = cast(IO[bytes], self.archive.fp).tell()  # after the entry's own header
        if begin + info.file_size > self.size:
            raise ValueError(
                f"{info.filename}: must end within the file's {self.size} bytes, "
                f"got {begin + info.file_size}"
            )
        return begin, info.file_size

    def entry(self, name: str, longest: int) -> bytes:
        """Read an entry."""
        begin, size = self.place(name)
        if size > longest:
            raise ValueError(f"{self.root}{name}: must have at most {longest} bytes, got {size}")
        return safetensors.read(self.path, TensorInFile(np.dtype("u1"), (size,), begin)).tobytes()

    def tensor(self, storage: _Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
        """Check a tensor against the entry of its storage."""
        key, dtype = storage
        are_tuples = isinstance(shape, tuple) and isinstance(strides, tuple)
        if not are_tuples or not all(map(is_size, (offset, *shape, *strides))):
            raise ValueError("offset, size and stride of a tensor must be sizes")
        if len(shape) != len(strides) or len(shape) > 16:
            raise ValueError("size and stride of a tensor must fit together")
        begin, size = self.place(f"data/{key}")
        width = _stored(dtype).itemsize
        needed = max(offset + _span(shape, strides), prod(shape))
        if prod(shape) and needed > size // width:
            raise ValueError(
                f"storage {key} must have {needed} {dtype} for a tensor {list(shape)}, "
                f"got {size // width}"
            )
        return Tensor(self.path, dtype, shape, strides, begin + offset * width)

    def find_class(self, module: str, name: str) -> _Name:
        """Return what stands for a name, if it is harmless."""
        text = f"{module}.{name}"
        if text not in NAMES:
            raise ValueError(
                f"asks for {text:.80}, which is no plain content: pickles that call code are not "
                "opened"
            )
        return _Name(text, self)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a persistent id names."""
        match pid:
            case ("storage", _Name(text=text), str(key), _, _) if key.isalnum() and len(key) <= 40:
                dtype = STORAGES.get(text.removeprefix("torch."))
                if dtype is not None:
                    return _Storage(key, dtype)
        raise ValueError("persistent ids must be storages with a type and a key")


def _check_unfolded(content: Any, limit: int) -> None:
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
        if counts[id(node)] > limit:
            raise ValueError("description names the same parts too often")
        stack.pop()
