"""Base of the package's frozen dataclasses: equality, hash, text and JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from html import escape
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

WIDTH = 100
BREAK = "\n    "
# Largest number of entries of a list or dictionary to show; longer ones show the number alone.
FEW = 8
# Numbers of an array that enter its hash: enough to tell arrays apart, and read quickly.
HASHED = 64

Scalar = TypeVar("Scalar", bound=np.generic)


class Frozen:
    """Base of dataclasses whose fields may hold arrays and dictionaries.

    Two values are equal if all fields are; arrays are compared by their numbers. The text has a few
    lines: it leaves out fields with their defaults, and shows the size of arrays and long lists.
    """

    # Properties that the text shows after the fields.
    _also_shown: ClassVar[tuple[str, ...]] = ()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            _equal(getattr(self, field.name), getattr(other, field.name))
            for field in _fields(self)
            if field.compare
        )

    def __hash__(self) -> int:
        return hash(tuple(_hash(getattr(self, f.name)) for f in _fields(self) if f.compare))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {field.name: as_json(getattr(self, field.name)) for field in _fields(self)}

    def _repr_html_(self) -> str:
        names = [*(field.name for field in _fields(self) if field.repr), *self._also_shown]
        rows = [(name, short(getattr(self, name)).replace(BREAK, " ")) for name in names]
        return html_table(("", type(self).__name__), rows)

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={short(getattr(self, field.name))}"
            for field in _fields(self)
            if field.repr and not _is_default(field, getattr(self, field.name))
        ]
        shown += [f"{name}={short(getattr(self, name))}" for name in self._also_shown]
        text = f"{type(self).__name__}({', '.join(shown)})".replace(BREAK, " ")
        lines = textwrap.wrap(text, WIDTH - 4, break_long_words=False)
        return BREAK.join(lines)


def short(value: Any) -> str:
    """Write a value in a few words; arrays and long lists as their size."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        if len(value) > FEW:
            return f"{{{len(value)} entries}}"
        return "{" + ", ".join(str(key) for key in value) + "}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        if len(value) > FEW:
            return f"[{len(value)} entries]"
        return "[" + ", ".join(short(member) for member in value) + "]"
    return repr(value)


def as_json(value: Any) -> Any:
    """Return a value as JSON has it: fields by name, arrays and tuples as lists."""
    if type(value) in (list, tuple) and set(map(type, value)) <= {float, int}:
        return list(value)  # the loads of a placement are thousands
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [as_json(item) for item in value] if isinstance(value, (tuple, list)) else value


def html_table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Write a table as HTML, for notebooks, with a sentence above it if there is one."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{_cell(value)}</{tag}>" for value in row) + "</tr>"
        for tag, row in (("th", head), *(("td", row) for row in rows))
    ]
    if caption:
        lines.insert(0, f"<caption>{escape(caption)}</caption>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return escape(value if isinstance(value, str) else short(value))


def _fields(value: Any) -> tuple[Field[Any], ...]:
    return fields(value)


def _is_default(field: Field[Any], value: Any) -> bool:
    default = field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    return default is not MISSING and _equal(value, default)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _hash(value: Any) -> int:
    """Return a hash that is the same for values that `_equal` finds equal."""
    if isinstance(value, np.ndarray):
        return hash((value.shape, *value.flat[:HASHED].tolist()))
    if isinstance(value, Mapping):
        return hash(frozenset(value))
    if isinstance(value, (tuple, list)):
        return hash(tuple(map(_hash, value)))
    return hash(value)


def freeze(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """Return a read-only view of an array, which itself stays writable."""
    view = array.view()
    view.flags.writeable = False
    return view
