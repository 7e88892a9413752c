"""Compare the maps that ranks took with those that the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetuner.placement import compute_checksum
from moetuner.plugins.decision import Slots

# A model's name and the shape [L,P] of its map.
ModelKey = tuple[str | None, tuple[int, ...]]


@dataclass(frozen=True)
class Compared:
    """Whether the engine runs a map of moetuner, whether that is new, and a line that says it."""

    is_ours: bool
    is_new: bool
    text: str


class RunningMaps:
    """The maps that ranks took last, by model, and whether the engine ran those before."""

    def __init__(self) -> None:
        # Slots [L,D,S] that were taken, and those that ran then.
        self._taken: dict[ModelKey, tuple[Slots, Slots]] = {}
        self._is_ours: dict[ModelKey, bool] = {}

    def take(self, key: ModelKey, slots: Slots, before: Slots) -> None:
        """Remember a map that ranks took, and the one that ran before."""
        self._taken[key] = slots, before

    def forget(self, key: ModelKey) -> None:
        """Forget all of a model, which runs the engine's own map; others run what they ran."""
        self._taken.pop(key, None)
        self._is_ours.pop(key, None)

    def expect_nothing(self) -> None:
        """Forget what was taken of all models: an engine asked for maps that it will not run."""
        self._taken.clear()

    def is_refused(self, key: ModelKey) -> bool:
        """Return whether the engine ran another map than the last one that was compared."""
        return not self._is_ours.get(key, True)

    def compare(self, key: ModelKey, running: NDArray[np.integer]) -> Compared | None:
        """Compare running slots [L,D,S] with those that were taken; None if there are none new.

        An engine has the slots of a rank in any order.
        """
        taken = self._taken.pop(key, None)
        if taken is None:
            return None
        slots, before = taken
        differ = find_other_layers(running, slots)
        is_ours = not differ.any()
        is_new = self._is_ours.get(key) != is_ours
        self._is_ours[key] = is_ours
        layers, ranks, width = running.shape
        text = f"the engine runs map {compute_checksum(running)}"
        if is_ours:
            text = f"in force: {text} of {layers} layers x {ranks * width} slots on {ranks} ranks"
            return Compared(is_ours, is_new, text)
        kept = "" if find_other_layers(running, before).any() else ", as it moved no experts"
        text = (
            f"not in force: {text}, and not {compute_checksum(slots)}: {differ.sum()} of {layers} "
            f"layers differ{kept}"
        )
        return Compared(is_ours, is_new, text)


def find_other_layers(one: NDArray[np.integer], other: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return in which layers [L] a rank has other experts, of two maps [L,D,S]."""
    differs: NDArray[np.bool_] = (np.sort(one, axis=2) != np.sort(other, axis=2)).any(axis=(1, 2))
    return differs
