"""Checks of arguments: classes, choices, numbers, arrays, labels, and expert ids.

A wrong value raises ArgumentError, which is a ValueError, a value of a wrong class TypeError. The
message names the argument, the rule and the value.
"""

from __future__ import annotations

import math
import operator
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner import _core
from moetuner._texts import suggestion
from moetuner.frozen import freeze

IdArray = NDArray[np.uint8] | NDArray[np.uint16]
IdType = np.dtype[np.uint8] | np.dtype[np.uint16]

U8, U16 = np.dtype(np.uint8), np.dtype(np.uint16)
LARGEST_INT = (1 << 63) - 1
LAYER_LIMIT = 1 << 16
EXPERT_LIMIT = 1 << 16
# Devices of a topology, whose tables hold all pairs of devices.
DEVICE_LIMIT = 1 << 13
# Slots of a layer on all devices together, each device as wide as the widest.
SLOT_LIMIT = 1 << 16
# Cells of a table of layers, experts and devices.
CELL_LIMIT = 1 << 28
# Threads of an argument; the extension starts at most four for each processor core.
THREAD_LIMIT = 1 << 10
# Limits of times, sizes and rates, in any unit, so that no product or quotient is infinite.
SMALLEST, LARGEST = 1e-30, 1e30
# Largest numbers of characters of a value in a message, and of a path.
SHOWN, LONGEST_PATH = 40, 4096
PLAIN = (str, bytes, int, float, complex, list, tuple, dict, set, type, type(None), np.generic)


# Representation of a value that reads only the beginning of a long one.
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 2 * SHOWN
SHORT.maxlist = SHORT.maxtuple = SHORT.maxset = SHORT.maxdict = SHOWN // 2
SHORT.maxlevel = 4


class ArgumentError(ValueError):
    """An error in arguments, whose names are in the message.

    Parameters
    ----------
    text
        The message.
    arguments
        Names of arguments in the message, in their order: a caller that has other names for them,
        as the options of a command, replaces them, see ``renamed``.
    place
        The file of the wrong value, written in front of the message.
    """

    def __init__(self, text: str, *arguments: str, place: str = "") -> None:
        super().__init__(f"{place}: {text}" if place else text)
        self.text, self.arguments, self.place = text, arguments, place

    def renamed(self, names: Mapping[str, str]) -> str:
        """Return the message with its arguments renamed, each at its first place."""
        text = self.text
        for argument in self.arguments:
            name = argument.partition(":")[0]  # as in "pinned: expert"
            text = re.sub(rf"\b{name}\b", names.get(name, name), text, count=1)
        return f"{self.place}: {text}" if self.place else text


class MissingArgumentError(ArgumentError):
    """An error for a value that the file lacks, so that an argument must give it."""


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def shown(value: object) -> str:
    """Write a value in one short line, for a message."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if not isinstance(value, PLAIN):
        return _with_article(type(value).__name__)
    try:
        text = " ".join(SHORT.repr(value).split())
    except ValueError:  # a number of thousands of digits
        return _with_article(type(value).__name__)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def instance(name: str, value: object, *kinds: type, hint: str = "") -> None:
    """Raise TypeError for a value of another class; ``hint`` says how to make one."""
    if not isinstance(value, kinds):
        wanted = _with_article(" or ".join(kind.__name__ for kind in kinds))
        raise TypeError(f"{name} must be {wanted}{hint}, got {shown(value)}")


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise for a value that is none of the choices."""
    names = tuple(choices)
    if not (isinstance(value, str) and value in names):
        hint = suggestion(value, names)
        raise ArgumentError(
            f"{name} must be one of {', '.join(names)}, got {shown(value)}{hint}", name
        )


def flag(name: str, value: object) -> None:
    """Raise TypeError for a value that is not True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def text_or_none(name: str, value: object) -> None:
    """Raise for a value that is neither a text nor None."""
    if value is not None and not isinstance(value, str):
        raise ArgumentError(f"{name} must be a text, got {shown(value)}", name)


def path_in(path: object) -> Path:
    """Return the path of a file, checked."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the name of a file, got {shown(path)}")
    text = str(path)
    if len(text) > LONGEST_PATH or "\0" in text:
        raise ValueError(
            f"path must have at most {LONGEST_PATH} letters, none of them zero, got {shown(text)}"
        )
    return Path(cast(Any, path))


def listed(name: str, values: object, what: str) -> list[Any]:
    """Return the members of a list; raise for what is no list."""
    try:
        return list(cast(Any, None if isinstance(values, str | bytes) else values))
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be a list of {what}, got {shown(values)}", name) from None


def chosen(name: str, numbers: object, count: int, what: str = "devices") -> NDArray[np.bool_]:
    """Return the mask [count] of the members whose numbers are listed."""
    named = np.zeros(count, dtype=bool)
    for number in listed(name, numbers, what):
        named[whole_number(name, number, lowest=0, highest=count - 1)] = True
    return named


def callable_or_none(name: str, value: object) -> None:
    """Raise TypeError for a value that is neither a function nor None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")


def array_in(name: str, values: ArrayLike) -> NDArray[Any]:
    """Return an array of any type; raise for masked values, and for what is no array."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ArgumentError(f"{name} must have no masked values, got {shown(values)}", name)
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        # The error of another library's tensor says how to turn it into an array.
        why = f": {str(error).strip().splitlines()[0]}" if hasattr(values, "__array__") else ""
        raise ArgumentError(f"{name} must be an array, got {shown(values)}{why}", name) from None


def numbers_in(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return an array of numbers of any type as floats."""
    array = array_in(name, values)
    if array.dtype.kind not in "iuf" and array.size:
        raise ArgumentError(f"{name} must be numbers, got {shown(array)}", name)
    with np.errstate(over="ignore"):
        return array.astype(np.float64, copy=False)


def amounts_in(name: str, values: ArrayLike, axes: int = 0) -> NDArray[np.float64]:
    """Return an array of finite floats of at least 0, with at least a number of axes."""
    array = numbers_in(name, values)
    if array.ndim < axes:
        raise ArgumentError(
            f"{name} must be an array of {axes} axes or more, got {array.ndim}", name
        )
    if not ((array >= 0) & (array < np.inf)).all():
        ends = f"{array.min():g} to {array.max():g}"
        raise ArgumentError(f"{name} must be finite numbers of at least 0, got {ends}", name)
    return array


def seed_in(seed: object, name: str = "seed") -> int:
    """Return a seed, checked."""
    return whole_number(name, seed, lowest=0)


def nth_seed(seed: int, number: int) -> int:
    """Return the seed that is a number of places after another; after the largest comes 0."""
    return (seed + number) % (1 << 63)


def threads_in(threads: object) -> int | None:
    """Return a number of threads, checked; None stands for all cores."""
    return None if threads is None else whole_number("threads", threads, highest=THREAD_LIMIT)


def window_in(window: object) -> int | None:
    """Return the tokens of a window, checked; None stands for all tokens."""
    return None if window is None else whole_number("window", window)


def experts_in(num_experts: object, name: str = "num_experts") -> int:
    """Return a number of experts per layer, checked."""
    return whole_number(name, num_experts, highest=EXPERT_LIMIT)


def whole_number(name: str, value: object, *, lowest: int = 1, highest: int = LARGEST_INT) -> int:
    """Return an integer from ``lowest`` to ``highest``, checked."""
    try:
        # An array has the method of integers, with any contents.
        number = operator.index(cast(Any, None if isinstance(value, bool | np.ndarray) else value))
    except TypeError:
        raise ArgumentError(f"{name} must be an integer, got {shown(value)}", name) from None
    if not lowest <= number <= highest:
        limits = f"at least {lowest}" if number < lowest else f"at most {highest}"
        if highest < LARGEST_INT:
            limits = f"from {lowest} to {highest}"
        raise ArgumentError(f"{name} must be {limits}, got {shown(number)}", name)
    return number


def check_slots(devices: int, slots_per_device: int, layers: int = 1) -> None:
    """Raise for too many slots, before anything of that size is made."""
    for count, limit, where in ((layers, CELL_LIMIT, ""), (1, SLOT_LIMIT, " in a layer")):
        if count * devices * slots_per_device > limit:
            of_layers = f" in {layers} layers" if not where else ""
            raise ArgumentError(
                f"slots_per_device must make at most {limit} slots{where}, "
                f"got {slots_per_device} on {devices} devices{of_layers}",
                "slots_per_device",
            )


def check_sizes(shape: tuple[int, ...], dtype: np.dtype[np.generic], num_experts: int) -> None:
    """Raise for ids whose type or sizes [T,L,K] are wrong."""
    if len(shape) != 3 or dtype.kind not in "iu":
        raise ValueError(
            f"expert_ids must be integers [tokens, layers, top_k], got {dtype} {list(shape)}"
        )
    tokens, layers, top_k = shape
    if layers > LAYER_LIMIT or tokens >= 1 << 48:
        raise ValueError(f"expert_ids must have at most {LAYER_LIMIT} layers, got {list(shape)}")
    # The core checks the other sizes, which it does for a trace without tokens, too.
    _core.validate(np.empty((0, layers, min(top_k, LAYER_LIMIT + 1)), dtype=U8), num_experts)


def valid(
    ids: NDArray[np.generic], num_experts: int, first_token: int = 0, threads: int | None = None
) -> IdArray:
    """Return integer ids [T,L,K] as C-contiguous uint8 or uint16, validated."""
    dtype = id_type(ids.dtype, num_experts)
    numbers = cast("NDArray[np.integer[Any]]", ids)
    if ids.dtype != dtype and ids.size and not 0 <= numbers.min() <= numbers.max() < num_experts:
        token, layer, k = np.argwhere((numbers < 0) | (numbers >= num_experts))[0]
        value = int(numbers[token, layer, k])
        rule = "negative" if value < 0 else f"not below num_experts {num_experts}"
        raise ValueError(
            f"expert_ids: token {first_token + token}, layer {layer}: expert id {value} is {rule}"
        )
    checked = cast(IdArray, np.ascontiguousarray(ids, dtype=dtype))
    _core.validate(checked, num_experts, first_token, threads)
    return checked


def id_type(dtype: np.dtype[np.generic], num_experts: int) -> IdType:
    """Return the type for ids: uint8 and uint16 as they are, else the smaller one that fits."""
    if dtype in (U8, U16):
        return U8 if dtype == U8 else U16
    return U8 if num_experts <= 256 else U16


def per_device(name: str, values: Any, devices: int) -> list[Any]:
    """Return one number for every device, checked."""
    array = array_in(name, values)
    if array.shape != (devices,) or array.dtype.kind not in "iuf":
        raise ArgumentError(
            f"{name} must be numbers [{devices}], one per device, got {shown(array)}", name
        )
    numbers: list[Any] = array.tolist()
    return numbers


def positive(name: str, value: object, what: str = "number") -> float:
    """Return a number above 0 as a Python number; ``what`` is its unit."""
    if not (is_number(value) and value > 0):
        raise ArgumentError(f"{name} must be a positive {what}, got {shown(value)}", name)
    if not SMALLEST <= float(value) <= LARGEST:
        raise ArgumentError(
            f"{name} must be a {what} from 1e-30 to 1e+30, got {shown(value)}", name
        )
    return float(value) if isinstance(value, np.generic) else value


def not_negative(name: str, value: object, what: str) -> float:
    """Return a number of at least 0 as a Python number; ``what`` is its unit."""
    if not (is_number(value) and value >= 0):
        raise ArgumentError(f"{name} must be a {what} of at least 0, got {shown(value)}", name)
    if float(value) > LARGEST:
        raise ArgumentError(
            f"{name} must be a {what} of at most {LARGEST:g}, got {shown(value)}", name
        )
    return float(value) if isinstance(value, np.generic) else value


def share(name: str, value: object) -> float:
    """Return a number from 0 to 1 as a Python number."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ArgumentError(f"{name} must be a share from 0 to 1, got {shown(value)}", name)
    return float(value) if isinstance(value, np.generic) else value


def at_least(name: str, value: object, lowest: float, unit: str = "") -> None:
    """Raise for a number below ``lowest``; infinity is allowed."""
    is_infinite = isinstance(value, float | np.floating) and value == math.inf
    if not (is_infinite or (is_number(value) and value >= lowest)):
        raise ArgumentError(f"{name} must be at least {lowest:g}{unit}, got {shown(value)}", name)


def number_or_none(name: str, value: object) -> None:
    """Raise for a value that is neither a finite number nor None."""
    if value is not None and not is_number(value):
        raise ArgumentError(f"{name} must be a finite number, got {shown(value)}", name)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and not a truth value."""
    # NumPy's time spans are a subclass of its integers.
    if isinstance(value, bool | np.timedelta64):
        return False
    if not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


Integer = TypeVar("Integer", np.int16, np.int32, np.int64)


def labels(name: str, values: ArrayLike, length: int, dtype: type[Integer]) -> NDArray[Integer]:
    """Return one integer label per token or window [length] as ``dtype``, checked and read-only."""
    array = array_in(name, values)
    if array.shape != (length,) or (array.dtype.kind not in "iu" and length):
        raise ArgumentError(f"{name} must be integers [{length}], got {shown(array)}", name)
    limits = np.iinfo(dtype)
    if length and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise ArgumentError(
            f"{name} must be from {limits.min} to {limits.max}, got {array.min()} to {array.max()}",
            name,
        )
    return freeze(np.ascontiguousarray(array, dtype=dtype))


def names(values: Iterable[str] | None) -> tuple[str, ...]:
    """Return the names of groups, distinct texts, checked."""
    if values is None:
        return ()
    texts: dict[str, None] = {}
    for name in listed("group_names", values, "names"):
        if not isinstance(name, str):
            raise ValueError(f"group_names must be texts, got {shown(name)}")
        if name in texts:
            raise ValueError(f"group_names must differ, got {shown(name)} twice")
        texts[str(name)] = None
    return tuple(texts)


def groups(
    values: ArrayLike, length: int, group_names: tuple[str, ...], dtype: type[Integer]
) -> NDArray[Integer]:
    """Return group numbers [length], indices into the names, checked."""
    array = labels("group", values, length, dtype)
    if length and (array.min() < 0 or array.max() >= len(group_names)):
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(
            f"group must be from 0 to {len(group_names) - 1}, an index into group_names, "
            f"got {wrong} at {int(np.argmax(array == wrong))}"
        )
    return array


def name_groups(group: ArrayLike) -> list[str]:
    """Return the numbers of groups as their names, for groups without names."""
    array = array_in("group", group)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"group must be integers, got {shown(array)}")
    count = max(int(array.max(initial=0)) + 1, 1)
    if count > 1 << 15:
        raise ValueError(f"group must be below {1 << 15}, got {count - 1}")
    return [str(number) for number in range(count)]


def expert_size(sizes: Any) -> tuple[int, int] | None:
    """Return hidden and intermediate size of an expert, checked; None stays None."""
    if sizes is None:
        return None
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        raise ValueError(f"expert_size must be (hidden, intermediate), got {shown(sizes)}")
    hidden, intermediate = (whole_number("expert_size", size, highest=1 << 24) for size in sizes)
    return hidden, intermediate


def format_size(size: tuple[int, int] | None) -> str | None:
    """Write the size of an expert for files: hidden x intermediate."""
    return None if size is None else f"{size[0]}x{size[1]}"


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Read what ``format_size`` wrote."""
    if text is None:
        return None
    sizes = re.fullmatch(r"(\d{1,8})x(\d{1,8})", text, re.ASCII)
    if sizes is None:
        raise ValueError(f"expert_size must be as in 4096x1024, got {shown(text)}")
    return expert_size((int(sizes[1]), int(sizes[2])))
