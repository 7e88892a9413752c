"""Read files of ``torch.save`` without torch, and without running any code in them.

Such a file is a zip archive: ``data.pkl`` describes containers and tensors, and every storage has
an entry of raw bytes. The description is a programme for pickle's stack machine. Python's unpickler
runs it, but only with instructions that make plain values and fill containers, and with the names
that torch.save writes for containers and tensors. A description that would take far more memory
than it has bytes is refused. Tensors stay in the file until their ``array`` is read.
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
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from moetuner.files import naming, npz, safetensors, size_of
from moetuner.files.opened import Opened
from moetuner.files.safetensors import TensorInFile, is_size

# Most bytes of an archive's description; dumps per token list their tokens there.
LONGEST_PICKLE = 1 << 27
# Bytes of memory that a description may always take.
FREE_BYTES = 1 << 22
# Further bytes that it may take for each of its own: in a list an integer of three bytes takes 48,
# and a container of five or more takes 72.
BYTES_PER_BYTE = 17
# Bytes of memory of a pointer, of a small object, and of a container.
POINTER, OBJECT, CONTAINER = 8, 40, 80
# Most values per byte of a description that names the same part several times.
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
# Element types that are named with the tensor, not with its storage.
UNSIGNED = ("uint16", "uint32", "uint64")
# Errors of pickle for a description that is damaged or cut off.
DAMAGE = (LookupError, EOFError, struct.error, TypeError, AttributeError, UnicodeDecodeError)


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its type and shape, and the place of its elements.

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
        """Read the elements, C-contiguous and in native byte order; bfloat16 becomes float32."""
        stored = _stored(self.dtype)
        place = TensorInFile(stored, (_span(self.shape, self.strides),), self.start)
        flat = safetensors.read(self.path, place)
        steps = tuple(step * stored.itemsize for step in self.strides)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        array = np.ascontiguousarray(view).reshape(self.shape)
        return (array.astype("u4") << 16).view("f4") if self.dtype == BFLOAT else array


def is_pickled(file: Opened) -> bool:
    """Return whether ``torch.save``, of torch 1.6 or newer, wrote a file."""
    start = file.head[:512]
    return start.startswith(ZIP) and DESCRIPTION.encode() in start


def peek(path: Path) -> Any:
    """Read the content of a file; a following ``load`` does not read it again."""
    stat = path.stat()
    return _load(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def load(path: Path) -> Any:
    """Read the content of a file: containers, numbers, texts, and a ``Tensor`` for each tensor."""
    content = peek(path)
    _load.cache_clear()  # a description may take much memory
    return content


@lru_cache(maxsize=1)
def _load(path: Path, *_: int) -> Any:
    with naming(path), npz.open_archive(path, "archive of torch.save") as archive:
        return _Content(path, archive).value()


def _stored(dtype: str) -> np.dtype[Any]:
    return np.dtype("uint16" if dtype == BFLOAT else dtype).newbyteorder("<")


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements in a storage from a tensor's first to its last."""
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

# Allowed instructions, and the bytes of memory that each takes, besides its text.
COSTS = dict.fromkeys(("NONE", "BININT1", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE"), POINTER)
COSTS |= dict.fromkeys(("BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE"), POINTER)
COSTS |= dict.fromkeys(("BININT2", "BININT", "BINFLOAT", "LONG1"), OBJECT)
COSTS |= dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"), OBJECT)
COSTS |= dict.fromkeys(("MARK", "EMPTY_DICT", "EMPTY_LIST", "LIST"), CONTAINER)
COSTS |= dict.fromkeys(("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), CONTAINER)
COSTS |= dict.fromkeys(("REDUCE", "BINPERSID", "GLOBAL", "STACK_GLOBAL"), CONTAINER)
COSTS |= dict.fromkeys(("PROTO", "FRAME", "BUILD", "APPEND", "APPENDS"), 0)
COSTS |= dict.fromkeys(("SETITEM", "SETITEMS", "STOP"), 0)

# Types of keys, and of members of tuples as keys: hashing nested tuples could take forever.
KEYS = (str, int, float, type(None))


@dataclass(frozen=True)
class _Name:
    """A name in a description, with the container or tensor that a call of it makes."""

    text: str
    content: _Content

    def __call__(self, *arguments: Any) -> Any:
        """Make the container or tensor for some arguments."""
        match (self.text, *arguments):
            case ("collections.OrderedDict",):
                return {}
            case ("torch.Size", tuple(sizes)):
                return sizes
            case ("torch.device", *names):
                return ":".join(str(name) for name in names if isinstance(name, str | int))
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


class _Memo(list[Any]):
    """Values that a description refers to by number."""

    def __setitem__(self, number: Any, value: Any) -> None:
        """Set the value of the next number, as picklers do, or of an earlier one."""
        if number > len(self):
            raise ValueError(f"must number its parts one after the other, got {number}")
        super().__setitem__(slice(number, number + 1), [value])


class _Content(pickle._Unpickler):  # written in Python, so that instructions can be replaced
    """The content of an archive: an unpickler of its description with allowed instructions only."""

    # Attributes of the unpickler: values since the last mark, and those below each mark.
    stack: list[Any]
    metastack: list[list[Any]]

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
        self.length, self.memo = len(text), _Memo()
        self.memory = max(FREE_BYTES, BYTES_PER_BYTE * len(text))

    def value(self) -> Any:
        """Run the description, and return the value that it makes."""
        try:
            content = self.load()
        except (*DAMAGE, pickle.UnpicklingError) as error:
            raise ValueError(f"damaged description: {error or 'it is cut off'}") from None
        if self.stack or self.metastack:
            raise ValueError("damaged description: it must leave one value")
        _check_unfolded(content, max(1 << 16, EXPANSION * self.length))
        return content

    def spend(self, size: int) -> None:
        """Count memory; raise if the description takes too much."""
        self.memory -= size
        if self.memory < 0:
            raise ValueError("description makes far more than it has bytes")

    def pop_mark(self) -> list[Any]:
        """Pop and return all values above the last mark."""
        values: list[Any] = super().pop_mark()  # type: ignore[misc]  # not in its stub
        self.spend(POINTER * len(values) - CONTAINER)
        return values

    def load_setitem(self) -> None:
        """Set a key of the dict on top of the stack."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set([key, value])

    def load_setitems(self) -> None:
        """Set several keys of the dict on top of the stack."""
        self.set(self.pop_mark())

    def set(self, pairs: list[Any]) -> None:
        """Set keys of the dict on top of the stack, to the values that follow each of them."""
        if not isinstance(self.stack[-1], dict) or len(pairs) % 2:
            raise TypeError("only dicts take keys")
        self.spend(CONTAINER * (len(pairs) // 2))
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            members = key if isinstance(key, tuple) else (key,)
            if not all(isinstance(member, KEYS) for member in members):
                raise TypeError("keys must be texts or numbers, or tuples of them")
            self.stack[-1][key] = value

    def load_reduce(self) -> None:
        """Call the name on the stack with its tuple of arguments."""
        # Every character of a text would become an argument.
        if not isinstance(self.stack[-1], tuple):
            raise TypeError("arguments must be a tuple")
        super().load_reduce()  # type: ignore[misc]

    def load_build(self) -> None:
        """Drop attributes of a dict, such as the versions of a state dict."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("asks to change an object that is no dict")

    def place(self, name: str) -> tuple[int, int]:
        """Return the first byte and the size of an entry that is not compressed."""
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
        """Read an entry of at most so many bytes."""
        begin, size = self.place(name)
        if size > longest:
            raise ValueError(f"{self.root}{name}: must have at most {longest} bytes, got {size}")
        return safetensors.read(self.path, TensorInFile(np.dtype("u1"), (size,), begin)).tobytes()

    def tensor(self, storage: _Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
        """Make a tensor; raise unless it lies in the entry of its storage."""
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
        """Return a name of a description; raise unless torch.save writes it."""
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


def _restrict(code: int) -> Callable[[Any], None]:
    """Return a function that runs an instruction if it is allowed, and raises otherwise."""

    def refuse(_: _Content) -> None:
        raise ValueError(f"must be plain content, got pickle instruction {code:#04x}")

    def run(content: Any) -> None:
        content.spend(cost)
        getattr(content, method)()

    name = INSTRUCTIONS.get(code)
    if name is None:
        return refuse
    method, cost = pickle._Unpickler.dispatch[code].__name__, COSTS[name]
    return run


INSTRUCTIONS = {getattr(pickle, name)[0]: name for name in COSTS}
_Content.dispatch = {code: _restrict(code) for code in range(256)}


def _check_unfolded(content: Any, limit: int) -> None:
    """Raise if there are too many values, each counted as often as containers hold it."""
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
