"""Labels of tokens or windows: sequence and group numbers, names of groups, sizes of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._validation import array_in, shown, whole_number

Scalar = TypeVar("Scalar", bound=np.generic)
Integer = TypeVar("Integer", np.int16, np.int32, np.int64)

PIECE = 1 << 20


def labels(name: str, values: ArrayLike, length: int, dtype: type[Integer]) -> NDArray[Integer]:
    """Check one integer label per token or window [length] and hold it as ``dtype``, read-only.

    Raises
    ------
    ValueError
        If the values are not integers, not that many, or do not fit ``dtype``.
    """
    array = array_in(name, values)
    if array.shape != (length,) or (array.dtype.kind not in "iu" and length):
        raise ValueError(
            f"{name} must be integers [{length}], got {array.dtype} {list(array.shape)}"
        )
    limits = np.iinfo(dtype)
    if length and not (limits.min <= int(array.min()) and int(array.max()) <= limits.max):
        raise ValueError(
            f"{name} must be from {limits.min} to {limits.max}, got {array.min()} to {array.max()}"
        )
    return frozen(np.ascontiguousarray(array, dtype=dtype))


def names(values: Iterable[str] | None) -> tuple[str, ...]:
    """Check the names of groups: texts that differ.

    Raises
    ------
    ValueError
        If a name is not a text or occurs twice, or if ``values`` is one text instead of several.
    """
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"group_names must be a list of names, got {shown(values)}")
    found = tuple(value.item() if isinstance(value, np.str_) else value for value in values)
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"group_names must be texts, got {shown(name)}")
    if len(set(found)) < len(found):
        twice = next(name for at, name in enumerate(found) if name in found[:at])
        raise ValueError(f"group_names must differ, got {twice!r} twice")
    return found


def groups(
    values: ArrayLike, length: int, group_names: tuple[str, ...], dtype: type[Integer]
) -> NDArray[Integer]:
    """Check group numbers [length]: each is an index into the names.

    Raises
    ------
    ValueError
        If a number has no name.
    """
    array = labels("group", values, length, dtype)
    if length and (array.min() < 0 or array.max() >= len(group_names)):
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(
            f"group must be from 0 to {len(group_names) - 1}, an index into group_names, "
            f"got {wrong} at {int(np.argmax(array == wrong))}"
        )
    return array


def distinct(values: NDArray[Integer]) -> NDArray[Integer]:
    """Labels that occur, in ascending order; in pieces, since numpy alone takes much memory."""
    pieces: list[NDArray[Integer]] = [
        np.unique(values[at : at + PIECE]) for at in range(0, len(values), PIECE)
    ]
    return np.unique(np.concatenate([values[:0], *pieces]))


def among(values: NDArray[Integer], wanted: ArrayLike) -> NDArray[np.bool_]:
    """Whether each label is one of those wanted; in pieces."""
    found = np.empty(len(values), dtype=np.bool_)
    for at in range(0, len(values), PIECE):
        found[at : at + PIECE] = np.isin(values[at : at + PIECE], wanted)
    return found


def numbered(group: ArrayLike) -> list[str]:
    """Names for groups that have none: their numbers."""
    array = array_in("group", group)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"group must be integers, got {array.dtype} {list(array.shape)}")
    count = max(int(array.max(initial=0)) + 1, 1)
    if count > 1 << 15:
        raise ValueError(f"group must be below {1 << 15}, got {count - 1}")
    return [str(number) for number in range(count)]


def joined_sequences(parts: list[NDArray[np.int32] | None]) -> NDArray[np.int64] | None:
    """Sequence labels of traces one after the other, moved up where they would come back.

    Where moving up leaves 32 bits, all are numbered anew, from 0.
    """
    known: list[NDArray[np.int64]] = []
    for part in parts:
        if part is None:
            return None
        moved = part.astype(np.int64)
        if any(np.isin(moved, before).any() for before in known):
            highest = max(int(before.max(initial=-1)) for before in known)
            moved += highest + 1 - int(moved.min())
        known.append(moved)
    if max((int(wide.max(initial=0)) for wide in known), default=0) > np.iinfo(np.int32).max:
        first = 0
        for at, wide in enumerate(known):
            found = np.unique(wide)
            known[at] = np.searchsorted(found, wide) + first
            first += len(found)
    return np.concatenate(known)


def joined_groups(
    parts: list[tuple[NDArray[Any] | None, tuple[str, ...]]], group_names: tuple[str, ...]
) -> NDArray[np.int64] | None:
    """Group numbers of traces one after the other, as indices into the joint names."""
    known: list[NDArray[np.int64]] = []
    for part, its_names in parts:
        if part is None:
            return None
        number = np.asarray([group_names.index(name) for name in its_names], dtype=np.int64)
        known.append(number[part])
    return np.concatenate(known)


def frozen(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """Give a read-only view; the owner of the memory keeps its own rights."""
    view = array.view()
    view.flags.writeable = False
    return view


def expert_size(given: Any) -> tuple[int, int] | None:
    """Return hidden and intermediate size of an expert, checked; None as it is."""
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"expert_size must be (hidden, intermediate), got {shown(given)}")
    hidden, intermediate = (whole_number("expert_size", each, highest=1 << 24) for each in given)
    return hidden, intermediate


def size_text(size: tuple[int, int] | None) -> str | None:
    """Return a size as files write it: hidden x intermediate."""
    return None if size is None else f"{size[0]}x{size[1]}"


def size_of(text: str | None) -> tuple[int, int] | None:
    """Read what ``size_text`` wrote."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,8})x(\d{1,8})", text, re.ASCII)
    if found is None:
        raise ValueError(f"expert_size must be as in 4096x1024, got {text!r:.40}")
    return expert_size((int(found[1]), int(found[2])))
