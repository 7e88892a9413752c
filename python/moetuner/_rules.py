"""Experts that must or must not be on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moetuner.problem import Problem


@dataclass(frozen=True)
class Rules:
    """Tables [L,E,D]; None where nothing is said."""

    pinned: NDArray[np.bool_] | None
    forbidden: NDArray[np.bool_] | None

    @property
    def some(self) -> bool:
        """Whether there is a rule at all."""
        return self.pinned is not None or self.forbidden is not None


def rules_of(problem: Problem) -> Rules:
    """Check a problem's rules, and make tables of them.

    Raises
    ------
    ValueError
        If a rule names what does not exist, or rules contradict each other or the slots.
    """
    shape = (problem.layers, problem.experts, problem.devices)
    pinned = _table("pinned", problem.pinned, shape)
    forbidden = _table("forbidden", problem.forbidden, shape)
    if pinned is not None and forbidden is not None:
        both = np.argwhere(pinned & forbidden)
        if both.size:
            layer, expert, device = both[0]
            raise ValueError(
                f"pinned and forbidden contradict each other: expert {expert} of layer {layer} "
                f"on device {device}"
            )
    if forbidden is not None:
        nowhere = np.argwhere(forbidden.all(axis=2))
        if nowhere.size:
            layer, expert = nowhere[0]
            raise ValueError(f"forbidden leaves no device for expert {expert} of layer {layer}")
    if pinned is not None:
        full = np.argwhere(pinned.sum(axis=1) > problem.rooms)
        if full.size:
            layer, device = full[0]
            raise ValueError(
                f"pinned puts {pinned[layer, :, device].sum()} experts of layer {layer} on device "
                f"{device}, which has {problem.rooms[layer, device]} slots"
            )
        unpinned = (~pinned.any(axis=2)).sum(axis=1)
        left = (problem.rooms - pinned.sum(axis=1)).sum(axis=1)
        short = np.flatnonzero(left < unpinned)
        if short.size:
            layer = short[0]
            raise ValueError(
                f"pinned leaves {left[layer]} slots of layer {layer} for the {unpinned[layer]} "
                "experts that are not pinned"
            )
    return Rules(pinned, forbidden)


def _table(
    name: str, rules: Iterable[tuple[int | None, int, int]], shape: tuple[int, int, int]
) -> NDArray[np.bool_] | None:
    table: NDArray[np.bool_] | None = None
    for rule in rules:
        try:
            layer, expert, device = rule
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be (layer, expert, device), got {rule!r:.60}") from None
        for what, value, count in (("expert", expert, shape[1]), ("device", device, shape[2])):
            if not (isinstance(value, int | np.integer) and 0 <= value < count):
                raise ValueError(f"{name}: {what} must be from 0 to {count - 1}, got {value!r:.40}")
        known = isinstance(layer, int | np.integer) and 0 <= layer < shape[0]
        if layer is not None and not known:
            raise ValueError(
                f"{name}: layer must be from 0 to {shape[0] - 1}, or None, got {layer!r:.40}"
            )
        if table is None:
            table = np.zeros(shape, dtype=bool)
        table[slice(None) if layer is None else layer, expert, device] = True
    return table
