"""A given matrix of link costs: checked, and turned into the integers that the search counts in."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetuner._validation import array_in

# The search holds costs in 16 bits.
HIGHEST_COST = (1 << 16) - 1


def checked(values: ArrayLike, devices: int) -> NDArray[np.float64]:
    """Check a matrix of costs [D,D].

    Raises
    ------
    ValueError
        If it is not square, finite, non-negative and symmetric with a zero diagonal, naming the
        first pair of devices that breaks a rule.
    """
    array = array_in("link_cost", values)
    if array.shape != (devices, devices) or array.dtype.kind not in "iuf":
        raise ValueError(
            f"link_cost must be numbers [{devices}, {devices}], one per pair of devices, "
            f"got {array.dtype} {list(array.shape)}"
        )
    cost: NDArray[np.float64] = array.astype(np.float64)
    for wrong, rule in (
        (~np.isfinite(cost), "finite"),
        (cost < 0, "at least 0"),
        (np.diag(np.diagonal(cost) != 0), "0 from a device to itself"),
        (cost != cost.T, "the same in both directions"),
    ):
        if wrong.any():
            a, b = (int(i) for i in np.argwhere(wrong)[0])
            found = f"{cost[a, b]:g} from device {a} to {b}"
            back = f" and {cost[b, a]:g} back" if rule.endswith("directions") else ""
            raise ValueError(f"link_cost must be {rule}, got {found}{back}")
    if devices > 1 and not cost.any():
        raise ValueError("link_cost must be above 0 for some pair of devices, got 0 for all")
    return cost


def in_integers(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Lowest terms of whole numbers; others scaled until the largest is ``HIGHEST_COST``."""
    if (cost == np.floor(cost)).all() and cost.max() < 2.0**53:
        whole = cost.astype(np.int64)
        whole //= np.gcd.reduce(whole, axis=None)
        if whole.max() <= HIGHEST_COST:
            return whole
    scaled = np.rint(cost * (HIGHEST_COST / cost.max())).astype(np.int64)
    return np.where(cost > 0, np.maximum(scaled, 1), 0)
