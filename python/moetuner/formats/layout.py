"""A map of experts to slots as a file has it, good or bad, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moetuner._checks import shown
from moetuner.formats.hints import Hints
from moetuner.placement import EMPTY, Placement


@dataclass(frozen=True, eq=False)
class Layout:
    """Experts by slot, before anybody has looked whether an engine could load them.

    Parameters
    ----------
    experts
        Expert in every slot of every row [R,P], device by device; -1 is an empty slot.
    devices
        Devices, D; None where the file does not say.
    num_experts
        Experts per layer, E; None where the file does not say.
    layers
        Numbers of the rows, as the file has them; None for 0, 1, 2 and so on.
    counts_dense
        Whether the format has a row for every hidden layer, dense ones too.
    remarks
        What the file says beside the map that contradicts it.
    """

    experts: NDArray[np.int64]
    devices: int | None = None
    num_experts: int | None = None
    layers: tuple[int, ...] | None = None
    counts_dense: bool = False
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Any, **fields: Any) -> Layout:
        """Check that rows are integers of one width, and wrap them.

        Raises
        ------
        ValueError
            Naming the first row of another width, or the value that is no expert.
        """
        if not isinstance(rows, list | tuple | np.ndarray) or not len(rows):
            raise ValueError(f"must have at least one row of expert ids, got {shown(rows)}")
        for number, row in enumerate(rows):
            if not isinstance(row, list | tuple | np.ndarray):
                raise ValueError(f"row {number} must be a list of expert ids, got {shown(row)}")
            if len(row) != len(rows[0]) or not len(row):
                raise ValueError(
                    f"row {number} must have {len(rows[0]) or 'some'} slots like row 0, "
                    f"got {len(row)}"
                )
        try:
            found = np.asarray(rows)
        except (ValueError, OverflowError):
            raise ValueError("rows must be integers [layers, slots]") from None
        if found.ndim != 2 or found.dtype.kind not in "iu":
            raise ValueError(
                f"rows must be integers [layers, slots], got {found.dtype} {list(found.shape)}"
            )
        if int(found.max()) >= 1 << 63:
            raise ValueError(f"rows must be integers below 2**63, got {found.max()}")
        return cls(found.astype(np.int64), **fields)

    def placement(self, hints: Hints) -> Placement:
        """Return the placement of the layers with experts.

        Raises
        ------
        ValueError
            If devices, experts or layers are not known, or the map breaks a rule.
        """
        rows = self.experts
        if self.counts_dense:
            moe = hints.moe_layers(len(rows))
            rows = rows if moe is None else rows[moe]
        devices = self._known("devices", self.devices, hints.devices)
        if rows.shape[1] % devices:
            raise ValueError(f"devices must divide the {rows.shape[1]} slots, got {devices}")
        experts = hints.num_experts or self.num_experts or int(rows.max(initial=EMPTY)) + 1
        slots = rows.reshape(len(rows), devices, -1)
        return Placement(cast(Any, slots), num_experts=experts)

    @staticmethod
    def _known(name: str, said: int | None, given: int | None) -> int:
        if said is not None and given is not None and said != given:
            raise ValueError(f"{name} must be {said} as in the file, got {given}")
        known = given if said is None else said
        if known is None:
            raise ValueError(f"{name} must be given: the file does not say how many there are")
        return known
