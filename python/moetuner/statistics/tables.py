"""Tables of counts: whole, unsigned, and as narrow as they can be."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetuner import _checks as check

Loads = NDArray[np.unsignedinteger[Any]]

# Size in 64 bits beyond which loads, of thousands of windows, are held in narrower types.
NARROW_BYTES = 64 << 20


def check_counts(name: str, table: Any, dimensions: str) -> Loads:
    """Return a table of counts as unsigned integers; raise for what is no count."""
    table = check.array_in(name, table)
    if table.ndim != dimensions.count(",") + 1 or table.dtype.kind not in "uif":
        raise ValueError(f"{name} must be numbers {dimensions}, got {check.shown(table)}")
    if table.dtype.kind == "f" and table.dtype.itemsize < 8:
        table = table.astype(np.float64)  # as 2**63 is too much for half floats
    if table.dtype.kind != "u":
        wrong = ~((table >= 0) & (np.floor(table) == table) & (table < 2.0**64))
        for index in map(tuple, np.argwhere(wrong)[:1].tolist()):
            raise ValueError(
                f"{name} must be whole counts of at least 0, got {table[index]} at {list(index)}"
            )
    # A bound from the largest count is enough in most cases, and faster than the sum.
    highest = int(table.max(initial=0))
    if highest * table.size >= 2**63 and not float(table.sum(dtype=np.float64)) < 2.0**63:
        raise ValueError(f"{name} must add up to less than 2**63, got a count of {highest}")
    unsigned = table.dtype.newbyteorder("=") if table.dtype.kind == "u" else np.dtype(np.uint64)
    return np.ascontiguousarray(table, dtype=unsigned)


def narrow(table: Loads) -> Loads:
    """Return a large table in the narrowest unsigned type that holds it, others in 64 bits."""
    is_large = table.size * 8 > NARROW_BYTES
    kind = np.min_scalar_type(int(table.max())) if is_large else np.dtype(np.uint64)
    return table.astype(kind, copy=False)
